"""Query, key and value projections of a chunk of heads for all destinations, as one matrix.

Legend: S ranks, K chunks, C columns that one rank gets of a chunk (its query, key and value heads, D each), H hidden,
M tokens of this rank, N columns of all gradients: those of q, k and v one after the other, as the weights have them,
E columns of one rank's results of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fluid_hf.attention.head_layouts import order_rows, pack_gradient
from fluid_hf.attention.heads import HeadLayout

__all__ = ["HeadPlan", "Projections"]

NAMES = ("q", "k", "v")


@dataclass(frozen=True)
class Projections:
    """Weights [out, in] and biases [out] (or `None`) of q, k, v and o, as they are now."""

    weights: Mapping[str, torch.Tensor]
    biases: Mapping[str, torch.Tensor | None]

    def to(self, dtype: torch.dtype) -> Projections:
        """The same in another type, whatever each has. To be called without gradients only: nothing is detached."""
        if all([tensor is None or tensor.dtype == dtype for tensor in (*self.weights.values(), *self.biases.values())]):
            return self
        weights = {name: weight.detach().to(dtype) for name, weight in self.weights.items()}
        biases = {name: None if bias is None else bias.detach().to(dtype) for name, bias in self.biases.items()}
        return Projections(weights, biases)


class HeadPlan:
    """How the rows of the q, k and v weights belong to chunks and ranks; the same for every call of a layer.

    Args:
        layout: heads over ranks.
        head_dim: D.
        wanted: chunks at most.

    Attributes:
        chunks: heads of each chunk.
        rows: rows of the q, k and v weights.
        columns: C of each chunk.
        results: E of each chunk: the columns of one rank's results.
    """

    def __init__(self, layout: HeadLayout, head_dim: int, wanted: int) -> None:
        self.layout, self.head_dim = layout, head_dim
        self.chunks = layout.chunks(wanted)
        kv_rows = layout.num_kv_heads * head_dim
        self.rows = (layout.num_heads * head_dim, kv_rows, kv_rows)
        self.columns = [(chunk.num_q + 2 * chunk.num_kv) * head_dim for chunk in self.chunks]
        self.results = [chunk.num_q * head_dim for chunk in self.chunks]
        self._parts = [count for count in self.columns for _ in range(layout.sp_size)]
        self._order: dict[torch.device, torch.Tensor] = {}
        self._back: dict[torch.device, torch.Tensor] = {}

    def travelling(self, projections: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Weights [out, H] (or biases [out]) of q, k and v in the order in which products leave: chunks, ranks in them.

        Key/value heads that several ranks need stand in it several times.
        """
        tensors = [projections[name] for name in NAMES]
        index = self._order.get(tensors[0].device)
        if index is None:  # copied to the device once
            index = self._order[tensors[0].device] = torch.tensor(self._travel_order(), device=tensors[0].device)
        return order_rows(tensors, index)

    def home(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [N, H] (or entries [N]) in the order of `travelling` back in that of q, k and v; without replicas."""
        index = self._back.get(rows.device)
        if index is None:
            order = self._travel_order()
            back = sorted(range(len(order)), key=order.__getitem__)
            index = self._back[rows.device] = torch.tensor(back, device=rows.device)
        return order_rows(rows.split_with_sizes(self.rows), index)

    def by_rank(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """What `travelling` gave, [rows, H], as right-hand sides [S, H, C] of each chunk."""
        size, width, start, found = self.layout.sp_size, rows.shape[1], 0, []
        for count in self.columns:  # one view each
            found.append(rows.as_strided((size, width, count), (count * width, 1, width), start * width))
            start += size * count
        return found

    def apart(self, rows: torch.Tensor) -> list[Sequence[torch.Tensor]]:
        """What `travelling` gave as right-hand sides [H, C] (of biases: [C]) of each chunk's ranks, in few views."""
        size = self.layout.sp_size
        parts = rows.mT if rows.dim() == 2 else rows
        found = parts.split_with_sizes(self._parts, -1)
        return [found[first : first + size] for first in range(0, len(found), size)]

    def results_by_rank(self, weight_HN: torch.Tensor) -> Sequence[torch.Tensor]:
        """o_proj's columns as right-hand sides [S, H, E] of each chunk, as views."""
        by_rank = weight_HN.view(weight_HN.shape[0], self.layout.sp_size, -1).transpose(0, 1)
        return by_rank.split_with_sizes(self.results, 2) if len(self.results) > 1 else (by_rank,)

    def results_apart(self, weight_HN: torch.Tensor) -> list[Sequence[torch.Tensor]]:
        """o_proj's columns as right-hand sides [H, E] of each chunk's ranks, as views."""
        count = len(self.chunks)
        found = weight_HN.split_with_sizes(self.results * self.layout.sp_size, 1)
        return [found[index::count] for index in range(count)]

    def new_packed(self, like: torch.Tensor, complete: bool) -> torch.Tensor:
        """Room for the gradients of all heads, [M, N]; zeros unless every chunk will be packed."""
        new = like.new_empty if complete else like.new_zeros
        return new(like.shape[1], sum(self.rows))

    def pack_gradient(
        self,
        index: int,
        grad_SMC: torch.Tensor,
        packed_MN: torch.Tensor,
        rank: int = 0,
        part_MC: torch.Tensor | None = None,
    ) -> None:
        """Write a chunk's gradients by rank to their places: see `fluid_hf.attention.head_layouts.pack_gradient`."""
        pack_gradient(self.layout, self.chunks[index], grad_SMC, packed_MN, rank, part_MC)

    def split(self, rows_N: torch.Tensor) -> dict[str, torch.Tensor]:
        """What [N, ...] has of q, k and v."""
        return dict(zip(NAMES, rows_N.split_with_sizes(self.rows), strict=True))

    def _travel_order(self) -> list[int]:
        """Rows of q, k and v, one after the other, in the order of `travelling`."""
        found: list[int] = []
        q_rows, kv_rows = self.rows[:2]
        for chunk in self.chunks:
            for rank in range(self.layout.sp_size):
                heads = [rank * self.layout.local_q + place for place in range(*chunk.q)]
                kv = self.layout.kv_heads[rank][slice(*chunk.kv)]
                starts = [head * self.head_dim for head in heads]
                starts += [first + head * self.head_dim for first in (q_rows, q_rows + kv_rows) for head in kv]
                found += [row for start in starts for row in range(start, start + self.head_dim)]
        return found
