"""Triton kernels between the wire and the core of sequence-parallel attention: one launch each.

They give what the plain code of `fluid_hf.attention.head_layouts` gives, computed in float32 and rounded once.
Legend: S ranks, B sequences, L tokens of each on a rank, M = B * L, T = S * L, n heads, D head size, C columns on the
wire, N columns of the gradients of all heads. A program treats ROWS tokens of one head, in two halves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fluid_hf.attention.head_layouts import HeadNorms, NormSums
from fluid_hf.attention.heads import HeadChunk, HeadLayout, heads_at, wide_steps
from fluid_hf.attention.rotary import RotaryTables
from fluid_hf.launch import Kernel, blocks_of, power_of_two

__all__ = ["heads_from_wire", "heads_to_wire", "num_blocks", "order_rows", "pack_gradient"]

ROWS = 32
ROW_BLOCK = 2048  # elements of a row that are copied at a time


def heads_from_wire(
    received_SMC: torch.Tensor, batch: int, chunk: HeadChunk, tables: RotaryTables, norms: HeadNorms | None
) -> tuple[torch.Tensor, ...]:
    """See `fluid_hf.attention.head_layouts.heads_from_wire`."""
    size, rows, columns = received_SMC.shape
    heads, rotated = chunk.num_q + 2 * chunk.num_kv, chunk.num_q + chunk.num_kv
    dim, tokens = columns // heads, size * rows // batch
    in_place = batch == 1 and norms is None
    target = received_SMC if in_place else torch.empty_like(received_SMC)
    q_weight, k_weight, eps = _norms(norms, received_SMC)
    _from_wire(
        (blocks_of(size * rows, ROWS), rotated if in_place else heads, 1),
        (received_SMC, target, tables.cos, tables.sin_low, q_weight, k_weight),
        (size * rows, batch, rows // batch, _table_step(tables, tokens)),
        (chunk.num_q, chunk.num_kv, dim, power_of_two(dim // 2), norms is not None, eps, ROWS),
    )
    places = heads_at(batch, tokens, columns, dim, chunk.num_q, chunk.num_kv)
    return tuple([target.as_strided(*place) for place in places])


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
    """See `fluid_hf.attention.head_layouts.heads_to_wire`."""
    size, rows, columns = sent_SMC.shape
    heads = chunk.num_q + 2 * chunk.num_kv
    dim, tokens = columns // heads, size * rows // batch
    q, k, v = grads if chunk.num_kv else grads * 3
    unit, steps = wide_steps(dim, q.stride(), k.stride(), v.stride())
    if not unit:
        q, k, v = (grad if grad.stride(3) == 1 else grad.contiguous() for grad in (q, k, v))
        unit, steps = wide_steps(dim, q.stride(), k.stride(), v.stride())
    q_weight, k_weight, eps = _norms(norms, sent_SMC)
    starts = (0, 0) if sums is None else sums.starts(chunk)
    _to_wire(
        (num_blocks(sent_SMC), heads, 1),
        (
            *(q, k, v, sent_SMC, sent_SMC if raw_SMC is None else raw_SMC),
            *(tables.cos, tables.sin_low, q_weight, k_weight, sent_SMC if sums is None else sums.rows),
        ),
        (
            *(size * rows, batch, rows // batch, _table_step(tables, tokens)),
            *steps,
            *starts,
        ),
        (chunk.num_q, chunk.num_kv, dim, power_of_two(dim // 2), norms is not None, eps, unit, ROWS),
    )


def num_blocks(wire_SMC: torch.Tensor) -> int:
    """Programs that share the rows of one head on the wire."""
    return blocks_of(wire_SMC.shape[0] * wire_SMC.shape[1], ROWS)


def pack_gradient(
    layout: HeadLayout,
    chunk: HeadChunk,
    grad_SMC: torch.Tensor,
    packed_MN: torch.Tensor,
    rank: int,
    part_MC: torch.Tensor | None,
) -> None:
    """See `fluid_hf.attention.head_layouts.pack_gradient`; replicas of a key/value head must be consecutive."""
    size, rows, columns = grad_SMC.shape
    dim = columns // (chunk.num_q + 2 * chunk.num_kv)
    replicas = size * layout.local_kv // layout.num_kv_heads
    kv_heads = size * chunk.num_kv // replicas
    _pack(
        (blocks_of(rows, ROWS), size * chunk.num_q + 2 * kv_heads, 1),
        (grad_SMC, grad_SMC if part_MC is None else part_MC, packed_MN),
        (rows, rank if part_MC is not None else -1),
        (
            *(size, chunk.num_q, chunk.num_kv, chunk.q[0], chunk.kv[0], layout.local_q, layout.local_kv),
            *(layout.num_heads, layout.num_kv_heads, replicas, dim, power_of_two(dim), ROWS),
        ),
    )


def order_rows(tensors: Sequence[torch.Tensor], index: torch.Tensor) -> torch.Tensor:
    """See `fluid_hf.attention.head_layouts.order_rows`; contiguous matrices."""
    first, second, third = tensors
    count, width = index.shape[0], first.shape[1]
    ordered = first.new_empty(count, width)
    _order(
        (count, 1, 1),
        (first, second, third, index, ordered),
        (first.shape[0], second.shape[0]),
        (width, min(power_of_two(width), ROW_BLOCK)),
    )
    return ordered


def _norms(norms: HeadNorms | None, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    return (like, like, 0.0) if norms is None else (norms.q, norms.k, norms.eps)


def _table_step(tables: RotaryTables, tokens: int) -> int:
    """Rows from one sequence's table to the next one's: none where all share one."""
    return tokens if tables.cos.shape[0] > 1 else 0


@triton.jit
def _place(rows, count, batch, length, table_step):
    """Of rows on the wire [S, B, L]: sequence, place in it, row of the tables."""
    of_batch = batch * length
    sequence = (rows % of_batch) // length
    token = rows // of_batch * length + rows % length
    return sequence, token, sequence * table_step + token


@triton.jit
def _halves(start, half: tl.constexpr, mask):
    """Both halves of heads in float32."""
    low = tl.load(start, mask=mask, other=0.0).to(tl.float32)
    return low, tl.load(start + half, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_halves(start, low, high, half: tl.constexpr, mask):
    tl.store(start, low.to(start.dtype.element_ty), mask=mask)
    tl.store(start + half, high.to(start.dtype.element_ty), mask=mask)


@triton.jit
def _weight(q_weight, k_weight, is_k, at, half: tl.constexpr):
    weight = q_weight
    if is_k:
        weight = k_weight
    low, high = _halves(weight + at, half, at < half)
    return low[None, :], high[None, :]


@triton.jit
def _scale(low, high, dim: tl.constexpr, eps: tl.constexpr):
    """What RMSNorm multiplies each head by."""
    return tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / dim + eps)[:, None]


@triton.jit
def _norm_back(low, high, x_low, x_high, weight_low, weight_high, sums, mask, dim: tl.constexpr, eps: tl.constexpr):
    """The gradient of heads from that of normed ones; the weight's gradient of these rows goes to `sums`."""
    scale = _scale(x_low, x_high, dim, eps)
    x_low, x_high = x_low * scale, x_high * scale
    _store_halves(sums, tl.sum(low * x_low, 0), tl.sum(high * x_high, 0), dim // 2, mask)
    low, high = low * weight_low, high * weight_high
    mean = ((tl.sum(low * x_low, 1) + tl.sum(high * x_high, 1)) / dim)[:, None]
    return scale * (low - x_low * mean), scale * (high - x_high * mean)


@triton.jit(do_not_specialize=["count", "batch", "length", "table_step"])
def _from_wire_kernel(
    source,
    target,
    cos,
    sin,
    q_weight,
    k_weight,
    count,
    batch,
    length,
    table_step,
    num_q: tl.constexpr,
    num_kv: tl.constexpr,
    dim: tl.constexpr,
    HALF: tl.constexpr,
    NORMED: tl.constexpr,
    eps: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head, half, at = tl.program_id(1), dim // 2, tl.arange(0, HALF)
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns: tl.constexpr = (num_q + 2 * num_kv) * dim
    mask = (rows < count)[:, None] & (at < half)[None, :]
    low, high = _halves(source + rows[:, None] * columns + head * dim + at[None, :], half, mask)
    sequence, token, table = _place(rows, count, batch, length, table_step)
    if head < num_q + num_kv:
        if NORMED:
            scale = _scale(low, high, dim, eps)
            weight_low, weight_high = _weight(q_weight, k_weight, head >= num_q, at, half)
            low, high = low * scale * weight_low, high * scale * weight_high
        angle = table[:, None] * dim + at[None, :]
        cos_low, cos_high = _halves(cos + angle, half, mask)
        sin_low, sin_high = _halves(sin + angle, half, mask)
        low, high = low * cos_low - high * sin_low, high * cos_high + low * sin_high
    place = sequence * (tl.cdiv(count, batch)) + token
    _store_halves(target + place[:, None] * columns + head * dim + at[None, :], low, high, half, mask)


@triton.jit
def _line(q_start, k_start, head, num_q: tl.constexpr, num_kv: tl.constexpr):
    """Row of the norms' sums that this program writes."""
    line = q_start + tl.program_id(0) * num_q + head
    if head >= num_q:
        line = k_start + tl.program_id(0) * num_kv + head - num_q
    return line.to(tl.int64)


@triton.jit(
    do_not_specialize=[
        *("count", "batch", "length", "table_step"),
        *("q_batch", "q_head", "q_token", "k_batch", "k_head", "k_token", "v_batch", "v_head", "v_token"),
        *("q_start", "k_start"),
    ]
)
def _to_wire_kernel(
    q,
    k,
    v,
    sent,
    raw,
    cos,
    sin,
    q_weight,
    k_weight,
    partial,
    count,
    batch,
    length,
    table_step,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    q_start,
    k_start,
    num_q: tl.constexpr,
    num_kv: tl.constexpr,
    dim: tl.constexpr,
    HALF: tl.constexpr,
    NORMED: tl.constexpr,
    eps: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head, half, at = tl.program_id(1), dim // 2, tl.arange(0, HALF)
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns: tl.constexpr = (num_q + 2 * num_kv) * dim
    mask = (rows < count)[:, None] & (at < half)[None, :]
    sequence, token, table = _place(rows, count, batch, length, table_step)
    if head < num_q:
        start = q + (sequence * q_batch + token * q_token + head.to(tl.int64) * q_head) * UNIT
    elif head < num_q + num_kv:
        start = k + (sequence * k_batch + token * k_token + (head - num_q).to(tl.int64) * k_head) * UNIT
    else:
        start = v + (sequence * v_batch + token * v_token + (head - num_q - num_kv).to(tl.int64) * v_head) * UNIT
    low, high = _halves(start[:, None] + at[None, :], half, mask)
    end = rows[:, None] * columns + head * dim + at[None, :]
    if head < num_q + num_kv:
        angle = table[:, None] * dim + at[None, :]
        cos_low, cos_high = _halves(cos + angle, half, mask)
        sin_low, sin_high = _halves(sin + angle, half, mask)
        low, high = low * cos_low + high * sin_high, high * cos_high - low * sin_low
        if NORMED:
            sums = partial + _line(q_start, k_start, head, num_q, num_kv) * dim + at
            x_low, x_high = _halves(raw + end, half, mask)
            weight_low, weight_high = _weight(q_weight, k_weight, head >= num_q, at, half)
            low, high = _norm_back(low, high, x_low, x_high, weight_low, weight_high, sums, at < half, dim, eps)
    _store_halves(sent + end, low, high, half, mask)


@triton.jit(do_not_specialize=["rows", "part_rank"])
def _pack_kernel(
    grads,
    part,
    packed,
    rows,
    part_rank,
    size: tl.constexpr,
    num_q: tl.constexpr,
    num_kv: tl.constexpr,
    first_q: tl.constexpr,
    first_kv: tl.constexpr,
    local_q: tl.constexpr,
    local_kv: tl.constexpr,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    replicas: tl.constexpr,
    dim: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(1)
    at = tl.arange(0, COLUMNS)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (at < dim)[None, :]
    columns: tl.constexpr = (num_q + 2 * num_kv) * dim
    kv_heads: tl.constexpr = size * num_kv // replicas
    # Where the head's gradients are (rank, place among the rank's heads), and where they belong.
    rank = head // num_q
    place = head % num_q
    target = rank * local_q + first_q + place
    if num_kv > 0:
        if head >= size * num_q:
            kv = (head - size * num_q) % kv_heads
            is_v = (head - size * num_q) // kv_heads
            rank = kv * replicas // num_kv
            place = num_q + is_v * num_kv + kv % num_kv
            target = num_heads + is_v * num_kv_heads + kv
            if replicas == 1:
                target = num_heads + is_v * num_kv_heads + rank * local_kv + first_kv + kv % num_kv
    at_source = row[:, None] * columns + place * dim + at[None, :]
    total = tl.zeros((BLOCK, COLUMNS), dtype=tl.float32)
    for replica in tl.static_range(replicas):
        if (replica == 0) | (head >= size * num_q):
            source = grads + (rank + replica).to(tl.int64) * rows * columns
            if rank + replica == part_rank:
                source = part
            total += tl.load(source + at_source, mask=mask, other=0.0).to(tl.float32)
    whole: tl.constexpr = (num_heads + 2 * num_kv_heads) * dim
    at_target = row[:, None] * whole + target * dim + at[None, :]
    tl.store(packed + at_target, total.to(packed.dtype.element_ty), mask=mask)


@triton.jit
def _copy_row(source, target, width: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    for start in range(0, width, BLOCK):
        mask = start + at < width
        tl.store(target + start + at, tl.load(source + start + at, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["of_first", "of_second"])
def _order_kernel(first, second, third, index, ordered, of_first, of_second, width: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.load(index + tl.program_id(0))
    target = ordered + tl.program_id(0).to(tl.int64) * width
    # Each branch has a pointer of its own: of one that is chosen, Triton would not know that it is aligned.
    if row < of_first:
        _copy_row(first + row * width, target, width, BLOCK)
    elif row < of_first + of_second:
        _copy_row(second + (row - of_first) * width, target, width, BLOCK)
    else:
        _copy_row(third + (row - of_first - of_second) * width, target, width, BLOCK)


_from_wire = Kernel(_from_wire_kernel)
_to_wire = Kernel(_to_wire_kernel)
_pack = Kernel(_pack_kernel)
_order = Kernel(_order_kernel)
