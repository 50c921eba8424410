"""Counts of one layer: tokens, rows, load of the experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["LayerStats"]


class LayerStats:
    """Counts since the last `reset()`.

    Attributes:
        tokens: tokens of this rank.
        rows: rows sent to other ranks by dispatch.
        load_E: (token, expert) pairs computed by each expert held here, on the layer's device; `None` before any.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self.tokens = 0
        self.rows = 0
        self.load_E: torch.Tensor | None = None

    def add_dispatch(self, tokens: int, rows: int) -> None:
        """Count one dispatch."""
        self.tokens += tokens
        self.rows += rows

    def add_load(self, offsets: Sequence[torch.Tensor]) -> None:
        """Count the pairs of each piece from its expert offsets, without waiting for the device."""
        ends_E = torch.stack(list(offsets)).sum(0)
        load_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1))
        self.load_E = load_E if self.load_E is None else self.load_E + load_E
