"""The models of `fluid-hf bench train`, by variant, from the checkpoint that all of them start from.

No rank ever holds the whole model: fluid_hf and AutoEP read the dense weights and this rank's experts, and transformers
shards what it reads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fluid_hf.bench.shapes import SHAPES
from fluid_hf.bench.train_plan import AUTOEP, TRANSFORMERS, TrainPlan
from fluid_hf.config import FluidConfig

__all__ = ["load_model"]


def load_model(plan: TrainPlan, device: torch.device) -> nn.Module:
    """The variant's model in training mode. Collective over all ranks."""
    load = {AUTOEP: _autoep, TRANSFORMERS: _transformers}.get(plan.variant, _ours)
    return load(plan, device).train()


def _ours(plan: TrainPlan, device: torch.device) -> nn.Module:
    """Patched; each rank reads its own experts."""
    import fluid_hf

    settings: dict[str, Any] = {"overlap": plan.overlap, "waves": plan.waves, "timeout_seconds": plan.timeout}
    config = FluidConfig(ep_size=plan.ep, sp_size=plan.sp, **settings)
    model: nn.Module = fluid_hf.from_pretrained(
        str(plan.checkpoint), config, dtype=plan.torch_dtype, attn_implementation="sdpa"
    )
    return model


def _autoep(plan: TrainPlan, device: torch.device) -> nn.Module:
    """transformers' model with AutoEP's layers for experts; each rank reads its own."""
    from accelerate import init_empty_weights
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    from fluid_hf.bench.model_variants import PeerExperts
    from fluid_hf.bench.peers import autoep_layer

    with init_empty_weights():
        config = AutoConfig.from_pretrained(plan.checkpoint)
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=plan.torch_dtype)
    shape, rank = SHAPES[plan.model], dist.get_rank() % plan.ep
    held = shape.experts // plan.ep
    dense, experts = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for file in sorted(plan.checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                if ".experts." in name:
                    experts[name] = opened.get_slice(name)[rank * held : (rank + 1) * held].to(device)
                else:
                    dense[name] = opened.get_tensor(name)
    for name, block in [found for found in model.named_modules() if hasattr(found[1], "experts")]:
        gate_up, down = (experts.pop(f"{name}.experts.{part}") for part in ("gate_up_proj", "down_proj"))
        block.experts = PeerExperts(*autoep_layer(shape, gate_up, down, plan.ep))
    missing, unexpected = model.load_state_dict(dense, strict=False, assign=True)
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not unexpected and not left, (missing, unexpected, left)
    return model  # type: ignore[no-any-return]


def _transformers(plan: TrainPlan, device: torch.device) -> nn.Module:
    """transformers' "all_to_all" expert parallelism with FSDP2: float32 weights, computing in the plan's type."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    sizes: dict[str, Any] = {"fsdp_size": plan.ranks, "ep_size": plan.ep}
    config = DistributedConfig(**sizes, ep_implementation="all_to_all", fsdp_mixed_precision=plan.dtype == "bfloat16")
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        plan.checkpoint,
        distributed_config=config,
        dtype=torch.float32,
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
    )
    return model
