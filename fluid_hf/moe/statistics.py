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
    """

    def __init__(self) -> None:
        self.counting, self.top_k = True, 0
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self.tokens = 0
        self.rows = 0
        self._offsets: list[torch.Tensor] = []
        self._load_E: torch.Tensor | None = None

    def add_dispatch(self, tokens: int, rows: int) -> None:
        """Count one dispatch."""
        if self.counting:
            self.tokens += tokens
            self.rows += rows

    def add_load(self, offsets: Sequence[torch.Tensor], top_k: int) -> None:
        """Count the pairs of each piece from its expert offsets; nothing is launched until there are many."""
        self.top_k = top_k
        if not self.counting:
            return
        self._offsets += offsets
        if len(self._offsets) >= 256:
            self._fold()

    def load_tensor(self) -> torch.Tensor | None:
        """(token, expert) pairs computed by each expert held here [E], on the device; `None` before the first call."""
        self._fold()
        return self._load_E

    def _fold(self) -> None:
        if self._offsets:
            ends_E = torch.stack(self._offsets).sum(0)
            load_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1))
            self._load_E = load_E if self._load_E is None else self._load_E + load_E
            self._offsets = []
