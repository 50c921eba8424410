"""What the gradients of query, key and value heads give for the weights and biases of their projections.

Legend: M tokens of this rank, H hidden, N columns of the gradients of all heads, C those of one of two ranks' heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from fluid_hf.attention.fused_projection import HeadPlan

__all__ = ["HeadGradients", "PackedGradients", "PartedGradients"]


class HeadGradients(Protocol):
    """Gradients of the projections by name, one product for all of them."""

    nbytes: int

    def weights(self, x_MH: torch.Tensor) -> dict[str, torch.Tensor]:
        """Those of the weights, [out, H] each."""

    def biases(self) -> dict[str, torch.Tensor]:
        """Those of the biases, [out] each."""


class PackedGradients:
    """Of gradients side by side as the weights have their rows, [M, N]."""

    def __init__(self, plan: HeadPlan, packed_MN: torch.Tensor) -> None:
        self._plan, self._packed = plan, packed_MN
        self.nbytes = packed_MN.nbytes

    def weights(self, x_MH: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `HeadGradients`."""
        return self._plan.split(self._packed.t() @ x_MH)

    def biases(self) -> dict[str, torch.Tensor]:
        """See `HeadGradients`."""
        return self._plan.split(self._packed.sum(0))


class PartedGradients:
    """Of gradients in two parts, [M, C] of each rank, one of which may still be on its way.

    Each part's product has rows of its own in one buffer, in the order in which heads travel; they are put in the
    weights' order when all are there. For layouts without replicas only, whose rows are as many.

    Args:
        plan: with one chunk.
        parts: by rank.
    """

    def __init__(self, plan: HeadPlan, parts: Sequence[torch.Tensor]) -> None:
        self._plan, self._parts = plan, parts
        self._rows: Sequence[torch.Tensor] = ()
        self._whole: torch.Tensor | None = None
        self._missing = list(range(len(parts)))
        self.nbytes = sum(part.nbytes for part in parts)

    def multiply(self, rank: int, x_MH: torch.Tensor) -> None:
        """Compute the weights' gradient of one rank's part, which must have arrived."""
        if self._whole is None:
            self._whole = x_MH.new_empty(sum(self._plan.rows), x_MH.shape[1])
            self._rows = self._whole.chunk(len(self._parts))
        torch.mm(self._parts[rank].t(), x_MH, out=self._rows[rank])
        self._missing.remove(rank)

    def weights(self, x_MH: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `HeadGradients`."""
        for rank in list(self._missing):
            self.multiply(rank, x_MH)
        assert self._whole is not None
        return self._plan.split(self._plan.home(self._whole))

    def biases(self) -> dict[str, torch.Tensor]:
        """See `HeadGradients`."""
        return self._plan.split(self._plan.home(torch.cat([part.sum(0) for part in self._parts])))
