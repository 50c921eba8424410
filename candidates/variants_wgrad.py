"""Weight-gradient kernels to be compared with fluid_hf.moe.gemm_kernels._wgrad_kernel."""

import triton
import triton.language as tl
from triton.tools.ragged_tma import load_ragged

from fluid_hf.moe.gemm_kernels import _wgrad_part


@triton.jit
def _place(tile, DOWN: tl.constexpr, ACROSS: tl.constexpr, GROUP: tl.constexpr):
    """Expert of a tile, its row of tiles and its column of tiles: GROUP rows go together through the columns."""
    expert = tile // (DOWN * ACROSS)
    tile = tile % (DOWN * ACROSS)
    group = tile // (GROUP * ACROSS)
    size = tl.minimum(DOWN - group * GROUP, GROUP)
    tile -= group * GROUP * ACROSS
    return expert, group * GROUP + tile % size, tile // size


@triton.jit
def wgrad_carried(
    rows, where, other, offsets, out,
    row_stride: tl.constexpr, UNIT: tl.constexpr, hidden: tl.constexpr, width: tl.constexpr,
    ROWS_FIRST: tl.constexpr, HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    STREAM: tl.constexpr,
):  # fmt: skip
    """As the present kernel, but each step's rows are known one step ahead: their loads are pipelined at full depth."""
    TALL: tl.constexpr = hidden if ROWS_FIRST else width
    WIDE: tl.constexpr = width if ROWS_FIRST else hidden
    expert, down, across = _place(
        tl.program_id(0), (TALL + HEIGHT - 1) // HEIGHT, (WIDE + COLUMNS - 1) // COLUMNS, GROUP
    )
    line = down * HEIGHT + tl.arange(0, HEIGHT)
    column = across * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    total = tl.zeros((HEIGHT, COLUMNS), tl.float32)
    step = tl.arange(0, DEPTH)
    at = tl.load(where + start + step, mask=start + step < end, other=0)
    for low in range(start, end, DEPTH):
        pair = low + step
        known = pair < end
        row = (at.to(tl.int64) * (row_stride if UNIT == 0 else UNIT))[:, None]
        place = pair.to(tl.int64)[:, None] * width
        if ROWS_FIRST:
            left = _wgrad_part(rows, row, line, known, hidden, HEIGHT)
            right = _wgrad_part(other, place, column, known, width, COLUMNS)
        else:
            left = _wgrad_part(other, place, line, known, width, HEIGHT)
            right = _wgrad_part(rows, row, column, known, hidden, COLUMNS)
        at = tl.load(where + pair + DEPTH, mask=pair + DEPTH < end, other=0)
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
    to = out + expert.to(tl.int64) * (TALL * WIDE) + line.to(tl.int64)[:, None] * WIDE + column[None, :]
    inside = (line < TALL)[:, None] & (column < WIDE)[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=inside, cache_modifier=".cs" if STREAM else "")


@triton.jit
def _steps(
    offsets, EXPERTS: tl.constexpr, PADDED: tl.constexpr, TILES: tl.constexpr, PROGRAMS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """Steps of all of this program's tiles: every PROGRAMS-th of EXPERTS * TILES; no pairs make one step too."""
    expert = tl.arange(0, PADDED)
    inside = expert < EXPERTS
    end = tl.load(offsets + expert, mask=inside, other=0)
    start = tl.load(offsets + expert - 1, mask=inside & (expert > 0), other=0)
    each = tl.maximum((end - start + DEPTH - 1) // DEPTH, 1)
    shift = PROGRAMS - 1 - tl.program_id(0)
    mine = (expert * TILES + TILES + shift) // PROGRAMS - (expert * TILES + shift) // PROGRAMS
    return tl.sum(tl.where(inside, mine * each, 0), 0)


@triton.jit
def _other_part(
    other, low, start, end, place, block, column, known, width: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr
):
    if TMA:
        return load_ragged(other, start, end - start, [low - start, block * BLOCK])
    else:
        return _wgrad_part(other, place, column, known, width, BLOCK)


@triton.jit
def wgrad_persistent(
    rows, where, other, offsets, out,
    row_stride: tl.constexpr, UNIT: tl.constexpr, hidden: tl.constexpr, width: tl.constexpr,
    ROWS_FIRST: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr, PROGRAMS: tl.constexpr,
    LOAD_TMA: tl.constexpr, STORE_TMA: tl.constexpr, PARTS: tl.constexpr,
    HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """One loop over the steps of all tiles of a program: loads of the next tile are in flight during an epilogue.

    LOAD_TMA: `other` is a ragged tensor descriptor; STORE_TMA: `out` is a descriptor of [E, TALL, WIDE], stored in
    PARTS column blocks.
    """
    TALL: tl.constexpr = hidden if ROWS_FIRST else width
    WIDE: tl.constexpr = width if ROWS_FIRST else hidden
    DOWN: tl.constexpr = (TALL + HEIGHT - 1) // HEIGHT
    ACROSS: tl.constexpr = (WIDE + COLUMNS - 1) // COLUMNS
    steps = _steps(offsets, EXPERTS, PADDED, DOWN * ACROSS, PROGRAMS, DEPTH)
    tile = tl.program_id(0)
    expert, down, across = _place(tile, DOWN, ACROSS, GROUP)
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    low = start
    total = tl.zeros((HEIGHT, COLUMNS), tl.float32)
    step = tl.arange(0, DEPTH)
    at = tl.load(where + start + step, mask=start + step < end, other=0)
    for _ in range(0, steps):
        pair = low + step
        known = pair < end
        line = down * HEIGHT + tl.arange(0, HEIGHT)
        column = across * COLUMNS + tl.arange(0, COLUMNS)
        row = (at.to(tl.int64) * (row_stride if UNIT == 0 else UNIT))[:, None]
        place = pair.to(tl.int64)[:, None] * width
        if ROWS_FIRST:
            left = _wgrad_part(rows, row, line, known, hidden, HEIGHT)
            right = _other_part(other, low, start, end, place, across, column, known, width, COLUMNS, LOAD_TMA)
        else:
            left = _other_part(other, low, start, end, place, down, line, known, width, HEIGHT, LOAD_TMA)
            right = _wgrad_part(rows, row, column, known, hidden, COLUMNS)
        to_expert, to_down, to_across = expert, down, across
        low += DEPTH
        last = low >= end
        if last:
            tile += PROGRAMS
            expert, down, across = _place(tl.minimum(tile, EXPERTS * DOWN * ACROSS - 1), DOWN, ACROSS, GROUP)
            start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
            end = tl.load(offsets + expert)
            low = start
        at = tl.load(where + low + step, mask=low + step < end, other=0)
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
        if last:
            _store(total, out, to_expert, to_down, to_across, TALL, WIDE, HEIGHT, COLUMNS, STORE_TMA, PARTS, STREAM)
            total = tl.zeros((HEIGHT, COLUMNS), tl.float32)


@triton.jit
def _store(
    total, out, expert, down, across, TALL: tl.constexpr, WIDE: tl.constexpr, HEIGHT: tl.constexpr,
    COLUMNS: tl.constexpr, TMA: tl.constexpr, PARTS: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    PART: tl.constexpr = COLUMNS // PARTS
    if PARTS == 1:
        _store_part(total, out, expert, down * HEIGHT, across * COLUMNS, TALL, WIDE, HEIGHT, PART, TMA, STREAM)
    elif PARTS == 2:
        halves = total.reshape(HEIGHT, 2, PART).permute(0, 2, 1)
        first, second = halves.split()
        _store_part(first, out, expert, down * HEIGHT, across * COLUMNS, TALL, WIDE, HEIGHT, PART, TMA, STREAM)
        _store_part(second, out, expert, down * HEIGHT, across * COLUMNS + PART, TALL, WIDE, HEIGHT, PART, TMA, STREAM)


@triton.jit
def _store_part(
    part, out, expert, top, left, TALL: tl.constexpr, WIDE: tl.constexpr, HEIGHT: tl.constexpr, PART: tl.constexpr,
    TMA: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    if TMA:
        out.store([expert, top, left], part.to(out.dtype).reshape(1, HEIGHT, PART))
    else:
        line = top + tl.arange(0, HEIGHT)
        column = left + tl.arange(0, PART)
        to = out + expert.to(tl.int64) * (TALL * WIDE) + line.to(tl.int64)[:, None] * WIDE + column[None, :]
        inside = (line < TALL)[:, None] & (column < WIDE)[None, :]
        tl.store(to, part.to(out.dtype.element_ty), mask=inside, cache_modifier=".cs" if STREAM else "")
