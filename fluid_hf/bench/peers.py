"""The layers a user has without fluid_hf, with their own code: transformers' experts and AllToAllEP, DeepSpeed AutoEP.

Settings are the defaults. AutoEP's `comm_backend: "deepep"` is not built: it needs the package deep_ep and its NCCL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fluid_hf.bench.shapes import LayerShape

__all__ = ["autoep_layer", "transformers_experts", "transformers_layer"]

Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class _Mesh:
    """As much of a DeviceMesh as AllToAllEP asks for."""

    def __init__(self, group: Any, size: int) -> None:
        self._group, self._size = group, size

    def get_group(self) -> Any:
        return self._group

    def size(self) -> int:
        return self._size

    def get_local_rank(self) -> int:
        return dist.get_rank(self._group)


class _FixedRouter(nn.Module):
    """Gives AutoEP the routing that every variant is timed with."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.routing: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, hidden: torch.Tensor, bias: Any = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert self.routing is not None
        weights, index = self.routing
        counts = torch.zeros(self.experts, dtype=torch.int64, device=index.device)
        counts.scatter_add_(0, index.reshape(-1), torch.ones_like(index.reshape(-1)))
        return weights, index, counts


def transformers_experts(shape: LayerShape, gate_up: torch.Tensor, down: torch.Tensor) -> Any:
    """transformers' `grouped_mm` experts around the given weights (all experts, or those held here)."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.inner,
        num_experts=gate_up.shape[0],
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts.gate_up_proj, experts.down_proj = nn.Parameter(gate_up), nn.Parameter(down)
    return experts


def _alone() -> Any:
    """A group of this rank only; collective over all ranks."""
    groups = [dist.new_group([rank]) for rank in range(1 if dist.get_backend() == "mirror" else dist.get_world_size())]
    return groups[dist.get_rank()]


def transformers_layer(
    shape: LayerShape, gate_up: torch.Tensor, down: torch.Tensor, implementation: str = "all_to_all"
) -> tuple[Layer, nn.Module]:
    """transformers' AllToAllEP (or another registered one) over the default group; the weights are those held here."""
    from transformers.distributed.expert_parallel import EPImplementationInterface

    from fluid_hf.integrations import transformers_ep  # noqa: F401 - registers "fluid"

    experts = transformers_experts(shape, gate_up, down)
    experts._is_expert_parallel = True
    meshes: list[Any] = [_Mesh(dist.group.WORLD, dist.get_world_size()), _Mesh(_alone(), 1)]
    layer = EPImplementationInterface()[implementation](experts, *meshes)
    return layer, experts


def autoep_layer(
    shape: LayerShape, gate_up: torch.Tensor, down: torch.Tensor, ep_size: int | None = None, *, fused: bool = False
) -> tuple[Layer, nn.Module]:
    """DeepSpeed AutoEP's layer over the default group, its router replaced by the given routing.

    With fewer ranks, `ep_size`, it works once DeepSpeed's engine has given it its group. `fused` sets its
    `gate_up_impl`: it then joins gate and up on every call, for one GEMM in the place of two.
    """
    import deepspeed
    from deepspeed.module_inject.auto_ep_config import MoELayerSpec, parse_autoep_config
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    from fluid_hf.integrations.deepspeed import init_communication

    if not deepspeed.comm.is_initialized():
        init_communication()
    size = ep_size or dist.get_world_size()
    names = {"moe_module_name": "m", "model_family": "qwen3_moe", "router_name": "gate", "experts_name": "experts"}
    weights = {"expert_storage": "fused_3d", "expert_w1_name": "gate_up_proj", "expert_w2_name": "down_proj"}
    sizes = {"num_experts": shape.experts, "top_k": shape.top_k, "hidden_size": shape.hidden}
    spec = MoELayerSpec(
        **names,
        **weights,
        **sizes,
        expert_w3_name=None,
        ffn_hidden_size=shape.inner,
        score_func="softmax",
        score_apply="post",
        route_norm=True,
        gate_bias=False,
        return_router_logits=False,
        router_logits_capture_target="none",
        router_logits_capture_index=None,
        router_logits_capture_layer_name=None,
        has_shared_experts=False,
        shared_experts_name="",
    )
    source = nn.Module()
    source.gate = nn.Linear(shape.hidden, shape.experts, bias=False, device=gate_up.device, dtype=gate_up.dtype)
    source.experts = nn.Module()
    # Only this rank's slice is read: a view of the right length stands in for the other ranks' experts.
    full = [w.expand(size, *w.shape).reshape(-1, *w.shape[1:]) if size > 1 else w for w in (gate_up, down)]
    source.experts.gate_up_proj, source.experts.down_proj = (nn.Parameter(w) for w in full)
    block = {"enabled": True, "autoep_size": size, **({"gate_up_impl": "fused"} if fused else {})}
    layer = AutoEPMoELayer(spec, source, size, dist.get_rank() % size, parse_autoep_config(block))
    layer.to(gate_up.device)
    layer.ep_group = dist.group.WORLD if size == dist.get_world_size() else None
    router = _FixedRouter(shape.experts)
    layer.router = router

    def call(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        router.routing = (weights, index)
        return layer(hidden[None])[0]

    return call, layer
