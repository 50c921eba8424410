"""Triton kernels for the steps around the grouped GEMM: pack, expand, activation, and fixed-order gather-sums.

Legend: T tokens, R rows, K experts per token, S pairs, H hidden, I intermediate, P ranks. Memory-bound: each launch reads
its input once and writes its output once; sums run in float32 in a fixed order, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fluid_hf.moe.rows import RowFormat

__all__ = ["expand", "gather_weight_grads", "glu_backward", "glu_forward", "pack_rows", "reduce_pairs", "reduce_rows"]


def _block(size: int, largest: int = 2048) -> int:
    """The widest block that wastes at most an eighth of `size`, else the one that wastes least."""
    options = [block for block in (2048, 1024, 512, 256, 128) if block <= largest]
    waste = {block: (-size % block) / max(size, 1) for block in options}
    return next((block for block in options if waste[block] <= 0.125), min(options, key=lambda block: waste[block]))


def _warps(block: int) -> int:
    return 4 if block <= 1024 else 8


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
    block, top_k = _block(form.hidden), form.top_k
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
        num_warps=_warps(block),
    )
    return buffer


def expand(
    rows_RH: torch.Tensor,
    pair_row_S: torch.Tensor,
    out: torch.Tensor | None = None,
    place_S: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each row at its pairs: [S, H]; with `place_S`, pair s is written to `out[place_S[s]]`."""
    pairs, hidden = pair_row_S.shape[0], rows_RH.shape[1]
    if out is None:
        out = torch.empty(pairs, hidden, dtype=rows_RH.dtype, device=rows_RH.device)
    if pairs:
        block = _block(hidden)
        _expand[(pairs, triton.cdiv(hidden, block))](
            rows_RH,
            rows_RH.stride(0),
            pair_row_S,
            out,
            place_S if place_S is not None else pair_row_S,
            hidden,
            PLACED=place_S is not None,
            BLOCK=block,
            num_warps=_warps(block),
        )
    return out


def glu_forward(
    gate_SI: torch.Tensor, up_SI: torch.Tensor, weights_RK: torch.Tensor, pair_slot_S: torch.Tensor
) -> torch.Tensor:
    """`weight * silu(gate) * up` [S, I]; gate and up may be halves of one tensor."""
    pairs, inner = gate_SI.shape
    out = torch.empty(pairs, inner, dtype=gate_SI.dtype, device=gate_SI.device)
    if pairs:
        block = _block(inner, 1024)
        _glu_forward[(pairs, triton.cdiv(inner, block))](
            gate_SI,
            up_SI,
            gate_SI.stride(0),
            weights_RK,
            weights_RK.stride(0),
            weights_RK.shape[1],
            pair_slot_S,
            out,
            inner,
            BLOCK=block,
            num_warps=4,
        )
    return out


def glu_backward(
    grad_SI: torch.Tensor,
    gate_SI: torch.Tensor,
    up_SI: torch.Tensor,
    weights_RK: torch.Tensor,
    pair_slot_S: torch.Tensor,
    grad_weights_RK: torch.Tensor,
    grads: tuple[torch.Tensor, torch.Tensor],
    hidden: torch.Tensor,
    joint: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Backward of `glu_forward` in one launch.

    Args:
        grad_weights_RK: float32 view that receives the routing-weight gradients of the slots that have a pair.
        grads: receive the gradients of gate and up [S, I] (halves of one tensor, or two).
        hidden: [N, I] receives the forward output again; at `joint[2][s]` if `joint` is given.
        joint: gate and up gradients once more at place `joint[2][s]` (int32 [S]) of `joint[0]` and `joint[1]`.
    """
    pairs, inner = gate_SI.shape
    if not pairs:
        return
    block = _block(inner, 1024)
    second = joint if joint is not None else (*grads, pair_slot_S)
    _glu_backward[(pairs,)](
        grad_SI,
        gate_SI,
        up_SI,
        gate_SI.stride(0),
        weights_RK,
        weights_RK.stride(0),
        weights_RK.shape[1],
        pair_slot_S,
        grad_weights_RK,
        grad_weights_RK.stride(0),
        grads[0],
        grads[1],
        grads[0].stride(0),
        hidden,
        second[0],
        second[1],
        second[0].stride(0),
        second[2],
        inner,
        JOINT=joint is not None,
        BLOCK=block,
        num_warps=4,
    )


def reduce_pairs(pairs: list[torch.Tensor], row_pair_RK: torch.Tensor, out_RH: torch.Tensor) -> None:
    """Sum of each row's pairs, over one or two tensors [S, H], written to a view [R, H] of any row stride."""
    rows, hidden = out_RH.shape
    if rows:
        block = _block(hidden)
        _reduce_pairs[(rows, triton.cdiv(hidden, block))](
            pairs[0],
            pairs[-1],
            row_pair_RK,
            pairs[0].shape[0],
            out_RH,
            out_RH.stride(0),
            hidden,
            row_pair_RK.shape[1],
            TWO=len(pairs) == 2,
            BLOCK=block,
            num_warps=_warps(block),
        )


def reduce_rows(
    own_TH: torch.Tensor | None, rows_RH: torch.Tensor, token_row_TP: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Sum of each token's rows, own part first, then by rank: [T, H]."""
    tokens, hidden = token_row_TP.shape[0], rows_RH.shape[1]
    out = torch.empty(tokens, hidden, dtype=dtype, device=rows_RH.device)
    if tokens:
        block = _block(hidden)
        _reduce_rows[(tokens, triton.cdiv(hidden, block))](
            own_TH if own_TH is not None else rows_RH,
            rows_RH,
            rows_RH.stride(0),
            rows_RH.shape[0],
            token_row_TP,
            token_row_TP.shape[1],
            out,
            hidden,
            OWN=own_TH is not None,
            BLOCK=block,
            num_warps=_warps(block),
        )
    return out


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
    hidden_in_stride,
    weights_in,
    index,
    row_token,
    row_rank,
    hidden_out,
    ids_out,
    weights_out,
    hidden_stride,
    ids_stride,
    weights_stride,
    hidden,
    num_local,
    top_k,
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
def _expand(rows, row_stride, pair_row, out, place, hidden, PLACED: tl.constexpr, BLOCK: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64)
    row = tl.load(pair_row + pair).to(tl.int64)
    to = pair
    if PLACED:
        to = tl.load(place + pair).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < hidden
    tl.store(out + to * hidden + at, tl.load(rows + row * row_stride + at, mask=inside), mask=inside)


@triton.jit
def _pair_weight(weights, stride, top_k, slot):
    return tl.load(weights + (slot // top_k).to(tl.int64) * stride + slot % top_k).to(tl.float32)


@triton.jit
def _glu_forward(
    gate, up, stride, weights, weights_stride, top_k, pair_slot, out, inner, BLOCK: tl.constexpr
):
    pair = tl.program_id(0).to(tl.int64)
    weight = _pair_weight(weights, weights_stride, top_k, tl.load(pair_slot + pair))
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < inner
    g = tl.load(gate + pair * stride + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + pair * stride + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + pair * inner + at, (g * tl.sigmoid(g) * u * weight).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _glu_backward(
    grad,
    gate,
    up,
    stride,
    weights,
    weights_stride,
    top_k,
    pair_slot,
    grad_weights,
    grad_weights_stride,
    grad_gate,
    grad_up,
    grad_stride,
    hidden,
    joint_gate,
    joint_up,
    joint_stride,
    joint_place,
    inner,
    JOINT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    slot = tl.load(pair_slot + pair)
    weight = _pair_weight(weights, weights_stride, top_k, slot)
    place = pair
    if JOINT:
        place = tl.load(joint_place + pair).to(tl.int64)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, inner, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < inner
        dh = tl.load(grad + pair * inner + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gate + pair * stride + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + pair * stride + at, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(g)
        activated = g * sigmoid
        total += dh * activated * u
        tl.store(hidden + place * inner + at, (activated * u * weight).to(hidden.dtype.element_ty), mask=inside)
        dh *= weight
        dg = (dh * u * (sigmoid * (1 + g - activated))).to(grad_gate.dtype.element_ty)
        du = (dh * activated).to(grad_up.dtype.element_ty)
        tl.store(grad_gate + pair * grad_stride + at, dg, mask=inside)
        tl.store(grad_up + pair * grad_stride + at, du, mask=inside)
        if JOINT:
            tl.store(joint_gate + place * joint_stride + at, dg, mask=inside)
            tl.store(joint_up + place * joint_stride + at, du, mask=inside)
    tl.store(grad_weights + (slot // top_k).to(tl.int64) * grad_weights_stride + slot % top_k, tl.sum(total, 0))


@triton.jit
def _reduce_pairs(
    pairs, more, row_pair, num_pairs, out, out_stride, hidden, top_k, TWO: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < hidden
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for k in range(top_k):
        pair = tl.load(row_pair + row * top_k + k).to(tl.int64)
        if pair < num_pairs:
            total += tl.load(pairs + pair * hidden + at, mask=inside, other=0.0).to(tl.float32)
            if TWO:
                total += tl.load(more + pair * hidden + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _reduce_rows(
    own, rows, row_stride, num_rows, token_row, ranks, out, hidden, OWN: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < hidden
    total = tl.zeros([BLOCK], dtype=tl.float32)
    if OWN:
        total += tl.load(own + token * hidden + at, mask=inside, other=0.0).to(tl.float32)
    for rank in range(ranks):
        row = tl.load(token_row + token * ranks + rank).to(tl.int64)
        if row < num_rows:
            total += tl.load(rows + row * row_stride + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gather_weight_grads(
    own, rows, row_stride, token_row, ranks, index, num_local, own_rank, out, slots, top_k, BLOCK: tl.constexpr
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
