"""Weight gradients of grouped GEMMs by Triton kernels that read one operand's rows through an index.

Legend: R rows, S pairs sorted by expert, E experts held here, H hidden, N columns of the other operand.

An expert has few pairs, so a tile of its gradient takes few steps: what is before the first step and behind the last
one would take as long as a third of the products. So where the copy engine can load the other operand, a program goes
through the steps of several tiles in one loop whose loads are pipelined across tiles, and the copy engine writes a tile
during the products of the next one. Elsewhere a program computes one tile. Which step adds to which tile is fixed:
results do not depend on timing.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fluid_hf.comm.spared import spared_now
from fluid_hf.launch import RAGGED, Kernel, blocks_of, can_describe, describe, describe_ragged, power_of_two
from fluid_hf.moe.gemm_kernels import product_tile, shared_bytes

__all__ = ["gathered_wgrad"]

GROUP = 8  # rows of tiles whose columns are computed together
# Programs that follow each other on a multiprocessor, if each has as many tiles. One fills and drains its pipeline
# once, and was 5 to 20% faster than four. Beside communication that nobody leaves multiprocessors to there are four:
# with one, a program that finds its multiprocessor taken would start when the others are done.
ROUNDS, ROUNDS_BESIDE = 1, 4
# Parts of a tile, side by side, that the copy engine writes after each other through one part's shared memory: with two
# all loads of a tile keep their stages. 0: threads write, and products wait for that.
PARTS = 2


class _Tile(NamedTuple):
    height: int
    columns: int
    depth: int
    warps: int
    stages: int
    beside: int  # programs on a multiprocessor


@functools.cache
def _processors(device: int | None) -> int:
    if device is None or not torch.cuda.is_available():
        return 3
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _programs_at_once(each: int, device: int | None, shared: bool) -> tuple[int, int]:
    """Programs that run at once, `each` of them on a multiprocessor, and how many rounds of them there are to be.

    Multiprocessors that torch's GEMMs leave to messages are left to them here too. Of those that are `shared` and not
    left, the messages take what they need.
    """
    spared = spared_now()
    return each * max(1, _processors(device) - spared), ROUNDS_BESIDE if shared and not spared else ROUNDS


def gathered_wgrad(
    rows_RH: torch.Tensor,
    where_S: torch.Tensor,
    unit: int,
    other_SN: torch.Tensor,
    offsets_E: torch.Tensor,
    rows_first: bool,
    shared: bool = False,
) -> torch.Tensor:
    """Sum over each expert's pairs of the product of a gathered row and a row of `other_SN`.

    Args:
        rows_RH: any row stride, elements of a row side by side.
        where_S: row of each pair, int32, with `unit` 0; else int64, where each pair's row lies: so many times `unit`
            elements from the first row (rows may lie in several buffers).
        other_SN: contiguous.
        rows_first: the result is [E, H, N], otherwise [E, N, H].
        shared: whether kernels that move messages may hold some of the multiprocessors.
    """
    hidden, (pairs, width), experts = rows_RH.shape[1], other_SN.shape, offsets_E.shape[0]
    shape = (hidden, width) if rows_first else (width, hidden)
    out = other_SN.new_empty(experts, *shape)
    if not pairs:
        return out.zero_()
    sizes = rows_RH.stride(0), unit, hidden, width, rows_first
    if can_describe(other_SN):
        parts = PARTS if can_describe(out) else 0
        tile = _tile_of(out, rows_first, parts)
        _through_tiles(rows_RH, where_S, other_SN, offsets_E, out, sizes, tile, parts, shared)
        return out
    height, columns, depth, warps, stages = product_tile(other_SN, 128, 3 if rows_first else 2, warps=4)
    _wgrad(
        (experts * blocks_of(shape[0], height) * blocks_of(shape[1], columns), 1, 1),
        (rows_RH, where_S, other_SN, offsets_E, out),
        (),
        (*sizes, height, columns, depth, GROUP),
        warps,
        stages,
    )
    return out


def _tile_of(out: torch.Tensor, rows_first: bool, parts: int) -> _Tile:
    """Tile of a result that is written in `parts`."""
    tall_fits, wide_fits = (blocks_of(size, 256) * 2 <= blocks_of(size, 128) for size in out.shape[1:])
    # Four stages of a tile take 192 KB, its part 32.
    if not rows_first and parts >= 2 and tall_fits and shared_bytes(out.device.index) >= 224 * 1024:
        return _Tile(256, 128, 64, 8, 4, 1)
    # 256 columns read the rows' tile from shared memory least often, unless more is computed then than is there.
    return _Tile(128, 256, 64, 8, 3, 1) if wide_fits else _Tile(128, 128, 64, 4, 3, 2)


def _through_tiles(
    rows_RH: torch.Tensor,
    where_S: torch.Tensor,
    other_SN: torch.Tensor,
    offsets_E: torch.Tensor,
    out: torch.Tensor,
    sizes: tuple[int, int, int, int, bool],
    tile: _Tile,
    parts: int,
    shared: bool,
) -> None:
    """Queue the kernel that goes through several tiles; with `parts` the copy engine can write `out`."""
    (experts, tall, wide), rows_first = out.shape, sizes[-1]
    height, columns, depth, warps, stages, beside = tile
    tiles = experts * blocks_of(tall, height) * blocks_of(wide, columns)
    at_once, rounds = _programs_at_once(beside, out.device.index, shared)
    programs = min(tiles, at_once * max(1, min(rounds, tiles // (rounds * at_once))))
    described = [describe_ragged(other_SN, depth, columns if rows_first else height)]
    constants = (*sizes, experts, power_of_two(experts), programs, height, columns, depth, GROUP)
    if parts:
        described.append(_tiles_of(out, height, columns // parts))
    else:
        constants = (None, *constants)  # in the place of the result's descriptor
    grid, pointers = (programs, 1, 1), (rows_RH, where_S, offsets_E, out)
    _wgrad_through(grid, pointers, (), (*constants, parts), warps, stages, tuple(described))


def _tiles_of(out: torch.Tensor, height: int, columns: int) -> TensorDescriptor:
    """Descriptor of an expert's result in blocks; what lies outside of the expert's is not written."""
    experts, tall, wide = out.shape
    return describe(out, (experts, tall, wide), (tall * wide, wide, 1), (1, height, columns))


@triton.jit
def _place(tile, DOWN: tl.constexpr, ACROSS: tl.constexpr, GROUP: tl.constexpr):
    """Expert of a tile, its row and its column among the expert's tiles."""
    expert = tile // (DOWN * ACROSS)
    tile = tile % (DOWN * ACROSS)
    group = tile // (GROUP * ACROSS)
    size = tl.minimum(DOWN - group * GROUP, GROUP)
    tile -= group * GROUP * ACROSS
    return expert, group * GROUP + tile % size, tile // size


@triton.jit
def _part(base, row, block, known, width: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [DEPTH, BLOCK] of pairs, zero where there is no pair."""
    column = block * BLOCK + tl.arange(0, BLOCK)
    if width % BLOCK == 0:
        return tl.load(base + row + column[None, :], mask=known[:, None], other=0.0)
    return tl.load(base + row + column[None, :], mask=known[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def _store(
    total, out, expert, down, across, TALL: tl.constexpr, WIDE: tl.constexpr, HEIGHT: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    line = down * HEIGHT + tl.arange(0, HEIGHT)
    column = across * COLUMNS + tl.arange(0, COLUMNS)
    to = out + expert.to(tl.int64) * (TALL * WIDE) + line.to(tl.int64)[:, None] * WIDE + column[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(line < TALL)[:, None] & (column < WIDE)[None, :])


@triton.jit
def _put(into, total, expert, row, column, PARTS: tl.constexpr):
    """Leave a tile to the copy engine, which writes nothing outside of the result."""
    HEIGHT: tl.constexpr = total.shape[0]
    WIDTH: tl.constexpr = total.shape[1] // PARTS
    if PARTS == 1:
        into.store([expert, row, column], total.to(into.dtype).reshape(1, HEIGHT, WIDTH))
    else:
        left, right = total.reshape(HEIGHT, 2, WIDTH * PARTS // 2).permute(0, 2, 1).split()
        _put(into, left, expert, row, column, PARTS // 2)
        _put(into, right, expert, row, column + WIDTH * PARTS // 2, PARTS // 2)


@triton.jit
def _wgrad_kernel(
    rows, where, other, offsets, out,
    row_stride: tl.constexpr, UNIT: tl.constexpr, hidden: tl.constexpr, width: tl.constexpr,
    ROWS_FIRST: tl.constexpr, HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    TALL: tl.constexpr = hidden if ROWS_FIRST else width
    WIDE: tl.constexpr = width if ROWS_FIRST else hidden
    expert, down, across = _place(
        tl.program_id(0), (TALL + HEIGHT - 1) // HEIGHT, (WIDE + COLUMNS - 1) // COLUMNS, GROUP
    )  # fmt: skip
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    total = tl.zeros((HEIGHT, COLUMNS), tl.float32)
    for low in range(start, end, DEPTH):
        pair = low + tl.arange(0, DEPTH)
        known = pair < end
        at = tl.load(where + pair, mask=known, other=0).to(tl.int64)
        row = (at * (row_stride if UNIT == 0 else UNIT))[:, None]
        place = pair.to(tl.int64)[:, None] * width
        if ROWS_FIRST:
            left = _part(rows, row, down, known, hidden, HEIGHT)
            right = _part(other, place, across, known, width, COLUMNS)
        else:
            left = _part(other, place, down, known, width, HEIGHT)
            right = _part(rows, row, across, known, hidden, COLUMNS)
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
    _store(total, out, expert, down, across, TALL, WIDE, HEIGHT, COLUMNS)


@triton.jit
def _num_steps(
    offsets, EXPERTS: tl.constexpr, PADDED: tl.constexpr, TILES: tl.constexpr, PROGRAMS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """Steps of every PROGRAMS-th of the EXPERTS * TILES tiles from this program's; no pairs make one step too."""
    expert = tl.arange(0, PADDED)
    inside = expert < EXPERTS
    end = tl.load(offsets + expert, mask=inside, other=0)
    start = tl.load(offsets + expert - 1, mask=inside & (expert > 0), other=0)
    each = tl.maximum((end - start + DEPTH - 1) // DEPTH, 1)
    shift = PROGRAMS - 1 - tl.program_id(0)
    mine = (expert * TILES + TILES + shift) // PROGRAMS - (expert * TILES + shift) // PROGRAMS
    return tl.sum(tl.where(inside, mine * each, 0), 0)


@triton.jit
def _wgrad_through_kernel(
    rows, where, offsets, out, other, into,
    row_stride: tl.constexpr, UNIT: tl.constexpr, hidden: tl.constexpr, width: tl.constexpr,
    ROWS_FIRST: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr, PROGRAMS: tl.constexpr,
    HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    TALL: tl.constexpr = hidden if ROWS_FIRST else width
    WIDE: tl.constexpr = width if ROWS_FIRST else hidden
    DOWN: tl.constexpr = (TALL + HEIGHT - 1) // HEIGHT
    ACROSS: tl.constexpr = (WIDE + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0)
    expert, down, across = _place(tile, DOWN, ACROSS, GROUP)
    low = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    total = tl.zeros((HEIGHT, COLUMNS), tl.float32)
    step = tl.arange(0, DEPTH)
    # Read one step ahead: loads whose addresses are loaded in the same step get half of the pipeline's stages.
    at = tl.load(where + low + step, mask=low + step < end, other=0)
    for _ in range(0, _num_steps(offsets, EXPERTS, PADDED, DOWN * ACROSS, PROGRAMS, DEPTH)):
        known = low + step < end
        row = (at.to(tl.int64) * (row_stride if UNIT == 0 else UNIT))[:, None]
        if ROWS_FIRST:
            left = _part(rows, row, down, known, hidden, HEIGHT)
            right = other.load([RAGGED, end, RAGGED - end + low, across * COLUMNS]).reshape(DEPTH, COLUMNS)
        else:
            left = other.load([RAGGED, end, RAGGED - end + low, down * HEIGHT]).reshape(DEPTH, HEIGHT)
            right = _part(rows, row, across, known, hidden, COLUMNS)
        to_expert, to_down, to_across = expert, down, across
        low += DEPTH
        last = low >= end
        if last:  # the next step is the next tile's first
            tile += PROGRAMS
            expert, down, across = _place(tl.minimum(tile, EXPERTS * DOWN * ACROSS - 1), DOWN, ACROSS, GROUP)
            low = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
            end = tl.load(offsets + expert)
        # Not inside of the branch, where it would keep Triton from pipelining.
        at = tl.load(where + low + step, mask=low + step < end, other=0)
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
        if last:
            if PARTS > 0:
                _put(into, total, to_expert, to_down * HEIGHT, to_across * COLUMNS, PARTS)
            else:
                _store(total, out, to_expert, to_down, to_across, TALL, WIDE, HEIGHT, COLUMNS)
            total = tl.zeros((HEIGHT, COLUMNS), tl.float32)


_wgrad = Kernel(_wgrad_kernel)
_wgrad_through = Kernel(_wgrad_through_kernel)
