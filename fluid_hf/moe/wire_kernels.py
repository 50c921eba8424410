"""Triton kernels at both ends of the wire: packing rows, and collecting returned routing-weight gradients.

Legend: T tokens, R rows, K experts per token, H hidden, P ranks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fluid_hf.moe.row_kernels import block_size, num_warps
from fluid_hf.moe.rows import RowFormat

__all__ = ["gather_weight_grads", "pack_rows"]


def pack_rows(
    hidden_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    index_TK: torch.Tensor,
    row_token: torch.Tensor,
    row_rank: torch.Tensor,
    rows: int,
    form: RowFormat,
    num_local_experts: int,
) -> torch.Tensor:
    """The rows to send, as `RowFormat` lays them out: uint8 [R, stride]."""
    buffer = form.new_rows(rows, hidden_TH.device)
    if rows == 0:
        return buffer
    hidden, ids, weights = form.hidden_of(buffer), form.ids_of(buffer), form.weights_of(buffer)
    block, top_k = block_size(form.hidden), form.top_k
    padded = triton.next_power_of_2(top_k)
    _pack[(rows, triton.cdiv(form.hidden, block))](
        hidden_TH,
        hidden_TH.stride(0),
        weights_TK,
        index_TK,
        row_token,
        row_rank,
        hidden,
        ids,
        weights,
        hidden.stride(0),
        ids.stride(0),
        weights.stride(0),
        form.hidden,
        num_local_experts,
        top_k,
        PADDED=padded,
        BLOCK=block,
        num_warps=num_warps(block),
    )
    return buffer


def gather_weight_grads(
    own_TK: torch.Tensor | None,
    rows_RK: torch.Tensor,
    token_row_TP: torch.Tensor,
    index_TK: torch.Tensor,
    num_local_experts: int,
    own_rank: int,
) -> torch.Tensor:
    """Routing-weight gradients [T, K] float32: from the own part, or from the row that the expert's rank returned."""
    tokens, top_k = index_TK.shape
    out = torch.empty(tokens, top_k, dtype=torch.float32, device=index_TK.device)
    if tokens:
        _gather_weight_grads[(triton.cdiv(tokens * top_k, 256),)](
            own_TK if own_TK is not None else out,
            rows_RK,
            rows_RK.stride(0),
            token_row_TP,
            token_row_TP.shape[1],
            index_TK,
            num_local_experts,
            own_rank if own_TK is not None else -1,
            out,
            tokens * top_k,
            top_k,
            BLOCK=256,
        )
    return out


@triton.jit
def _pack(
    hidden_in,
    hidden_in_stride: tl.constexpr,
    weights_in,
    index,
    row_token,
    row_rank,
    hidden_out,
    ids_out,
    weights_out,
    hidden_stride: tl.constexpr,
    ids_stride: tl.constexpr,
    weights_stride: tl.constexpr,
    hidden: tl.constexpr,
    num_local: tl.constexpr,
    top_k: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(row_token + row).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < hidden
    value = tl.load(hidden_in + token * hidden_in_stride + at, mask=inside)
    tl.store(hidden_out + row * hidden_stride + at, value, mask=inside)
    if tl.program_id(1) == 0:
        k = tl.arange(0, PADDED)
        used = k < top_k
        rank = tl.load(row_rank + row)
        expert = tl.load(index + token * top_k + k, mask=used, other=-1).to(tl.int32)
        here = (expert >= 0) & (expert // num_local == rank)
        tl.store(ids_out + row * ids_stride + k, tl.where(here, expert % num_local, -1).to(tl.int16), mask=used)
        weight = tl.load(weights_in + token * top_k + k, mask=used, other=0.0).to(tl.float32)
        tl.store(weights_out + row * weights_stride + k, weight, mask=used)


@triton.jit
def _gather_weight_grads(
    own,
    rows,
    row_stride: tl.constexpr,
    token_row,
    ranks: tl.constexpr,
    index,
    num_local: tl.constexpr,
    own_rank,
    out,
    slots,
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
    tl.store(out + slot, tl.where(is_own, kept, sent), mask=inside)
