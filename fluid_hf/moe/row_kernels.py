"""Triton kernels for the steps around the grouped GEMM: expand, activation, and fixed-order gather-sums.

Legend: T tokens, R rows, K experts per token, S pairs, H hidden, I intermediate, P ranks. Memory-bound: each launch
reads its input once and writes its output once; sums run in float32 in a fixed order, without atomics.
Sizes and strides that a model fixes are compile-time constants, so that rows move in 16-byte accesses.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["block_size", "expand", "glu_backward", "glu_forward", "num_warps", "reduce_pairs", "reduce_rows"]


def block_size(size: int, largest: int = 2048) -> int:
    """The widest block that wastes at most an eighth of `size`, else the one that wastes least."""
    options = [block for block in (2048, 1024, 512, 256, 128) if block <= largest]
    waste = {block: (-size % block) / max(size, 1) for block in options}
    return next((block for block in options if waste[block] <= 0.125), min(options, key=lambda block: waste[block]))


def num_warps(block: int) -> int:
    """Warps for a block of that width."""
    return 4 if block <= 1024 else 8


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
        block = block_size(hidden)
        _expand[(triton.cdiv(pairs, 4), triton.cdiv(hidden, block))](
            rows_RH,
            rows_RH.stride(0),
            pair_row_S,
            out,
            place_S if place_S is not None else pair_row_S,
            pairs,
            hidden,
            PLACED=place_S is not None,
            PAIRS=4,
            BLOCK=block,
            num_warps=num_warps(block),
        )
    return out


def glu_forward(
    gate_SI: torch.Tensor, up_SI: torch.Tensor, weights_RK: torch.Tensor, pair_slot_S: torch.Tensor
) -> torch.Tensor:
    """`weight * silu(gate) * up` [S, I]; gate and up may be halves of one tensor."""
    pairs, inner = gate_SI.shape
    out = torch.empty(pairs, inner, dtype=gate_SI.dtype, device=gate_SI.device)
    if pairs:
        block = block_size(inner, 1024)
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
    block = block_size(inner, 1024)
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
        block = block_size(hidden)
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
            num_warps=num_warps(block),
        )


def reduce_rows(
    own_TH: torch.Tensor | None, rows_RH: torch.Tensor, token_row_TP: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Sum of each token's rows, own part first, then by rank: [T, H]."""
    tokens, hidden = token_row_TP.shape[0], rows_RH.shape[1]
    out = torch.empty(tokens, hidden, dtype=dtype, device=rows_RH.device)
    if tokens:
        block = block_size(hidden)
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
            num_warps=num_warps(block),
        )
    return out


@triton.jit
def _expand(
    rows,
    row_stride: tl.constexpr,
    pair_row,
    out,
    place,
    pairs,
    hidden: tl.constexpr,
    PLACED: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)  # several pairs keep more loads in flight
    known = pair < pairs
    row = tl.load(pair_row + pair, mask=known, other=0).to(tl.int64)
    to = pair
    if PLACED:
        to = tl.load(place + pair, mask=known, other=0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = known[:, None] & (at < hidden)[None, :]
    value = tl.load(rows + row[:, None] * row_stride + at[None, :], mask=inside)
    tl.store(out + to[:, None] * hidden + at[None, :], value, mask=inside)


@triton.jit
def _pair_weight(weights, stride: tl.constexpr, top_k: tl.constexpr, slot):
    return tl.load(weights + (slot // top_k).to(tl.int64) * stride + slot % top_k).to(tl.float32)


@triton.jit
def _glu_forward(
    gate,
    up,
    stride: tl.constexpr,
    weights,
    weights_stride: tl.constexpr,
    top_k: tl.constexpr,
    pair_slot,
    out,
    inner: tl.constexpr,
    BLOCK: tl.constexpr,
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
    stride: tl.constexpr,
    weights,
    weights_stride: tl.constexpr,
    top_k: tl.constexpr,
    pair_slot,
    grad_weights,
    grad_weights_stride: tl.constexpr,
    grad_gate,
    grad_up,
    grad_stride: tl.constexpr,
    hidden,
    joint_gate,
    joint_up,
    joint_stride: tl.constexpr,
    joint_place,
    inner: tl.constexpr,
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
    pairs,
    more,
    row_pair,
    num_pairs,
    out,
    out_stride: tl.constexpr,
    hidden: tl.constexpr,
    top_k: tl.constexpr,
    TWO: tl.constexpr,
    BLOCK: tl.constexpr,
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
    own,
    rows,
    row_stride: tl.constexpr,
    num_rows,
    token_row,
    ranks: tl.constexpr,
    out,
    hidden: tl.constexpr,
    OWN: tl.constexpr,
    BLOCK: tl.constexpr,
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
