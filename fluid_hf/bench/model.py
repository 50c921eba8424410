"""A slice of a model (a few decoder layers at their real widths) timed in every variant, in one process per rank.

Weights are random and equal on all ranks, tokens differ between ranks (between groups of ranks that share sequences).
The slice ends before the language-model head, which no variant changes. Every variant is compared with the unpatched
model on the same tokens before it is timed (on the mirror link, with the first variant).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fluid_hf.bench.same_routing import RecordedRouting, SameRouting
from fluid_hf.bench.shapes import SHAPES

__all__ = ["ALLOWED", "MODELS", "ModelBench", "ModelSlice", "StepTime", "clear", "model_config", "start_engine"]

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
# Relative difference from the unpatched model, routed alike.
ALLOWED = {torch.bfloat16: 5e-2, torch.float32: 1e-5}
WARM_UP = 2
_STATE_BYTES = 18  # of a parameter trained by ZeRO in bfloat16: its gradient, and master weight, moments, gradient


@dataclass(frozen=True)
class ModelSlice:
    """What is timed.

    Attributes:
        name: a key of `MODELS`.
        layers: decoder layers.
        batch: sequences of a rank, or of the `sp` ranks that share them.
        sequence: tokens of a sequence.
        sp: ranks that share a sequence.
    """

    name: str
    layers: int
    batch: int
    sequence: int
    sp: int = 1

    def __str__(self) -> str:
        shared = f", sequences over {self.sp} ranks" if self.sp > 1 else ""
        return f"{self.name}, {self.layers} layers, batch {self.batch} x {self.sequence}{shared}"


@dataclass(frozen=True)
class StepTime:
    """Milliseconds: median over the runs and spread (90th less 10th percentile), of the slowest rank."""

    median: float
    spread: float


class ModelBench:
    """Tokens, reference and timing of one slice. The models are built by `build` and changed by the variants.

    Args:
        part: what is timed.
        device, dtype: of the models.
    """

    def __init__(self, part: ModelSlice, device: torch.device, dtype: torch.dtype) -> None:
        self.part, self.shape, self.device, self.dtype = part, SHAPES[part.name], device, dtype
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.size > 1 else 0
        generator = torch.Generator(device=device).manual_seed(1 + self.rank // part.sp)
        size = (part.batch, part.sequence)
        self.ids = torch.randint(VOCABULARY, size, device=device, generator=generator)
        self.grad = torch.randn(*size, self.shape.hidden, device=device, generator=generator).to(dtype)
        self.inputs: dict[str, Any] = {"input_ids": self.ids}
        if part.sp > 1:
            self.inputs = {
                "input_ids": self._piece(self.ids).contiguous(),
                "position_ids": self._piece(torch.arange(part.sequence, device=device).expand(size)).contiguous(),
                "sequence_sharded": True,
            }
        self.piece_grad = self._piece(self.grad).contiguous()
        self._expected: list[torch.Tensor] = []
        self._chosen: list[torch.Tensor] = []

    def build(self) -> nn.Module:
        """The unpatched slice on the device; the same weights each time and on all ranks."""
        return _build(self.part, self.device, self.dtype)

    def make_reference(self, model: nn.Module) -> None:
        """Output and embedding gradient of the unpatched model on whole sequences, all its experts on this device."""
        weight = _embedding(model)
        for parameter in model.parameters():  # no memory for the other gradients
            parameter.requires_grad_(parameter is weight)
        with RecordedRouting() as routing:
            output = model(input_ids=self.ids).last_hidden_state
        self._chosen = [self._tokens_of_piece(index) for index in routing.chosen]
        output.backward(self.grad)
        self._expected, weight.grad = [self._piece(output.detach()).clone(), weight.grad], None

    def error(self, model: nn.Module) -> float:
        """Largest relative difference from the reference over all ranks; gradients are cleared. Collective.

        Routers choose as the reference's did. Without one (the mirror link, whose peers compute with this rank's
        experts) the first model becomes it.
        """
        with SameRouting(self._chosen) if self._expected else RecordedRouting() as routing:
            output = model(**self.inputs).last_hidden_state
        if isinstance(routing, RecordedRouting):
            self._chosen = routing.chosen
        output.backward(self.piece_grad)
        gradient = _embedding(model).grad
        if self.part.sp > 1:
            dist.all_reduce(gradient, group=model.fluid.groups.sp_group)  # type: ignore[union-attr, arg-type]
        self._expected = self._expected or [output.detach(), gradient]
        errors = [
            (ours.float() - theirs.float()).norm() / theirs.float().norm()
            for ours, theirs in zip((output.detach(), gradient), self._expected, strict=True)
        ]
        clear(model)
        worst = torch.nan_to_num(torch.stack(errors), nan=float("inf")).max()
        if self.size > 1:
            dist.all_reduce(worst, dist.ReduceOp.MAX)
        return float(worst)

    def forget_reference(self) -> None:
        """Give back the memory of what variants were compared with."""
        self._expected, self._chosen = [], []

    def modes(self, model: nn.Module) -> dict[str, Callable[[], None]]:
        """What is timed: inference (the model in evaluation), forward as in training, forward and backward."""

        def inference() -> None:
            with torch.no_grad():
                model(**self.inputs)

        def forward() -> None:
            model(**self.inputs)

        def backward() -> None:
            model(**self.inputs).last_hidden_state.backward(self.piece_grad)
            clear(model)

        return {"inference": inference, "forward": forward, "backward": backward}

    def step(self, engine: Any) -> None:
        """A training step of DeepSpeed's engine."""
        output = engine(**self.inputs).last_hidden_state
        engine.backward((output * self.piece_grad).float().mean())
        engine.step()

    def missing_bytes(self, model: nn.Module) -> int:
        """Device memory that a training step lacks, at most over the ranks; 0 or less if it fits. Collective."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.modes(model)["backward"]()
        activations = torch.cuda.max_memory_allocated() - before
        torch.cuda.empty_cache()
        numbers = sum(p.numel() / (1 if hasattr(p, "group_name") else self.size) for p in model.parameters())
        lacking = numbers * _STATE_BYTES + activations - torch.cuda.mem_get_info()[0]
        most = torch.tensor([lacking], device=self.device, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most.item())

    def times(self, run: Callable[[], None], repeats: int) -> list[float]:
        """Milliseconds of `run`, on all ranks together, after two runs that are not counted."""
        for _ in range(WARM_UP):
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
        return times

    def summary(self, times: list[float]) -> StepTime:
        """Median and spread on the slowest rank. Collective."""
        deciles = statistics.quantiles(times, n=10) if len(times) > 1 else [times[0]] * 2
        both = torch.tensor([statistics.median(times), deciles[-1] - deciles[0]], device=self.device)
        if self.size > 1:
            dist.all_reduce(both, dist.ReduceOp.MAX)
        return StepTime(float(both[0]), float(both[1]))

    def _piece(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's piece of tensors that run along the sequence in dimension 1."""
        length = self.part.sequence // self.part.sp
        start = length * (self.rank % self.part.sp)
        return whole[:, start : start + length]

    def _tokens_of_piece(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of what has a row for each token of all sequences."""
        return self._piece(whole.unflatten(0, (self.part.batch, -1))).flatten(0, 1)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def start_engine(model: nn.Module, bench: ModelBench, given: Mapping[str, Any] | None = None) -> Any:
    """DeepSpeed's engine with ZeRO 1 and AdamW around a model with split experts. Collective.

    Args:
        given: settings of DeepSpeed's JSON beside or instead of those here.
    """
    import deepspeed

    from fluid_hf.integrations.optimizer_groups import split_expert_groups

    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": bench.part.batch,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bench.dtype == torch.bfloat16},
        "gradient_clipping": 1.0,
    }
    for name, value in (given or {}).items():
        settings[name] = {**settings.get(name, {}), **value} if isinstance(value, dict) else value
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=bench.device.type == "cuda")
    split_expert_groups(optimizer.param_groups)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def clear(model: nn.Module) -> None:
    """Drop all gradients."""
    for parameter in model.parameters():
        parameter.grad = None


def _embedding(model: nn.Module) -> Any:
    return model.get_input_embeddings().weight  # type: ignore[operator, union-attr]


def model_config(name: str, layers: int, positions: int, vocabulary: int = VOCABULARY) -> Any:
    """The transformers configuration of a model of `MODELS`, with so many layers, positions and tokens."""
    from transformers import MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

    shape, (heads, kv_heads, shared) = SHAPES[name], MODELS[name]
    base: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        "num_experts_per_tok": shape.top_k,
        "use_cache": False,
    }
    experts: dict[str, Any] = {"num_experts": shape.experts, "moe_intermediate_size": shape.inner}
    if name.startswith("mixtral"):
        return MixtralConfig(**base, intermediate_size=shape.inner, num_local_experts=shape.experts)
    if shared:
        return Qwen2MoeConfig(**base, **experts, shared_expert_intermediate_size=shared)
    experts["head_dim"] = 128 if shape.hidden > 64 else 16
    return Qwen3MoeConfig(**base, **experts)


def _build(part: ModelSlice, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The slice with random weights, equal on all ranks, made where and as they are used."""
    from transformers import AutoModel

    config = model_config(part.name, part.layers, part.sequence)
    torch.manual_seed(0)
    how = {"attn_implementation": "sdpa", "experts_implementation": "grouped_mm", "dtype": dtype}
    with device:
        model: nn.Module = AutoModel.from_config(config, **how)
    return model.to(device).train()
