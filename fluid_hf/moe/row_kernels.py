"""Triton kernels for the steps around the grouped GEMM: expand, activation, and fixed-order gather-sums.

Legend: T tokens, R rows, K experts per token, S pairs, H hidden, I intermediate, P ranks. Memory-bound: each launch
reads its input once and writes its output once; sums run in float32 in a fixed order, without atomics.
Sizes and strides that a model fixes are compile-time constants, and every thread moves at least 8 neighbouring
elements, so that rows move in 16-byte accesses.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fluid_hf.launch import Kernel, blocks_of

__all__ = ["JointPlaces", "expand", "glu_backward", "glu_forward", "reduce_pairs", "reduce_rows", "tile", "zero_empty"]


@functools.cache
def tile(width: int, elements: int, widest: int = 2048) -> tuple[int, int, int]:
    """Columns and rows of a tile of about `elements` elements, and its warps at 8 elements a thread or more.

    The columns are the widest block that wastes at most an eighth of `width`, else the one that wastes least.
    """
    options = [block for block in (2048, 1024, 512, 256, 128, 64) if block <= widest]
    waste = {block: (-width % block) / max(width, 1) for block in options}
    columns = next((block for block in options if waste[block] <= 0.125), min(options, key=lambda block: waste[block]))
    rows = max(1, elements // columns)
    return columns, rows, max(1, min(8, columns * rows // 256))


def expand(
    rows_RH: torch.Tensor,
    pair_row_S: torch.Tensor,
    out: torch.Tensor | None = None,
    place_S: torch.Tensor | None = None,
    unit: int = 0,
    ends_E: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each row at its pairs: [S, H]; with `place_S`, pair s is written to `out[place_S[s]]`.

    With `unit`, `pair_row_S` says where each pair's row lies: so many times `unit` elements from the first row (rows
    may lie in several buffers). With `ends_E` there may be fewer pairs than places: what lies beyond its last value is
    neither read nor written.
    """
    pairs, hidden = pair_row_S.shape[0], rows_RH.shape[1]
    if out is None:
        out = torch.empty(pairs, hidden, dtype=rows_RH.dtype, device=rows_RH.device)
    if pairs:
        columns, rows, warps = tile(hidden, 8192)
        placed, experts = place_S is not None, ends_E.shape[0] if ends_E is not None else 0
        _expand(
            (blocks_of(pairs, rows), blocks_of(hidden, columns), 1),
            (rows_RH, pair_row_S, out, place_S if placed else pair_row_S, ends_E if experts else pair_row_S),
            (pairs,),
            (unit or rows_RH.stride(0), hidden, placed, experts, rows, columns),
            warps,
        )
    return out


def zero_empty(weight_ENM: torch.Tensor, offsets_E: torch.Tensor) -> None:
    """Fill the matrices of experts without pairs with zeros; the others are not touched. `weight_ENM` is contiguous."""
    experts, size = weight_ENM.shape[0], weight_ENM[0].numel()
    if experts and size:
        _zero_empty((experts, min(64, blocks_of(size, 4096)), 1), (weight_ENM, offsets_E), (), (size, 4096), 4)


def glu_forward(
    projections: tuple[torch.Tensor, ...], weights_RK: torch.Tensor, pair_slot_S: torch.Tensor
) -> torch.Tensor:
    """`weight * silu(gate) * up` [S, I]; `projections` is gate and up [S, I], or both in one tensor [S, 2I]."""
    first, up = projections[0], projections[-1]
    pairs, inner = first.shape[0], first.shape[1] // (3 - len(projections))
    out = torch.empty(pairs, inner, dtype=first.dtype, device=first.device)
    if pairs:
        columns, rows, warps = tile(inner, 2048, widest=1024)
        _glu_forward(
            (blocks_of(pairs, rows), blocks_of(inner, columns), 1),
            (first, up, weights_RK, pair_slot_S, out),
            (pairs,),
            (first.shape[1], weights_RK.stride(0), weights_RK.shape[1], inner, rows, columns),
            warps,
        )
    return out


class JointPlaces(NamedTuple):
    """Where one piece's pairs go in the joint order of several pieces.

    Attributes:
        grads: receive the gradients of the projections, once more if they are written in the piece's own places too.
        place_S: joint place of each pair, int32.
        addresses: int64 [2, N], receives where the row and the output gradient of each joint place lie, in units of
            `unit` elements from the first piece's; `None` if nobody reads by it.
        rows, outputs: the first piece's and this one's rows [R, H], and output gradients.
        unit: elements.
    """

    grads: tuple[torch.Tensor, ...]
    place_S: torch.Tensor
    addresses: torch.Tensor | None
    rows: tuple[torch.Tensor, torch.Tensor]
    outputs: tuple[torch.Tensor, torch.Tensor]
    unit: int


def glu_backward(
    grad_SI: torch.Tensor,
    projections: tuple[torch.Tensor, ...],
    weights_RK: torch.Tensor,
    pair_slot_S: torch.Tensor,
    grad_weights_RK: torch.Tensor,
    grads: tuple[torch.Tensor, ...] | None,
    hidden: torch.Tensor,
    joint: JointPlaces | None = None,
) -> None:
    """Backward of `glu_forward` in one launch.

    Args:
        grad_weights_RK: float32 view that receives the routing-weight gradients of the slots that have a pair.
        grads: receive the gradients of `projections`, in the same layout; `None` if only the joint places are to.
        hidden: [N, I] receives the forward output again; at its joint place if `joint` is given. Without `joint` it
            may be `grad_SI`: an element is read before it is written.
        joint: where these pairs stand among those of all pieces, of which `hidden` has a place each.
    """
    pairs, inner = grad_SI.shape
    if not pairs:
        return
    columns, height, warps = tile(inner, 2048, widest=1024)
    place, addresses, ways = pair_slot_S, None, (0, 0, 1)
    rows = outputs = (grad_SI, grad_SI)
    second = grads if joint is None else joint.grads
    assert second is not None
    own = grads if grads is not None else second
    if joint is not None:
        place, addresses, rows, outputs = joint.place_S, joint.addresses, joint.rows, joint.outputs
        ways = rows[1].stride(0), outputs[1].stride(0), joint.unit
    strides = (projections[0].shape[1], weights_RK.stride(0), weights_RK.shape[1], grad_weights_RK.stride(0))
    values = (grad_SI, projections[0], projections[-1], weights_RK, pair_slot_S, grad_weights_RK)
    _glu_backward(
        (blocks_of(pairs, height), 1, 1),
        (*values, own[0], own[-1], hidden, second[0], second[-1], place, *rows, *outputs)
        + (addresses if addresses is not None else place,),
        (pairs, hidden.shape[0]),
        (*strides, inner, *ways, grads is not None, joint is not None, addresses is not None, height, columns),
        warps,
    )


def reduce_pairs(pairs: list[torch.Tensor], row_pair_RK: torch.Tensor, out_RH: torch.Tensor) -> None:
    """Sum of each row's pairs, over one or two tensors [S, H], written to a view [R, H] of any row stride."""
    rows, hidden = out_RH.shape
    if rows:
        columns, _, warps = tile(hidden, 0)
        _reduce_pairs(
            (rows, blocks_of(hidden, columns), 1),
            (pairs[0], pairs[-1], row_pair_RK, out_RH),
            (pairs[0].shape[0],),
            (out_RH.stride(0), hidden, row_pair_RK.shape[1], len(pairs) == 2, columns),
            warps,
        )


def reduce_rows(
    own_TH: torch.Tensor | None, rows_RH: torch.Tensor, token_row_TP: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Sum of each token's rows, own part first, then by rank: [T, H]."""
    tokens, hidden = token_row_TP.shape[0], rows_RH.shape[1]
    out = torch.empty(tokens, hidden, dtype=dtype, device=rows_RH.device)
    if tokens:
        columns, _, warps = tile(hidden, 0)
        _reduce_rows(
            (tokens, blocks_of(hidden, columns), 1),
            (own_TH if own_TH is not None else rows_RH, rows_RH, token_row_TP, out),
            (rows_RH.shape[0],),
            (rows_RH.stride(0), token_row_TP.shape[1], hidden, own_TH is not None, columns),
            warps,
        )
    return out


@triton.jit(do_not_specialize=["pairs"])
def _expand_kernel(
    rows,
    pair_row,
    out,
    place,
    ends,
    pairs,
    row_stride: tl.constexpr,
    hidden: tl.constexpr,
    PLACED: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # several pairs keep more loads in flight
    known = pair < pairs
    if EXPERTS:
        known = known & (pair < tl.load(ends + EXPERTS - 1))
    row = tl.load(pair_row + pair, mask=known, other=0).to(tl.int64)
    to = pair
    if PLACED:
        to = tl.load(place + pair, mask=known, other=0).to(tl.int64)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = known[:, None] & (at < hidden)[None, :]
    value = tl.load(rows + row[:, None] * row_stride + at[None, :], mask=inside)
    tl.store(out + to[:, None] * hidden + at[None, :], value, mask=inside)


@triton.jit
def _pair_weight(weights, stride: tl.constexpr, top_k: tl.constexpr, slot, known):
    at = weights + (slot // top_k).to(tl.int64) * stride + slot % top_k
    return tl.load(at, mask=known, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["pairs"])
def _glu_forward_kernel(
    gate,
    up,
    weights,
    pair_slot,
    out,
    pairs,
    stride: tl.constexpr,
    weights_stride: tl.constexpr,
    top_k: tl.constexpr,
    inner: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = pair < pairs
    slot = tl.load(pair_slot + pair, mask=known, other=0)
    weight = _pair_weight(weights, weights_stride, top_k, slot, known)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = known[:, None] & (at < inner)[None, :]
    second = stride - inner  # where up starts: beside gate in one tensor, or at 0 of its own
    g = tl.load(gate + pair[:, None] * stride + at[None, :], mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + pair[:, None] * stride + at[None, :] + second, mask=inside, other=0.0).to(tl.float32)
    value = g * tl.sigmoid(g) * u * weight[:, None]
    tl.store(out + pair[:, None] * inner + at[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _address(at, first, own, UNIT: tl.constexpr):
    """Units from `first` to elements `at` of `own`, which may be another buffer."""
    return (at + (own.to(tl.int64) - first.to(tl.int64)) // (first.dtype.element_ty.primitive_bitwidth // 8)) // UNIT


@triton.jit(do_not_specialize=["pairs", "places"])
def _glu_backward_kernel(
    grad, gate, up, weights, pair_slot, grad_weights, grad_gate, grad_up, hidden, joint_gate, joint_up, joint_place,
    first_row, own_row, first_output, own_output, addresses, pairs, places,
    stride: tl.constexpr, weights_stride: tl.constexpr, top_k: tl.constexpr, grad_weights_stride: tl.constexpr,
    inner: tl.constexpr, row_stride: tl.constexpr, output_stride: tl.constexpr, UNIT: tl.constexpr,
    OWN: tl.constexpr, JOINT: tl.constexpr, ADDRESSES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = pair < pairs
    slot = tl.load(pair_slot + pair, mask=known, other=0)
    weight = _pair_weight(weights, weights_stride, top_k, slot, known)[:, None]
    place = pair
    if JOINT:
        place = tl.load(joint_place + pair, mask=known, other=0).to(tl.int64)
    if ADDRESSES:
        row = (slot // top_k).to(tl.int64)
        tl.store(addresses + place, _address(row * row_stride, first_row, own_row, UNIT), mask=known)
        to = addresses + places + place
        tl.store(to, _address(row * output_stride, first_output, own_output, UNIT), mask=known)
    second = stride - inner  # where up starts: beside gate in one tensor, or at 0 of its own
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, inner, COLUMNS):
        at = start + tl.arange(0, COLUMNS)[None, :]
        inside = known[:, None] & (at < inner)
        dh = tl.load(grad + pair[:, None] * inner + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gate + pair[:, None] * stride + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + pair[:, None] * stride + at + second, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(g)
        activated = g * sigmoid
        total += dh * activated * u
        value = (activated * u * weight).to(hidden.dtype.element_ty)
        tl.store(hidden + place[:, None] * inner + at, value, mask=inside)
        dh *= weight
        dg = (dh * u * (sigmoid * (1 + g - activated))).to(grad_gate.dtype.element_ty)
        du = (dh * activated).to(grad_up.dtype.element_ty)
        if OWN:
            tl.store(grad_gate + pair[:, None] * stride + at, dg, mask=inside)
            tl.store(grad_up + pair[:, None] * stride + at + second, du, mask=inside)
        if JOINT:
            tl.store(joint_gate + place[:, None] * stride + at, dg, mask=inside)
            tl.store(joint_up + place[:, None] * stride + at + second, du, mask=inside)
    to_weight = grad_weights + (slot // top_k).to(tl.int64) * grad_weights_stride + slot % top_k
    tl.store(to_weight, tl.sum(total, 1), mask=known)


@triton.jit(do_not_specialize=["num_pairs"])
def _reduce_pairs_kernel(
    pairs,
    more,
    row_pair,
    out,
    num_pairs,
    out_stride: tl.constexpr,
    hidden: tl.constexpr,
    top_k: tl.constexpr,
    TWO: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < hidden
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for k in tl.static_range(top_k):  # unrolled: all loads are in flight together, the sum keeps its order
        pair = tl.load(row_pair + row * top_k + k).to(tl.int64)
        found = inside & (pair < num_pairs)
        total += tl.load(pairs + pair * hidden + at, mask=found, other=0.0).to(tl.float32)
        if TWO:
            total += tl.load(more + pair * hidden + at, mask=found, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _reduce_rows_kernel(
    own,
    rows,
    token_row,
    out,
    num_rows,
    row_stride: tl.constexpr,
    ranks: tl.constexpr,
    hidden: tl.constexpr,
    OWN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < hidden
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    if OWN:
        total += tl.load(own + token * hidden + at, mask=inside, other=0.0).to(tl.float32)
    for rank in range(ranks):
        row = tl.load(token_row + token * ranks + rank).to(tl.int64)
        found = inside & (row < num_rows)
        total += tl.load(rows + row * row_stride + at, mask=found, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _zero_empty_kernel(weight, offsets, size: tl.constexpr, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    if tl.load(offsets + expert) == start:
        first = weight + expert.to(tl.int64) * size
        for low in range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
            at = low + tl.arange(0, BLOCK)
            tl.store(first + at, tl.zeros((BLOCK,), weight.dtype.element_ty), mask=at < size)


_expand = Kernel(_expand_kernel)
_glu_forward = Kernel(_glu_forward_kernel)
_glu_backward = Kernel(_glu_backward_kernel)
_reduce_pairs = Kernel(_reduce_pairs_kernel)
_reduce_rows = Kernel(_reduce_rows_kernel)
_zero_empty = Kernel(_zero_empty_kernel)
