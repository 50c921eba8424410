"""Triton grouped GEMMs that read their rows through an index, so that rows are never copied to their pairs.

Legend: R rows, K experts per token, S pairs sorted by expert, E experts held here, H hidden, I intermediate. Against a
copy and `torch.nn.functional.grouped_mm` they save the copy's time and memory, a launch and most of the host's time;
large experts hide the copy, and torch's kernel is the faster one there: the functions that begin with `prefers_` say
which to take, from what was measured on an H100 and an H200. Here is the one with an activation behind it, products
alone are in `fluid_hf.moe.linear_kernels`. Gathering inside the GEMM follows ScatterMoE (Tan et al., 2024), the
activation in its epilogue MegaBlocks and SonicMoE.

One program computes one tile; a tile of at most half the rows, of which every expert has one at its end, costs half.
Nothing but the result is allocated, and a result may have more places than there are pairs: `offsets_E` is read on the
device, so a call can be queued before the host knows the number of pairs.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fluid_hf.kernels import MAX_INNER_FUSED, MAX_INNER_GATHERED_WGRAD
from fluid_hf.launch import Kernel, blocks_of, can_describe, describe, distance_between, power_of_two

__all__ = [
    "gated_linear",
    "prefers_fused",
    "prefers_gathered",
    "prefers_gathered_wgrad",
    "product_tile",
    "serves_float32",
    "shared_bytes",
]

GROUP = 16  # row blocks whose columns are computed together, while their rows are in the L2 cache


def prefers_fused(inner: int) -> bool:
    """Whether `gated_linear` is faster than a copy, torch's grouped GEMM and the activation (measured up to 2560)."""
    return inner <= MAX_INNER_FUSED


def prefers_gathered_wgrad(inner: int) -> bool:
    """Whether `gathered_wgrad` of the down projection is faster than a copy and torch's (1408 faster, 2560 slower)."""
    return inner <= MAX_INNER_GATHERED_WGRAD


def prefers_gathered(inner: int, top_k: int) -> bool:
    """Whether `gathered_linear` is faster than a copy and torch's grouped GEMM."""
    return inner <= 4096 and top_k >= 4


def serves_float32(weight: tuple[int, ...]) -> bool:
    """Float32 needs exact products, slow here: only small experts (of the shape [E, N, M]) gain by fewer launches."""
    return weight[1] * weight[2] <= 2**16


@functools.cache
def shared_bytes(device: int | None) -> int:
    if device is None or not torch.cuda.is_available():
        return 227 * 1024
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


def product_tile(tensor: torch.Tensor, columns: int, stages: int, warps: int = 8) -> tuple[int, int, int, int, int]:
    """Rows, columns and depth of a tile, warps, stages: as many stages as fit into shared memory."""
    return _product_tile(tensor.dtype, tensor.device.index, columns, stages, warps)


@functools.lru_cache(maxsize=64)
def _product_tile(dtype: torch.dtype, device: int | None, *wanted: int) -> tuple[int, int, int, int, int]:
    columns, stages, warps = wanted
    if dtype == torch.float32:  # for its exactness, not its speed
        return 32, 32, 32, 4, 2
    fitting = shared_bytes(device) // ((128 + columns) * 64 * 2)
    return 128, columns, 64, warps, max(1, min(stages, fitting))


def gated_linear(
    rows_RH: torch.Tensor,
    pair_row_S: torch.Tensor,
    pair_slot_S: torch.Tensor,
    offsets_E: torch.Tensor,
    first: tuple[torch.Tensor, ...],
    weights_RK: torch.Tensor,
    keep: bool,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Gate and up projections of every pair and `weight * silu(gate) * up`, in one launch.

    Args:
        rows_RH: any row stride, elements of a row side by side.
        first: contiguous `[gate_up [E, 2I, H]]`, or `[gate [E, I, H], up [E, I, H]]`.
        weights_RK: routing weights, any row stride.
        keep: return the projections too, in the layout of `first`: [S, 2I], or two of [S, I].

    Returns:
        The projections (none without `keep`), and the input of the down projection [S, I].
    """
    gate, up, hidden = first[0], first[-1], rows_RH.shape[1]
    experts, inner, pairs = gate.shape[0], gate.shape[1] // (3 - len(first)), pair_row_S.shape[0]
    out = rows_RH.new_empty(pairs, inner)
    kept = tuple([rows_RH.new_empty(pairs, weight.shape[1]) for weight in first]) if keep else ()
    if pairs:
        height, columns, depth, warps, stages = product_tile(rows_RH, 256, 4)
        width = columns // 2  # of gate, beside as many of up
        both, swapped = _gate_and_up(gate, up, inner, width, depth)
        if both is not None and hidden > 2048:
            stages = min(stages, 3)
        stored = kept or (out,)
        pointers = rows_RH, pair_row_S, pair_slot_S, offsets_E, weights_RK, stored[0], stored[-1], out, up
        _gated(
            ((pairs // height + experts) * blocks_of(inner, width), 1, 1),
            pointers if both is not None else (*pointers, gate),
            (pairs,),
            (rows_RH.stride(0), hidden, inner, gate.shape[1], weights_RK.stride(0), weights_RK.shape[1], experts)
            + (power_of_two(experts), keep, both is not None, swapped, height, width, depth, GROUP),
            warps,
            stages,
            (both,) if both is not None else (),
        )
    return kept, out


def _gate_and_up(
    gate: torch.Tensor, up: torch.Tensor, inner: int, columns: int, depth: int
) -> tuple[TensorDescriptor | None, bool]:
    """Describes blocks of columns of gate with the same ones of up, and whether up comes first; what is beyond reads 0.

    In one tensor or in two: the distance between them is a stride, which must not be negative.
    """
    if not (can_describe(gate) and can_describe(up)):
        return None, False
    experts, width, hidden = gate.shape
    distance = inner * hidden if gate is up else distance_between(gate, up)
    if distance is None:
        return None, False
    base, strides = (up if distance < 0 else gate), (width * hidden, abs(distance), hidden, 1)
    return describe(base, (experts, 2, inner, hidden), strides, (1, 2, columns, depth)), distance < 0


@triton.jit
def _tile_ends(
    offsets, limit, EXPERTS: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr
):
    """Number of the first tile behind each expert's, with the number of experts up to it in the bits above."""
    expert = tl.arange(0, PADDED)
    inside = expert < EXPERTS
    end = tl.minimum(tl.load(offsets + expert, mask=inside, other=0), limit)
    start = tl.minimum(tl.load(offsets + expert - 1, mask=inside & (expert > 0), other=0), limit)
    blocks = tl.where(inside, (end - start + HEIGHT - 1) // HEIGHT, 0)
    return (tl.cumsum(blocks, 0) * COLUMNS).to(tl.int64) + ((expert + 1).to(tl.int64) << 32)


@triton.jit
def _find_tile(
    offsets, limit, EXPERTS: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Expert of this program, first pair of its rows, end of the expert's pairs, and its block of columns.

    Reductions over the experts cost more than loads: one finds the expert and its first tile.
    """
    tile = tl.program_id(0)
    ends = _tile_ends(offsets, limit, EXPERTS, PADDED, COLUMNS, HEIGHT)
    before = tl.max(tl.where((ends & 0xFFFFFFFF) <= tile, ends, 0), 0)
    expert = tl.minimum(before >> 32, EXPERTS).to(tl.int32)
    known = expert < EXPERTS
    low = tl.minimum(tl.load(offsets + expert - 1, mask=known & (expert > 0), other=0), limit)
    high = tl.minimum(tl.load(offsets + expert, mask=known, other=0), limit)
    place = tile - (before & 0xFFFFFFFF).to(tl.int32)
    group = place // (GROUP * COLUMNS)
    size = tl.maximum(tl.minimum((high - low + HEIGHT - 1) // HEIGHT - group * GROUP, GROUP), 1)
    place -= group * GROUP * COLUMNS
    return expert, low + (group * GROUP + place % size) * HEIGHT, high, place // size


@triton.jit
def _weight_at(weight, at, mask, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, DEEP: tl.constexpr):
    """A tile of weights; without a mask where all of it is there."""
    if WIDTH % COLUMNS == 0 and DEEP:
        return tl.load(weight + at)
    return tl.load(weight + at, mask=mask, other=0.0)


@triton.jit
def _row_at(row, at, inside, DEEP: tl.constexpr):
    if DEEP:
        return tl.load(row + at)
    return tl.load(row + at, mask=inside, other=0.0)


@triton.jit
def _joined_sums(
    row, both, expert, block, hidden: tl.constexpr, HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Gate and up by one product: two would read the rows from shared memory twice."""
    total = tl.zeros((HEIGHT, 2 * COLUMNS), tl.float32)
    for start in range(0, hidden, DEPTH):
        deep = start + tl.arange(0, DEPTH)
        value = _row_at(row, deep[None, :], (deep < hidden)[None, :], hidden % DEPTH == 0)
        values = both.load([expert, 0, block * COLUMNS, start]).reshape(2 * COLUMNS, DEPTH).T
        total = tl.dot(value, values, total, input_precision="ieee")
    return total.reshape(HEIGHT, 2, COLUMNS).permute(0, 2, 1).split()


@triton.jit
def _separate_sums(
    row, gate, up, expert, block, hidden: tl.constexpr, inner: tl.constexpr, width: tl.constexpr,
    HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Gate and up by a product each: one whose weights are loaded by threads from two places is slower."""
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    deep = tl.arange(0, DEPTH)
    EVEN: tl.constexpr = hidden % DEPTH == 0
    at = expert.to(tl.int64) * (width * hidden) + column.to(tl.int64)[None, :] * hidden + deep[:, None]
    second = (width - inner) * hidden  # where up starts: behind gate in one tensor, or at 0 of its own
    sum_gate = tl.zeros((HEIGHT, COLUMNS), tl.float32)
    sum_up = tl.zeros((HEIGHT, COLUMNS), tl.float32)
    for start in range(0, hidden, DEPTH):
        left = deep + start < hidden
        mask = left[:, None] & (column < inner)[None, :]
        value = _row_at(row, (deep + start)[None, :], left[None, :], EVEN)
        gates = _weight_at(gate, at + start, mask, inner, COLUMNS, EVEN)
        ups = _weight_at(up, at + start + second, mask, inner, COLUMNS, EVEN)
        sum_gate = tl.dot(value, gates, sum_gate, input_precision="ieee")
        sum_up = tl.dot(value, ups, sum_up, input_precision="ieee")
    return sum_gate, sum_up


@triton.jit
def _gated_tile(
    rows, pair_row, pair_slot, weights, kept_gate, kept_up, hidden_out, up, gate, expert, low, end, block,
    row_stride: tl.constexpr, hidden: tl.constexpr, inner: tl.constexpr, width: tl.constexpr,
    weights_stride: tl.constexpr, top_k: tl.constexpr, KEEP: tl.constexpr, DESCRIBED: tl.constexpr,
    SWAPPED: tl.constexpr, HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    pair = low + tl.arange(0, HEIGHT)
    known = pair < end
    row = rows + tl.load(pair_row + pair, mask=known, other=0).to(tl.int64)[:, None] * row_stride
    if SWAPPED:
        sum_up, sum_gate = _joined_sums(row, gate, expert, block, hidden, HEIGHT, COLUMNS, DEPTH)
    elif DESCRIBED:
        sum_gate, sum_up = _joined_sums(row, gate, expert, block, hidden, HEIGHT, COLUMNS, DEPTH)
    else:
        sum_gate, sum_up = _separate_sums(
            row, gate, up, expert, block, hidden, inner, width, HEIGHT, COLUMNS, DEPTH
        )  # fmt: skip
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < inner
    slot = tl.load(pair_slot + pair, mask=known, other=0)
    to_weight = weights + (slot // top_k).to(tl.int64) * weights_stride + slot % top_k
    weight = tl.load(to_weight, mask=known, other=0.0).to(tl.float32)
    mask = known[:, None] & inside[None, :]
    place = pair.to(tl.int64)[:, None]
    # Rounded as they are kept, so that backward sees the same values.
    sum_gate = sum_gate.to(hidden_out.dtype.element_ty)
    sum_up = sum_up.to(hidden_out.dtype.element_ty)
    if KEEP:
        tl.store(kept_gate + place * width + column[None, :], sum_gate, mask=mask)
        tl.store(kept_up + place * width + column[None, :] + (width - inner), sum_up, mask=mask)
    value = sum_gate.to(tl.float32)
    value = value * tl.sigmoid(value) * sum_up.to(tl.float32) * weight[:, None]
    tl.store(hidden_out + place * inner + column[None, :], value.to(hidden_out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["limit"])
def _gated_kernel(
    rows, pair_row, pair_slot, offsets, weights, kept_gate, kept_up, hidden_out, up, gate, limit,
    row_stride: tl.constexpr, hidden: tl.constexpr, inner: tl.constexpr, width: tl.constexpr,
    weights_stride: tl.constexpr, top_k: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr,
    KEEP: tl.constexpr, DESCRIBED: tl.constexpr, SWAPPED: tl.constexpr,
    HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    ACROSS: tl.constexpr = (inner + COLUMNS - 1) // COLUMNS
    expert, low, end, block = _find_tile(offsets, limit, EXPERTS, PADDED, ACROSS, HEIGHT, GROUP)
    if (expert < EXPERTS) & (low < end):
        if end - low > HEIGHT // 2:
            _gated_tile(
                rows, pair_row, pair_slot, weights, kept_gate, kept_up, hidden_out, up, gate, expert, low, end, block,
                row_stride, hidden, inner, width, weights_stride, top_k, KEEP, DESCRIBED, SWAPPED,
                HEIGHT, COLUMNS, DEPTH,
            )  # fmt: skip
        else:
            _gated_tile(
                rows, pair_row, pair_slot, weights, kept_gate, kept_up, hidden_out, up, gate, expert, low, end, block,
                row_stride, hidden, inner, width, weights_stride, top_k, KEEP, DESCRIBED, SWAPPED,
                HEIGHT // 2, COLUMNS, DEPTH,
            )  # fmt: skip


_gated = Kernel(_gated_kernel)
