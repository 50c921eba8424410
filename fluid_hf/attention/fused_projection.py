"""Query, key and value projections of one chunk of heads for all destinations, as one matrix.

Legend: S ranks, C columns that one rank gets (its query, key and value heads of the chunk, D each), H hidden,
M tokens of this rank, K columns after the gradients of replicated key/value heads were summed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fluid_hf.attention.heads import HeadChunk, HeadLayout

__all__ = ["FusedChunk", "Projections"]


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


class FusedChunk:
    """How the rows of the q, k and v weights belong to one chunk.

    Args:
        layout: heads over ranks.
        chunk: the chunk's heads.
        head_dim: D.
    """

    def __init__(self, layout: HeadLayout, chunk: HeadChunk, head_dim: int) -> None:
        self.layout, self.chunk, self.head_dim = layout, chunk, head_dim
        self.heads = chunk.num_q + 2 * chunk.num_kv
        self.columns = self.heads * head_dim
        self.sums = layout.replicated and chunk.num_kv > 0

    def by_rank(self, projections: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Weights (or biases as [out, 1]) of the chunk: [S, C, H]."""
        layout, chunk = self.layout, self.chunk
        parts = [self._view(projections["q"], layout.local_q, chunk.q)]
        if chunk.num_kv:
            for name in ("k", "v"):
                heads = projections[name].unflatten(0, (layout.num_kv_heads, self.head_dim))
                if layout.replicated:
                    heads = torch.cat([heads[head : head + 1] for head in layout.kv_index()])
                parts.append(self._view(heads.flatten(0, 1), layout.local_kv, chunk.kv))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def pack_gradient(self, grad_SMC: torch.Tensor) -> torch.Tensor:
        """Gradients by rank to [M, K], those of replicas of a key/value head summed."""
        if not self.sums:
            return grad_SMC.transpose(0, 1).flatten(1)
        width = self.head_dim * self.chunk.num_q
        parts = [grad_SMC[..., :width].transpose(0, 1).flatten(1)]
        for grad in grad_SMC[..., width:].chunk(2, dim=2):
            parts.append(self._sum_replicas(grad.transpose(0, 1).unflatten(2, (-1, self.head_dim)).flatten(1, 2)))
        return torch.cat(parts, dim=1)

    def flat(self, projections: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Weights in the order of `pack_gradient`: [K, H]."""
        if not self.sums:
            return self.by_rank(projections).flatten(0, 1)
        q = self._view(projections["q"], self.layout.local_q, self.chunk.q).flatten(0, 1)
        return torch.cat([q, projections["k"], projections["v"]])

    def unpack(self, fused_KH: torch.Tensor, into: Mapping[str, torch.Tensor]) -> None:
        """Write gradients in the order of `pack_gradient` to their places in those of q, k and v (if wanted)."""
        layout, chunk = self.layout, self.chunk
        q_rows, kv_rows = chunk.num_q * self.head_dim, chunk.num_kv * self.head_dim
        if self.sums:
            rows = [layout.sp_size * q_rows, *([layout.num_kv_heads * self.head_dim] * 2)]
            q, k, v = fused_KH.split(rows)
            q = q.unflatten(0, (layout.sp_size, q_rows))
        else:
            q, k, v = fused_KH.unflatten(0, (layout.sp_size, -1)).split([q_rows, kv_rows, kv_rows], dim=1)
        if "q" in into:
            self._view(into["q"], layout.local_q, chunk.q).copy_(q)
        for name, part in (("k", k), ("v", v)):
            if name in into and chunk.num_kv:
                target = into[name] if self.sums else self._view(into[name], layout.local_kv, chunk.kv)
                target.copy_(part)

    def _view(self, rows: torch.Tensor, local: int, heads: tuple[int, int]) -> torch.Tensor:
        """Rows of some heads of every rank: [S, heads * D, H]."""
        if heads == (0, local):
            return rows.unflatten(0, (self.layout.sp_size, -1))
        by_rank = rows.unflatten(0, (self.layout.sp_size, local * self.head_dim))
        return by_rank[:, heads[0] * self.head_dim : heads[1] * self.head_dim]

    def _sum_replicas(self, grad_MND: torch.Tensor) -> torch.Tensor:
        kv_heads, replicas = self.layout.num_kv_heads, self.layout.kv_index()
        times = len(replicas) // kv_heads
        if replicas == [head for head in range(kv_heads) for _ in range(times)]:
            return grad_MND.unflatten(1, (kv_heads, times)).sum(2).flatten(1)
        total = grad_MND.new_zeros(grad_MND.shape[0], kv_heads, self.head_dim, dtype=torch.float32)
        for place, head in enumerate(replicas):  # in a fixed order: no atomics
            total[:, head] += grad_MND[:, place]
        return total.to(grad_MND.dtype).flatten(1)


ReadProjections = Callable[[], Projections]
