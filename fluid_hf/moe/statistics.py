"""Counts of one layer: tokens, rows, load of the experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["LayerStats"]


class LayerStats:
    """Counts since the last `reset()`.

    Attributes:
        counting: whether calls count now.
        tokens: tokens of this rank.
        rows: rows sent to other ranks by dispatch.
        top_k: experts of a token in the last call; 0 before the first one.
        ends: `offsets_E` of the pieces computed, on the device, or sums of them: the pairs of an expert are what the
            sum of its numbers is above the one before.
    """

    def __init__(self) -> None:
        self.counting, self.top_k = True, 0
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self.tokens = 0
        self.rows = 0
        self.ends: list[torch.Tensor] = []

    def add_dispatch(self, tokens: int, rows: int) -> None:
        """Count one dispatch."""
        if self.counting:
            self.tokens += tokens
            self.rows += rows

    def add_load(self, offsets: Sequence[torch.Tensor], top_k: int) -> None:
        """Count the pairs of each piece from its expert offsets; nothing is launched until there are very many."""
        self.top_k = top_k
        if not self.counting:
            return
        self.ends += offsets
        if len(self.ends) >= 256:
            self.ends = [torch.stack(self.ends).sum(0)]
