"""Heads between the wire and the core: norm and rotary embedding in one pass over what arrived, and their gradients.

The rotary embedding is the half-split form of transformers' Llama-like models (Su et al., 2021),
`x * cos + rotate_half(x) * sin`; the norm is RMSNorm (Zhang and Sennrich, 2019) along the head. Triton kernels serve
GPUs (`fluid_hf.attention.head_kernels`); the code here serves the rest, and says what they must give.

Legend: S ranks, B sequences, L tokens of each on a rank, M = B * L, T = S * L, n heads, D head size, C columns on the
wire: a chunk's query, key and value heads, N columns of the gradients of all heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fluid_hf.attention.heads import HeadChunk, HeadLayout
from fluid_hf.attention.rotary import RotaryTables, rotate, rotate_back
from fluid_hf.kernels import use_kernels

__all__ = ["HeadNorms", "NormSums", "heads_from_wire", "heads_to_wire", "order_rows", "pack_gradient"]


class HeadNorms(NamedTuple):
    """RMSNorm of queries and of keys.

    Attributes:
        q, k: weights [D].
        eps: added to the mean of squares.
    """

    q: torch.Tensor
    k: torch.Tensor
    eps: float


class NormSums:
    """Sums that make up the gradients of the norms' weights, of all chunks of a call; added up once.

    Args:
        layout: heads over ranks.
        like_SMC: gradients of a chunk's heads on the wire.
        dim: D.

    Attributes:
        rows: float32, one row for each block of rows on the wire and each head: [P * n, D], queries first.
    """

    def __init__(self, layout: HeadLayout, like_SMC: torch.Tensor, dim: int) -> None:
        self.blocks = 1
        if use_kernels(like_SMC):
            from fluid_hf.attention import head_kernels

            self.blocks = head_kernels.num_blocks(like_SMC)
        self._sizes = [self.blocks * layout.local_q, self.blocks * layout.local_kv]
        self.rows = like_SMC.new_empty(sum(self._sizes), dim, dtype=torch.float32)

    def starts(self, chunk: HeadChunk) -> tuple[int, int]:
        """First rows of a chunk's queries and of its keys; P for each of its heads follow."""
        return self.blocks * chunk.q[0], self._sizes[0] + self.blocks * chunk.kv[0]

    def total(self, norms: HeadNorms) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of the weights."""
        q, k = self.rows.split_with_sizes(self._sizes)
        return q.sum(0).to(norms.q.dtype), k.sum(0).to(norms.k.dtype)


def heads_from_wire(
    received_SMC: torch.Tensor, batch: int, chunk: HeadChunk, tables: RotaryTables, norms: HeadNorms | None
) -> tuple[torch.Tensor, ...]:
    """Queries, and keys and values if the chunk has any, as the core takes them: [B, n, T, D], normed and rotated.

    Without norms and with one sequence a kernel works in place: `received_SMC` then holds the heads.
    """
    if use_kernels(received_SMC):
        from fluid_hf.attention import head_kernels

        return head_kernels.heads_from_wire(received_SMC, batch, chunk, tables, norms)
    heads = _by_sequence(received_SMC, batch, chunk)
    num_q, num_k = chunk.num_q, chunk.num_q + chunk.num_kv
    q_k = heads[..., :num_k, :]
    if norms is not None:
        q_k = torch.cat(
            [_norm(q_k[..., :num_q, :], norms.q, norms.eps), _norm(q_k[..., num_q:, :], norms.k, norms.eps)], 3
        )
    q_k = rotate(q_k, tables).flatten(1, 2).transpose(1, 2)
    if not chunk.num_kv:
        return (q_k,)
    return q_k[:, :num_q], q_k[:, num_q:], heads[..., num_k:, :].flatten(1, 2).transpose(1, 2)


def heads_to_wire(
    grads: tuple[torch.Tensor, ...],
    batch: int,
    chunk: HeadChunk,
    tables: RotaryTables,
    norms: HeadNorms | None,
    raw_SMC: torch.Tensor | None,
    sent_SMC: torch.Tensor,
    sums: NormSums | None,
) -> None:
    """Gradients of what `heads_from_wire` gave, written to `sent_SMC`.

    Args:
        grads: [B, n, T, D] each.
        raw_SMC: what had arrived; needed with norms.
        sums: take what the gradients of the norms' weights have of this chunk; needed with norms.
    """
    if use_kernels(sent_SMC):
        from fluid_hf.attention import head_kernels

        head_kernels.heads_to_wire(grads, batch, chunk, tables, norms, raw_SMC, sent_SMC, sums)
        return
    heads = _by_sequence(sent_SMC, batch, chunk)
    ranks, num_q, num_k = heads.shape[1:3], chunk.num_q, chunk.num_q + chunk.num_kv
    q_k = heads[..., :num_k, :]
    grad = torch.cat(grads[:2], dim=1) if chunk.num_kv else grads[0]
    rotate_back(grad.transpose(1, 2).unflatten(1, ranks), tables, q_k)
    if chunk.num_kv:
        heads[..., num_k:, :].copy_(grads[2].transpose(1, 2).unflatten(1, ranks))
    if norms is None:
        return
    assert raw_SMC is not None and sums is not None
    raw = _by_sequence(raw_SMC, batch, chunk)
    parts = ((slice(0, num_q), norms.q), (slice(num_q, num_k), norms.k))
    for (part, weight), start in zip(parts, sums.starts(chunk), strict=True):
        of_heads = _norm_back(q_k[..., part, :], raw[..., part, :], weight, norms.eps)
        sums.rows[start : start + len(of_heads)] = of_heads


def order_rows(tensors: Sequence[torch.Tensor], index: torch.Tensor) -> torch.Tensor:
    """Rows of three matrices (or entries of vectors), one after the other, in the order of `index`."""
    if use_kernels(tensors[0]) and tensors[0].dim() == 2 and all([tensor.is_contiguous() for tensor in tensors]):
        from fluid_hf.attention import head_kernels

        return head_kernels.order_rows(tensors, index)
    return torch.cat(list(tensors)).index_select(0, index)


def pack_gradient(
    layout: HeadLayout,
    chunk: HeadChunk,
    grad_SMC: torch.Tensor,
    packed_MN: torch.Tensor,
    rank: int = 0,
    part_MC: torch.Tensor | None = None,
) -> None:
    """Write a chunk's gradients by rank to their columns, those of replicas of a key/value head summed.

    Args:
        rank, part_MC: what stands for one rank's part, which then need not be in `grad_SMC` (and may be put there).
    """
    if use_kernels(grad_SMC) and (layout.local_kv == 1 or not layout.replicated):
        from fluid_hf.attention import head_kernels

        head_kernels.pack_gradient(layout, chunk, grad_SMC, packed_MN, rank, part_MC)
        return
    if part_MC is not None:
        grad_SMC[rank].copy_(part_MC)
    size, tokens, columns = grad_SMC.shape
    head_dim = columns // (chunk.num_q + 2 * chunk.num_kv)
    heads = grad_SMC.view(size, tokens, -1, head_dim).transpose(0, 1)  # [M, S, heads, D]
    places = packed_MN.view(tokens, -1, head_dim)
    q, k, v = places.split([layout.num_heads, layout.num_kv_heads, layout.num_kv_heads], dim=1)
    q.unflatten(1, (size, -1))[:, :, slice(*chunk.q)].copy_(heads[:, :, : chunk.num_q])
    if not chunk.num_kv:
        return
    for place, grad in zip((k, v), heads[:, :, chunk.num_q :].chunk(2, dim=2), strict=True):
        if layout.replicated:
            place.copy_(_sum_replicas(layout, grad.flatten(1, 2)))
        else:
            place.unflatten(1, (size, -1))[:, :, slice(*chunk.kv)].copy_(grad)


def _by_sequence(wire_SMC: torch.Tensor, batch: int, chunk: HeadChunk) -> torch.Tensor:
    """The same memory as [B, S, L, heads, D]."""
    heads = chunk.num_q + 2 * chunk.num_kv
    return wire_SMC.view(wire_SMC.shape[0], batch, -1, heads, wire_SMC.shape[2] // heads).transpose(0, 1)


def _sum_replicas(layout: HeadLayout, grad_MnD: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(grad_MnD.dtype, torch.float32)
    total = grad_MnD.new_zeros(grad_MnD.shape[0], layout.num_kv_heads, grad_MnD.shape[2], dtype=dtype)
    for place, head in enumerate(layout.kv_index()):  # in a fixed order: no atomics
        total[:, head] += grad_MnD[:, place]
    return total


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def _norm_back(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Replace the gradient of normed heads by that of the heads; each head's part of the weight's gradient."""
    x = x.float()
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    unit, g = x * scale, grad.float()
    of_heads = (g * unit).flatten(0, -3).sum(0)
    g = g * weight.float()
    grad.copy_(scale * (g - unit * (g * unit).mean(-1, keepdim=True)))
    return of_heads
