"""Triton kernels at both ends of the wire: rows to send, and collecting returned routing-weight gradients.

Legend: T tokens, R rows, K experts per token, H hidden, P ranks. Rows are written token by token: a token's row is read
once, however many ranks it goes to, and the number of rows need not be known.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fluid_hf.launch import Kernel, blocks_of, power_of_two
from fluid_hf.moe.row_kernels import tile
from fluid_hf.moe.rows import RowFormat

__all__ = ["gather_weight_grads", "pack_rows", "spread_rows"]


def pack_rows(
    hidden_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    index_TK: torch.Tensor,
    token_row_TP: torch.Tensor,
    most: int,
    places: int,
    form: RowFormat,
    num_local_experts: int,
) -> torch.Tensor:
    """The rows to send, as `RowFormat` lays them out: uint8 [places, stride], of which the first R are written.

    Args:
        token_row_TP: row of each (token, destination); `most` or more where there is none.
        places: rows of the buffer, at least `most`.
    """
    buffer = form.new_rows(places, hidden_TH.device)
    if hidden_TH.shape[0] == 0 or most == 0:
        return buffer
    columns, _, warps = tile(form.hidden, 0)
    sizes = (token_row_TP.shape[1], form.hidden, num_local_experts, form.top_k, power_of_two(form.top_k))
    _pack(
        (hidden_TH.shape[0], blocks_of(form.hidden, columns), 1),
        (hidden_TH, weights_TK, index_TK, token_row_TP, *form.whole_of(buffer)),
        (most,),
        (hidden_TH.stride(0), *form.places, *sizes, columns),
        warps,
    )
    return buffer


def spread_rows(source_TH: torch.Tensor, token_row_TP: torch.Tensor, rows: int) -> torch.Tensor:
    """Each token's row at all its destinations: [R, H]."""
    hidden = source_TH.shape[1]
    out = torch.empty(rows, hidden, dtype=source_TH.dtype, device=source_TH.device)
    if rows:
        columns, _, warps = tile(hidden, 0)
        _spread(
            (source_TH.shape[0], blocks_of(hidden, columns), 1),
            (source_TH, token_row_TP, out),
            (rows,),
            (source_TH.stride(0), token_row_TP.shape[1], hidden, columns),
            warps,
        )
    return out


def gather_weight_grads(
    own_TK: torch.Tensor | None,
    rows_RK: torch.Tensor,
    token_row_TP: torch.Tensor,
    index_TK: torch.Tensor,
    num_local_experts: int,
    own_rank: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Routing-weight gradients [T, K]: from the own part, or from the row that the expert's rank returned."""
    tokens, top_k = index_TK.shape
    out = torch.empty(tokens, top_k, dtype=dtype, device=index_TK.device)
    if tokens:
        own_rank = own_rank if own_TK is not None else -1
        _gather_weight_grads(
            (blocks_of(tokens * top_k, 256), 1, 1),
            (own_TK if own_TK is not None else rows_RK, rows_RK, token_row_TP, index_TK, out),
            (tokens * top_k,),
            (rows_RK.stride(0), token_row_TP.shape[1], num_local_experts, own_rank, top_k, 256),
        )
    return out


@triton.jit(do_not_specialize=["most"])
def _pack_kernel(
    hidden_in,
    weights_in,
    index,
    token_row,
    hidden_out,
    ids_out,
    weights_out,
    most,
    in_stride: tl.constexpr,
    hidden_stride: tl.constexpr,
    ids_stride: tl.constexpr,
    weights_stride: tl.constexpr,
    ids_at: tl.constexpr,
    weights_at: tl.constexpr,
    ranks: tl.constexpr,
    hidden: tl.constexpr,
    num_local: tl.constexpr,
    top_k: tl.constexpr,
    PADDED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    value = tl.load(hidden_in + token * in_stride + at, mask=at < hidden)
    k = tl.arange(0, PADDED)
    used = (k < top_k) & (tl.program_id(1) == 0)
    expert = tl.load(index + token * top_k + k, mask=used, other=-1).to(tl.int32)
    weight = tl.load(weights_in + token * top_k + k, mask=used, other=0.0).to(weights_out.dtype.element_ty)
    owner = tl.where(expert >= 0, expert // num_local, -1)
    for rank in range(ranks):
        row = tl.load(token_row + token * ranks + rank).to(tl.int64)
        goes = row < most
        tl.store(hidden_out + row * hidden_stride + at, value, mask=(at < hidden) & goes)
        local = tl.where(owner == rank, expert - rank * num_local, -1).to(tl.int16)
        tl.store(ids_out + row * ids_stride + ids_at + k, local, mask=used & goes)
        tl.store(weights_out + row * weights_stride + weights_at + k, weight, mask=used & goes)


@triton.jit(do_not_specialize=["rows"])
def _spread_kernel(
    source,
    token_row,
    out,
    rows,
    stride: tl.constexpr,
    ranks: tl.constexpr,
    hidden: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    value = tl.load(source + token * stride + at, mask=at < hidden)
    for rank in range(ranks):
        row = tl.load(token_row + token * ranks + rank).to(tl.int64)
        tl.store(out + row * hidden + at, value, mask=(at < hidden) & (row < rows))


@triton.jit(do_not_specialize=["slots"])
def _gather_weight_grads_kernel(
    own,
    rows,
    token_row,
    index,
    out,
    slots,
    row_stride: tl.constexpr,
    ranks: tl.constexpr,
    num_local: tl.constexpr,
    own_rank: tl.constexpr,
    top_k: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < slots
    token = slot // top_k
    owner = tl.load(index + slot, mask=inside, other=0).to(tl.int32) // num_local
    is_own = owner == own_rank
    row = tl.load(token_row + token.to(tl.int64) * ranks + owner, mask=inside & ~is_own, other=0).to(tl.int64)
    sent = tl.load(rows + row * row_stride + slot % top_k, mask=inside & ~is_own, other=0.0)
    kept = tl.load(own + slot, mask=inside & is_own, other=0.0)
    tl.store(out + slot, tl.where(is_own, kept, sent).to(out.dtype.element_ty), mask=inside)


_pack = Kernel(_pack_kernel)
_spread = Kernel(_spread_kernel)
_gather_weight_grads = Kernel(_gather_weight_grads_kernel)
