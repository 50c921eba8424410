"""What `fluid-hf bench train` runs: its models, its variants, and the plan of one run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fluid_hf.bench.model import model_config

__all__ = ["AUTOEP", "DEPTHS", "PROGRESS", "TRANSFORMERS", "WARM_UP", "TrainPlan"]

AUTOEP, TRANSFORMERS = "AutoEP", "transformers"
WARM_UP = 5  # steps that are not timed
PROGRESS = "bench train: "  # starts the lines of a rank's output that the command shows
# Layers and vocabulary of the whole models.
DEPTHS = {
    "mixtral-8x7b": (32, 32000),
    "qwen1.5-moe-a2.7b": (24, 151936),
    "qwen2-57b-a14b": (28, 151936),
    "qwen3-30b-a3b": (48, 151936),
    "qwen3-235b-a22b": (94, 151936),
    "tiny": (2, 512),
}


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """One variant's run, as its ranks read it.

    Attributes:
        variant: name of the variant.
        model: a key of `DEPTHS`.
        layers: decoder layers.
        ranks, ep, sp: processes; ranks that share the experts, and a sequence.
        zero: DeepSpeed's ZeRO stage.
        steps: optimizer steps that count; with `trace` one more follows.
        batch, sequence: sequences of a rank (of the `sp` ranks that share them) and step, and tokens of each.
        overlap, waves: of fluid_hf's settings.
        dtype: of weights and computation: "bfloat16" or "float32".
        checkpointing: activation checkpointing.
        trace: trace one more step on rank 0.
        learning_rate: constant.
        timeout: seconds that a rank waits for another one.
        shared: folder with the checkpoint and the text.
        out: the variant's own folder.
    """

    variant: str
    model: str
    layers: int
    ranks: int
    ep: int
    sp: int
    zero: int
    steps: int
    batch: int
    sequence: int
    overlap: bool = True
    waves: int | None = None
    dtype: str = "bfloat16"
    checkpointing: bool = False
    trace: bool = False
    learning_rate: float = 1e-4
    timeout: float = 600.0
    shared: str
    out: str

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return model_config(self.model, self.layers, max(4096, self.sequence), DEPTHS[self.model][1])

    @property
    def tokens(self) -> int:
        """Of one step, on all ranks."""
        return self.batch * self.sequence * self.ranks // self.sp

    @property
    def all_steps(self) -> int:
        """Steps that are run."""
        return self.steps + int(self.trace)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype`, as torch names it."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def ours(self) -> bool:
        """Whether the model is patched."""
        return self.variant not in (AUTOEP, TRANSFORMERS)

    @property
    def checkpoint(self) -> Path:
        """Folder of the weights."""
        return Path(self.shared) / "checkpoint"

    @property
    def text(self) -> Path:
        """File of the sequences."""
        return Path(self.shared) / f"text-{self.model}-{self.num_sequences}x{self.sequence}.safetensors"

    @property
    def num_sequences(self) -> int:
        """Of all steps."""
        return self.all_steps * self.tokens // self.sequence

    def refusal(self) -> str | None:
        """Why the variant cannot be run so, if it cannot."""
        if self.ours or self.sp == 1:
            return None
        return f"sp ({self.sp}) must be 1: only fluid_hf's variants share sequences here."
