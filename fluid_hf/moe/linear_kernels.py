"""Triton grouped GEMMs of pairs: each pair's row, in its own place or found by an index, times its expert's weight.

Legend: R rows, S pairs sorted by expert, E experts held here, H input and N output features. Measured on an H200 at its
power limit, against torch's `grouped_mm`: 8 to 22% less time for experts of up to 2048 input features (torch's tiles
have 128 rows, also the last one of an expert), 3 to 6% for 2560 to 5120, as long for Mixtral's. Sums of thousands of
terms gain when the copy engine (Hopper) loads the weights, and rows that lie in order; short ones lose. A program that
goes through several tiles was slower everywhere.

As in `fluid_hf.moe.gemm_kernels` one program computes one tile, a tile of at most half the rows costs half, and a
result may have more places than there are pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fluid_hf.launch import (
    RAGGED,
    Kernel,
    blocks_of,
    can_describe,
    describe,
    describe_ragged,
    distance_between,
    power_of_two,
)
from fluid_hf.moe.gemm_kernels import GROUP, _find_tile, _row_at, _weight_at, product_tile, serves_float32

__all__ = ["Places", "gathered_linear", "prefers_linear", "prefers_one_sum"]

# How the row of a pair is found: in the pair's own place, by an index, or counted from where its expert's rows start.
SIDE_BY_SIDE, BY_INDEX, FROM_STARTS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Products of a launch from which the copy engine gains more than describing the operands costs the host (about 10 us).
LONG = 1.2e11
# Input features (of both, where two are added) from which it gains: 4 to 6% from 2560 to 5120; it lost 2 to 8% with 768
# to 2048.
MIN_DEEP = 2560


class Places(NamedTuple):
    """Where the rows of pairs lie that are side by side for each expert only.

    Attributes:
        starts_E: int32, row of each expert's first pair.
        num_pairs: pairs of all experts.
    """

    starts_E: torch.Tensor
    num_pairs: int


def prefers_one_sum(rows_SH: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the input gradients of separate gate and up are one sum: that saves writing and reading one of them."""
    if rows_SH.dtype == torch.float32 and not serves_float32(weight.shape):
        return False
    return rows_SH.shape[1] <= 4096 or _beats_library(rows_SH, weight)


def prefers_linear(rows_SH: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `gathered_linear` is faster than torch's grouped GEMM, or takes the host less where that decides."""
    if weight.dtype == torch.float32:  # torch has no grouped GEMM for it
        return serves_float32(weight.shape)
    return not _is_long(rows_SH.shape[0], weight) or _beats_library(rows_SH, weight)


def _is_long(pairs: int, weight: torch.Tensor) -> bool:
    return 2 * pairs * weight.shape[1] * weight.shape[2] >= LONG


def _beats_library(rows_SH: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether it was measured there: on Hopper, with sizes that the copy engine takes."""
    return rows_SH.is_contiguous() and can_describe(rows_SH) and can_describe(weight)


def gathered_linear(
    rows_RH: torch.Tensor,
    pair_row_S: torch.Tensor | None,
    offsets_E: torch.Tensor,
    weight: torch.Tensor,
    transposed: bool,
    second: tuple[torch.Tensor, torch.Tensor] | None = None,
    places: Places | None = None,
) -> torch.Tensor:
    """`weight[expert] @ row` of every pair: [S, N].

    Args:
        rows_RH: any row stride, elements of a row side by side.
        pair_row_S: row of each pair, or `None` if there is a row for each.
        weight: contiguous [E, N, H], or with `transposed` [E, H, N].
        second: rows and a weight of the same layouts, whose product is added (before rounding).
        places: where the pairs' rows lie, if not side by side from the first row on; `pair_row_S` is then `None`.
    """
    experts, (pairs, hidden) = weight.shape[0], rows_RH.shape
    if pair_row_S is not None:
        pairs = pair_row_S.shape[0]
    elif places is not None:
        pairs = places.num_pairs
    width = weight.shape[2 if transposed else 1]
    out = rows_RH.new_empty(pairs, width)
    where, way = (pair_row_S, BY_INDEX) if pair_row_S is not None else (offsets_E, SIDE_BY_SIDE)
    if places is not None:
        where, way = places.starts_E, FROM_STARTS
    engine = _Engine.of(rows_RH, pair_row_S, weight, second) if pairs and _is_long(pairs, weight) else None
    if engine is not None:
        engine.multiply(where, way.value, offsets_E, transposed, out)
    elif pairs:
        height, columns, depth, warps, stages = product_tile(rows_RH, 256, 4 if hidden <= 2048 else 3)
        more = second if second is not None else (rows_RH, weight)
        _linear(
            ((pairs // height + experts) * blocks_of(width, columns), 1, 1),
            (rows_RH, where, offsets_E, weight, *more, out),
            (pairs,),
            (rows_RH.stride(0), hidden, width, transposed, way.value, second is not None, experts)
            + (power_of_two(experts), height, columns, depth, GROUP),
            warps,
            stages,
        )
    return out


class _Engine(NamedTuple):
    """Operands that the copy engine loads.

    Attributes:
        rows, weights: one of each, or two whose products are added.
    """

    rows: tuple[torch.Tensor, ...]
    weights: tuple[torch.Tensor, ...]

    @classmethod
    def of(
        cls,
        rows_RH: torch.Tensor,
        pair_row_S: torch.Tensor | None,
        weight: torch.Tensor,
        second: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> _Engine | None:
        """`None` where it cannot load them, or gains nothing."""
        if rows_RH.shape[1] * (2 if second is not None else 1) < MIN_DEEP:
            return None
        if pair_row_S is not None:  # it loads no rows by an index
            return cls((rows_RH,), (weight,)) if second is None and can_describe(weight) else None
        rows, weights = ((rows_RH,), (weight,)) if second is None else ((rows_RH, second[0]), (weight, second[1]))
        serves = all([_beats_library(*pair) for pair in zip(rows, weights, strict=True)])
        near = all([distance_between(pair[0], pair[-1]) is not None for pair in (rows, weights)])
        return cls(rows, weights) if serves and near else None

    def multiply(
        self, where: torch.Tensor, way: int, offsets_E: torch.Tensor, transposed: bool, out: torch.Tensor
    ) -> None:
        """Queue the kernel; `where` the rows lie, it finds in the `way` that says how."""
        (rows, rows2), (weight, weight2) = [(pair[0], pair[-1]) for pair in self]
        (pairs, width), experts, hidden, two = out.shape, weight.shape[0], rows.shape[1], len(self.rows) == 2
        height, columns, depth, warps, stages = product_tile(rows, 256, 4)
        block = (depth, columns) if transposed else (columns, depth)
        strides = (weight.stride(0), weight.stride(1), 1)
        rows_apart, weights_apart = distance_between(rows, rows2) or 0, distance_between(weight, weight2) or 0
        # A distance is a stride, which must not be negative: the kernel is told which tensor comes first in memory.
        swapped = rows_apart < 0, weights_apart < 0
        if two:
            base = weight2 if swapped[1] else weight
            to_weight = describe(base, (2, *weight.shape), (abs(weights_apart), *strides), (1, 1, *block))
            to_rows = describe_ragged(rows2 if swapped[0] else rows, height, depth, abs(rows_apart))
        else:
            to_weight = describe(weight, tuple(weight.shape), strides, (1, *block))
            to_rows = describe_ragged(rows, height, depth) if way != BY_INDEX.value else None
        (_straight if to_rows is not None else _gathered)(
            ((pairs // height + experts) * blocks_of(width, columns), 1, 1),
            (rows, where, offsets_E, rows2, out),
            (pairs,),
            (rows.stride(0), hidden, width, transposed, way, two, *map(int, swapped), experts, power_of_two(experts))
            + (height, columns, depth, GROUP),
            warps,
            stages,
            (to_weight,) if to_rows is None else (to_weight, to_rows),
        )


@triton.jit
def _shift_of(where, offsets, expert, WAY: tl.constexpr):
    """From an expert's pairs to their rows."""
    shift = tl.zeros((), tl.int32)
    if WAY == FROM_STARTS:
        shift = tl.load(where + expert) - tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    return shift


@triton.jit
def _rows_of(where, pair, known, shift, row_stride: tl.constexpr, WAY: tl.constexpr):
    """Where the row of each pair begins, in elements [pairs, 1]."""
    row = tl.load(where + pair, mask=known, other=0) if WAY == BY_INDEX else tl.where(known, pair + shift, 0)
    return row.to(tl.int64)[:, None] * row_stride


@triton.jit
def _linear_tile(
    rows, where, weight, rows2, weight2, out, expert, shift, low, end, block,
    row_stride: tl.constexpr, hidden: tl.constexpr, width: tl.constexpr, TRANSPOSED: tl.constexpr, WAY: tl.constexpr,
    TWO: tl.constexpr, HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    pair = low + tl.arange(0, HEIGHT)
    known = pair < end
    row = _rows_of(where, pair, known, shift, row_stride, WAY)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    deep = tl.arange(0, DEPTH)
    EVEN: tl.constexpr = hidden % DEPTH == 0
    STEPS: tl.constexpr = (hidden + DEPTH - 1) // DEPTH
    STEP: tl.constexpr = width if TRANSPOSED else 1
    ACROSS: tl.constexpr = 1 if TRANSPOSED else hidden
    at = expert.to(tl.int64) * (width * hidden) + column.to(tl.int64)[None, :] * ACROSS + deep[:, None] * STEP
    total = tl.zeros((HEIGHT, COLUMNS), tl.float32)
    for step in range(0, STEPS * (1 + TWO)):
        start, from_rows, from_weight = step * DEPTH, rows, weight
        if TWO:  # one loop over both: two would be compiled, and filled and drained, one after the other
            behind = step >= STEPS
            start = tl.where(behind, start - STEPS * DEPTH, start)
            from_rows = tl.where(behind, rows2, rows)
            from_weight = tl.where(behind, weight2, weight)
        left = deep + start < hidden
        value = _row_at(from_rows + row, (deep + start)[None, :], left[None, :], EVEN)
        weights = _weight_at(from_weight + start * STEP, at, left[:, None] & inside[None, :], width, COLUMNS, EVEN)
        total = tl.dot(value, weights, total, input_precision="ieee")
    mask = known[:, None] & inside[None, :]
    tl.store(out + pair.to(tl.int64)[:, None] * width + column[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["limit"])
def _linear_kernel(
    rows, where, offsets, weight, rows2, weight2, out, limit,
    row_stride: tl.constexpr, hidden: tl.constexpr, width: tl.constexpr, TRANSPOSED: tl.constexpr, WAY: tl.constexpr,
    TWO: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr,
    HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    ACROSS: tl.constexpr = (width + COLUMNS - 1) // COLUMNS
    expert, low, end, block = _find_tile(offsets, limit, EXPERTS, PADDED, ACROSS, HEIGHT, GROUP)
    if (expert < EXPERTS) & (low < end):
        shift = _shift_of(where, offsets, expert, WAY)
        if end - low > HEIGHT // 2:
            _linear_tile(
                rows, where, weight, rows2, weight2, out, expert, shift, low, end, block,
                row_stride, hidden, width, TRANSPOSED, WAY, TWO, HEIGHT, COLUMNS, DEPTH,
            )  # fmt: skip
        else:
            _linear_tile(
                rows, where, weight, rows2, weight2, out, expert, shift, low, end, block,
                row_stride, hidden, width, TRANSPOSED, WAY, TWO, HEIGHT // 2, COLUMNS, DEPTH,
            )  # fmt: skip


@triton.jit
def _described_tile(
    rows, where, rows2, out, to_weight, to_rows, expert, shift, low, end, block,
    row_stride: tl.constexpr, hidden: tl.constexpr, width: tl.constexpr, TRANSPOSED: tl.constexpr, WAY: tl.constexpr,
    TWO: tl.constexpr, ROWS_SWAPPED: tl.constexpr, WEIGHTS_SWAPPED: tl.constexpr, BY_ENGINE: tl.constexpr,
    HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """As `_linear_tile`, the weights by the copy engine, and with BY_ENGINE the rows.

    The order of the sum is that of the operands, wherever they lie.
    """
    pair = low + tl.arange(0, HEIGHT)
    known = pair < end
    row = _rows_of(where, pair, known, shift, row_stride, WAY)
    from_row, behind = low + shift, end + shift
    deep = tl.arange(0, DEPTH)
    STEPS: tl.constexpr = (hidden + DEPTH - 1) // DEPTH
    total = tl.zeros((HEIGHT, COLUMNS), tl.float32)
    for step in range(0, STEPS * (1 + TWO)):
        which = tl.where(step >= STEPS, 1, 0)
        start = (step - which * STEPS) * DEPTH
        if BY_ENGINE and TWO:
            value = to_rows.load([which ^ ROWS_SWAPPED, RAGGED, behind, RAGGED - behind + from_row, start])
            value = value.reshape(HEIGHT, DEPTH)
        elif BY_ENGINE:
            value = to_rows.load([RAGGED, behind, RAGGED - behind + from_row, start]).reshape(HEIGHT, DEPTH)
        else:
            base = tl.where(which == 1, rows2, rows) if TWO else rows
            value = _row_at(base + row, (deep + start)[None, :], (deep + start < hidden)[None, :], hidden % DEPTH == 0)
        if TWO and TRANSPOSED:
            part = to_weight.load([which ^ WEIGHTS_SWAPPED, expert, start, block * COLUMNS]).reshape(DEPTH, COLUMNS)
        elif TWO:
            part = to_weight.load([which ^ WEIGHTS_SWAPPED, expert, block * COLUMNS, start]).reshape(COLUMNS, DEPTH).T
        elif TRANSPOSED:
            part = to_weight.load([expert, start, block * COLUMNS]).reshape(DEPTH, COLUMNS)
        else:
            part = to_weight.load([expert, block * COLUMNS, start]).reshape(COLUMNS, DEPTH).T
        total = tl.dot(value, part, total, input_precision="ieee")
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    mask = known[:, None] & (column < width)[None, :]
    tl.store(out + pair.to(tl.int64)[:, None] * width + column[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _described(
    rows, where, offsets, rows2, out, to_weight, to_rows, limit,
    row_stride: tl.constexpr, hidden: tl.constexpr, width: tl.constexpr, TRANSPOSED: tl.constexpr, WAY: tl.constexpr,
    TWO: tl.constexpr, ROWS_SWAPPED: tl.constexpr, WEIGHTS_SWAPPED: tl.constexpr,
    EXPERTS: tl.constexpr, PADDED: tl.constexpr,
    HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    ACROSS: tl.constexpr = (width + COLUMNS - 1) // COLUMNS
    expert, low, end, block = _find_tile(offsets, limit, EXPERTS, PADDED, ACROSS, HEIGHT, TILES)
    if (expert < EXPERTS) & (low < end):
        shift = _shift_of(where, offsets, expert, WAY)
        if end - low > HEIGHT // 2:
            _described_tile(
                rows, where, rows2, out, to_weight, to_rows, expert, shift, low, end, block, row_stride, hidden, width,
                TRANSPOSED, WAY, TWO, ROWS_SWAPPED, WEIGHTS_SWAPPED, WAY != BY_INDEX, HEIGHT, COLUMNS, DEPTH,
            )  # fmt: skip
        else:
            _described_tile(
                rows, where, rows2, out, to_weight, to_rows, expert, shift, low, end, block, row_stride, hidden, width,
                TRANSPOSED, WAY, TWO, ROWS_SWAPPED, WEIGHTS_SWAPPED, False, HEIGHT // 2, COLUMNS, DEPTH,
            )  # fmt: skip


@triton.jit(do_not_specialize=["limit"])
def _straight_kernel(
    rows, where, offsets, rows2, out, to_weight, to_rows, limit,
    row_stride: tl.constexpr, hidden: tl.constexpr, width: tl.constexpr, TRANSPOSED: tl.constexpr, WAY: tl.constexpr,
    TWO: tl.constexpr,
    ROWS_SWAPPED: tl.constexpr, WEIGHTS_SWAPPED: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr,
    HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    _described(
        rows, where, offsets, rows2, out, to_weight, to_rows, limit, row_stride, hidden, width, TRANSPOSED, WAY,
        TWO, ROWS_SWAPPED, WEIGHTS_SWAPPED, EXPERTS, PADDED, HEIGHT, COLUMNS, DEPTH, TILES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["limit"])
def _gathered_kernel(
    rows, where, offsets, rows2, out, to_weight, limit,
    row_stride: tl.constexpr, hidden: tl.constexpr, width: tl.constexpr, TRANSPOSED: tl.constexpr, WAY: tl.constexpr,
    TWO: tl.constexpr,
    ROWS_SWAPPED: tl.constexpr, WEIGHTS_SWAPPED: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr,
    HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    _described(
        rows, where, offsets, rows2, out, to_weight, to_weight, limit, row_stride, hidden, width, TRANSPOSED, WAY,
        TWO, ROWS_SWAPPED, WEIGHTS_SWAPPED, EXPERTS, PADDED, HEIGHT, COLUMNS, DEPTH, TILES,
    )  # fmt: skip


_linear = Kernel(_linear_kernel)
_straight, _gathered = Kernel(_straight_kernel), Kernel(_gathered_kernel)
