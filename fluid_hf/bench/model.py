"""A slice of a model (a few decoder layers at their real widths) timed in every variant, in one process per rank.

Weights are random and equal on all ranks, tokens differ between ranks. The slice ends before the language-model head,
which no variant changes. Every variant is compared with the first one before anything is timed.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fluid_hf.bench.peers import autoep_layer, transformers_layer
from fluid_hf.bench.shapes import SHAPES, LayerShape
from fluid_hf.config import FluidConfig
from fluid_hf.patching import patch_model

__all__ = ["MODELS", "ModelBench", "StepTime"]

# Attention heads, key-value heads, size of the shared expert (0 for none).
MODELS = {
    "mixtral-8x7b": (32, 8, 0),
    "qwen1.5-moe-a2.7b": (16, 16, 5632),
    "qwen2-57b-a14b": (28, 4, 20480),
    "qwen3-30b-a3b": (32, 4, 0),
    "qwen3-235b-a22b": (64, 4, 0),
    "tiny": (4, 2, 0),
}
VOCABULARY = 4096


@dataclass(frozen=True)
class StepTime:
    """Milliseconds: median over the runs and spread (90th less 10th percentile), of the slowest rank."""

    median: float
    spread: float


class ModelBench:
    """One slice and its variants.

    Args:
        name: a key of `MODELS`.
        layers: decoder layers of the slice.
        batch, sequence: tokens of this rank.
    """

    def __init__(
        self, name: str, layers: int, batch: int, sequence: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.name, self.shape, self.device = name, SHAPES[name], device
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.size > 1 else 0
        self.model = _build(name, self.shape, layers, sequence).to(device=device, dtype=dtype)
        generator = torch.Generator(device=device).manual_seed(1 + self.rank)
        self.ids = torch.randint(VOCABULARY, (batch, sequence), device=device, generator=generator)
        shape = (batch, sequence, self.shape.hidden)
        self.grad = torch.randn(shape, device=device, generator=generator).to(dtype)

    def variants(self) -> dict[str, Callable[[], nn.Module]]:
        """Builders of the variants by name; the first is what the others are compared with."""
        return {
            "row per expert": self._row_per_expert,
            "serial": lambda: self._patched(overlap=False),
            "fluid_hf": lambda: self._patched(),
            "AutoEP": lambda: self._with_peer(autoep_layer),
            "AllToAllEP": lambda: self._with_peer(transformers_layer),
        }

    def modes(self, model: nn.Module) -> dict[str, Callable[[], None]]:
        """What is timed: inference, forward as in training, forward and backward."""

        def inference() -> None:
            with torch.no_grad():
                model(input_ids=self.ids)

        def forward() -> None:
            model(input_ids=self.ids)

        return {"inference": inference, "forward": forward, "backward": lambda: self._backward(model)}

    def training_step(self, model: nn.Module) -> tuple[Callable[[], None], Callable[[], None]]:
        """A step with DeepSpeed ZeRO 1 and AdamW in the given (patched) model, and what ends it."""
        import deepspeed

        settings = {
            "train_micro_batch_size_per_gpu": self.ids.shape[0],
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": self.device.type == "cuda"},
            "gradient_clipping": 1.0,
        }
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=self.device.type == "cuda")
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

        def step() -> None:
            output = engine(input_ids=self.ids).last_hidden_state
            engine.backward((output * self.grad).float().mean())
            engine.step()

        return step, engine.destroy

    def results(self, model: nn.Module) -> list[torch.Tensor]:
        """Output and the gradient of the embedding, for the comparison; gradients are cleared."""
        output = model(input_ids=self.ids).last_hidden_state
        output.backward(self.grad)
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        found = [output.detach(), embedding.weight.grad]
        _clear(model)
        return found

    def time(self, run: Callable[[], None], repeats: int) -> StepTime:
        """Times of `run` on all ranks together."""
        for _ in range(3):
            run()
        times = []
        for _ in range(repeats):
            self._wait()
            if self.size > 1:
                dist.all_reduce(torch.zeros(1, device=self.device))
            self._wait()
            start = time.perf_counter()
            run()
            self._wait()
            times.append((time.perf_counter() - start) * 1e3)
        deciles = statistics.quantiles(times, n=10) if len(times) > 1 else [times[0]] * 2
        both = torch.tensor([statistics.median(times), deciles[-1] - deciles[0]], device=self.device)
        if self.size > 1:
            dist.all_reduce(both, dist.ReduceOp.MAX)
        return StepTime(float(both[0]), float(both[1]))

    def _backward(self, model: nn.Module) -> None:
        model(input_ids=self.ids).last_hidden_state.backward(self.grad)
        _clear(model)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _patched(self, **settings: Any) -> nn.Module:
        return patch_model(copy.deepcopy(self.model), FluidConfig(ep_size=self.size, **settings))

    def _row_per_expert(self) -> nn.Module:
        model = self._patched(overlap=False)
        for layer in model.fluid.layers.values():  # type: ignore[union-attr, operator]
            layer.forward = _one_row_per_expert(layer.forward)
        return model

    def _with_peer(self, build: Callable[..., tuple[Any, nn.Module]]) -> nn.Module:
        model = copy.deepcopy(self.model)
        local = self.shape.experts // self.size
        held = slice(self.rank * local, (self.rank + 1) * local)
        blocks: list[Any] = [module for module in model.modules() if hasattr(module, "experts")]
        for block in blocks:
            weights = (block.experts.gate_up_proj.data[held].clone(), block.experts.down_proj.data[held].clone())
            block.experts = _Peer(*build(self.shape, *weights))
        return model


class _Peer(nn.Module):
    """Experts of a peer in the place of the block's own."""

    def __init__(self, call: Callable[..., torch.Tensor], module: nn.Module) -> None:
        super().__init__()
        self._call = [call]  # a list: the call may be a module that holds `module` already
        self.module = module

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self._call[0](hidden, index, weights)


def _one_row_per_expert(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same layer with every (token, expert) pair as a token of its own."""

    def forward(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, between: Any = None) -> Any:
        top_k = index.shape[1]
        rows = hidden[:, None].expand(-1, top_k, -1).reshape(-1, hidden.shape[1])
        output = call(rows, index.reshape(-1, 1), weights.reshape(-1, 1)).view(-1, top_k, hidden.shape[1]).sum(1)
        return output if between is None else (output, between())

    return forward


def _clear(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def _build(name: str, shape: LayerShape, layers: int, sequence: int) -> nn.Module:
    """The slice with random weights, equal on all ranks."""
    from transformers import AutoModel, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

    heads, kv_heads, shared = MODELS[name]
    base: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": shape.hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": sequence,
        "num_experts_per_tok": shape.top_k,
        "use_cache": False,
    }
    experts: dict[str, Any] = {"num_experts": shape.experts, "moe_intermediate_size": shape.inner}
    config: Any
    if name.startswith("mixtral"):
        config = MixtralConfig(**base, intermediate_size=shape.inner, num_local_experts=shape.experts)
    elif shared:
        config = Qwen2MoeConfig(**base, **experts, shared_expert_intermediate_size=shared)
    else:
        experts["head_dim"] = 128 if shape.hidden > 64 else 16
        config = Qwen3MoeConfig(**base, **experts)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model: nn.Module = AutoModel.from_config(
            config, attn_implementation="sdpa", experts_implementation="grouped_mm"
        )
    return model.train()
