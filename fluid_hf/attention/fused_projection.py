"""Query, key and value projections of a chunk of heads for all destinations, as one matrix.

Legend: S ranks, K chunks, C columns that one rank gets of a chunk (its query, key and value heads, D each), H hidden,
M tokens of this rank, N columns of all gradients: those of q, k and v one after the other, as the weights have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fluid_hf.attention.head_layouts import pack_gradient
from fluid_hf.attention.heads import HeadLayout

__all__ = ["HeadPlan", "Projections"]

NAMES = ("q", "k", "v")


@dataclass(frozen=True)
class Projections:
    """Weights [out, in] and biases [out] (or `None`) of q, k, v and o, as they are now."""

    weights: Mapping[str, torch.Tensor]
    biases: Mapping[str, torch.Tensor | None]

    def to(self, dtype: torch.dtype) -> Projections:
        """The same in another type. To be called without gradients only: the weights are not detached."""
        if self.weights["q"].dtype == dtype:
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
    """

    def __init__(self, layout: HeadLayout, head_dim: int, wanted: int) -> None:
        self.layout, self.head_dim = layout, head_dim
        self.chunks = layout.chunks(wanted)
        kv_rows = layout.num_kv_heads * head_dim
        self.rows = (layout.num_heads * head_dim, kv_rows, kv_rows)
        self._replicas: dict[torch.device, torch.Tensor] = {}

    def by_rank(self, projections: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Weights [out, H] (or biases [out]) of q, k and v as [S, C, H] (or [S, C]) of each chunk."""
        size, count = self.layout.sp_size, len(self.chunks)
        tail = projections["q"].shape[1:]
        queries = projections["q"].reshape(size, count, -1, *tail).unbind(1)
        spread = count if self.layout.local_kv > 1 else 1  # one key/value head travels with the first chunk
        k, v = (self._replicated(projections[name]).view(size, spread, -1, *tail).unbind(1) for name in ("k", "v"))
        return [torch.cat([q, k[index], v[index]], dim=1) if index < spread else q for index, q in enumerate(queries)]

    def new_packed(self, like: torch.Tensor, complete: bool) -> torch.Tensor:
        """Room for the gradients of all heads, [M, N]; zeros unless every chunk will be packed."""
        new = like.new_empty if complete else like.new_zeros
        return new(like.shape[1], sum(self.rows))

    def pack_gradient(
        self,
        index: int,
        grad_SMC: torch.Tensor,
        packed_MN: torch.Tensor,
        own_rank: int = 0,
        own_MC: torch.Tensor | None = None,
    ) -> None:
        """Write a chunk's gradients by rank to their places: see `fluid_hf.attention.head_layouts.pack_gradient`."""
        pack_gradient(self.layout, self.chunks[index], grad_SMC, packed_MN, own_rank, own_MC)

    def split(self, rows_N: torch.Tensor) -> dict[str, torch.Tensor]:
        """What [N, ...] has of q, k and v."""
        return dict(zip(NAMES, rows_N.split(self.rows), strict=True))

    def _replicated(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the key or value heads in the order in which they travel."""
        if not self.layout.replicated:
            return rows
        index = self._replicas.get(rows.device)
        if index is None:  # copied to the device once
            index = self._replicas[rows.device] = torch.tensor(self.layout.kv_index(), device=rows.device)
        return rows.reshape(self.layout.num_kv_heads, -1).index_select(0, index)
