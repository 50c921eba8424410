"""Variants of fluid_hf.moe.gemm_kernels._gated_kernel and _linear_kernel, to be compared with them."""

import triton
import triton.language as tl

from fluid_hf.moe.gemm_kernels import _row_at, _weight_at


@triton.jit
def _tile_ends(
    offsets, limit, EXPERTS: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr
):
    """Number of the first tile behind each expert's, packed with the expert behind it: 2**24 tiles at most."""
    expert = tl.arange(0, PADDED)
    inside = expert < EXPERTS
    end = tl.minimum(tl.load(offsets + expert, mask=inside, other=0), limit)
    start = tl.minimum(tl.load(offsets + expert - 1, mask=inside & (expert > 0), other=0), limit)
    blocks = tl.where(inside, (end - start + HEIGHT - 1) // HEIGHT, 0)
    last = tl.cumsum(blocks, 0) * COLUMNS
    return last.to(tl.int64) + ((expert + 1).to(tl.int64) << 24)


@triton.jit
def _find_quick(
    tile, ends, offsets, limit, EXPERTS: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr, GROUP: tl.constexpr
):
    """As `_find_tile`, in one reduction; EXPERTS for a tile behind the last one."""
    before = tl.max(tl.where((ends & 0xFFFFFF) <= tile, ends, 0), 0)
    expert = tl.minimum(before >> 24, EXPERTS).to(tl.int32)
    known = expert < EXPERTS
    low = tl.minimum(tl.load(offsets + expert - 1, mask=known & (expert > 0), other=0), limit)
    high = tl.minimum(tl.load(offsets + expert, mask=known, other=0), limit)
    place = tile - (before & 0xFFFFFF).to(tl.int32)
    number = (high - low + HEIGHT - 1) // HEIGHT
    group = place // (GROUP * COLUMNS)
    size = tl.maximum(tl.minimum(number - group * GROUP, GROUP), 1)
    place -= group * GROUP * COLUMNS
    return expert, low + (group * GROUP + place % size) * HEIGHT, high, place // size


@triton.jit
def _gate_part(weight, desc, row, at, start, mask, inner: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr,
               TMA: tl.constexpr):  # fmt: skip
    """[DEPTH, COLUMNS] of a weight."""
    if TMA:
        return desc.load([row, start]).T
    else:
        return _weight_at(weight, at, mask, inner, COLUMNS, EVEN)


@triton.jit
def _gated_end(
    sum_gate, sum_up, pair_slot, weights, kept_gate, kept_up, hidden_out, low, end, column,
    inner: tl.constexpr, width: tl.constexpr, weights_stride: tl.constexpr, top_k: tl.constexpr, KEEP: tl.constexpr,
    HEIGHT: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    CACHE: tl.constexpr = ".cs" if STREAM else ""
    pair = low + tl.arange(0, HEIGHT)
    known = pair < end
    inside = column < inner
    slot = tl.load(pair_slot + pair, mask=known, other=0)
    to_weight = weights + (slot // top_k).to(tl.int64) * weights_stride + slot % top_k
    weight = tl.load(to_weight, mask=known, other=0.0).to(tl.float32)
    mask = known[:, None] & inside[None, :]
    place = pair.to(tl.int64)[:, None]
    sum_gate = sum_gate.to(hidden_out.dtype.element_ty)
    sum_up = sum_up.to(hidden_out.dtype.element_ty)
    if KEEP:
        tl.store(kept_gate + place * width + column[None, :], sum_gate, mask=mask, cache_modifier=CACHE)
        tl.store(kept_up + place * width + column[None, :] + (width - inner), sum_up, mask=mask, cache_modifier=CACHE)
    value = sum_gate.to(tl.float32)
    value = value * tl.sigmoid(value) * sum_up.to(tl.float32) * weight[:, None]
    tl.store(hidden_out + place * inner + column[None, :], value.to(hidden_out.dtype.element_ty), mask=mask)


@triton.jit
def _gated_tile(
    rows, pair_row, pair_slot, gate, up, weights, kept_gate, kept_up, hidden_out, expert, low, end, block,
    row_stride: tl.constexpr, hidden: tl.constexpr, inner: tl.constexpr, width: tl.constexpr,
    weights_stride: tl.constexpr, top_k: tl.constexpr, KEEP: tl.constexpr, TMA: tl.constexpr, STREAM: tl.constexpr,
    HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    pair = low + tl.arange(0, HEIGHT)
    row = rows + tl.load(pair_row + pair, mask=pair < end, other=0).to(tl.int64)[:, None] * row_stride
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < inner
    deep = tl.arange(0, DEPTH)
    EVEN: tl.constexpr = hidden % DEPTH == 0
    at = expert.to(tl.int64) * (width * hidden) + column.to(tl.int64)[None, :] * hidden + deep[:, None]
    second = (width - inner) * hidden
    first_row = expert * width + block * COLUMNS
    sum_gate = tl.zeros((HEIGHT, COLUMNS), tl.float32)
    sum_up = tl.zeros((HEIGHT, COLUMNS), tl.float32)
    for start in range(0, hidden, DEPTH):
        left = deep + start < hidden
        mask = left[:, None] & inside[None, :]
        value = _row_at(row, (deep + start)[None, :], left[None, :], EVEN)
        gates = _gate_part(gate, gate, first_row, at + start, start, mask, inner, COLUMNS, EVEN, TMA)
        ups = _gate_part(up, up, first_row + (width - inner), at + start + second, start, mask, inner, COLUMNS, EVEN, TMA)
        sum_gate = tl.dot(value, gates, sum_gate, input_precision="ieee")
        sum_up = tl.dot(value, ups, sum_up, input_precision="ieee")
    _gated_end(
        sum_gate, sum_up, pair_slot, weights, kept_gate, kept_up, hidden_out, low, end, column,
        inner, width, weights_stride, top_k, KEEP, HEIGHT, STREAM,
    )  # fmt: skip


@triton.jit(do_not_specialize=["limit"])
def gated_quick(
    rows, pair_row, pair_slot, offsets, gate, up, weights, kept_gate, kept_up, hidden_out, limit,
    row_stride: tl.constexpr, hidden: tl.constexpr, inner: tl.constexpr, width: tl.constexpr,
    weights_stride: tl.constexpr, top_k: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr,
    KEEP: tl.constexpr, TMA: tl.constexpr, STREAM: tl.constexpr,
    HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The present kernel with the tile found in two steps instead of seven; TMA: gate and up are descriptors."""
    ACROSS: tl.constexpr = (inner + COLUMNS - 1) // COLUMNS
    ends = _tile_ends(offsets, limit, EXPERTS, PADDED, ACROSS, HEIGHT)
    expert, low, end, block = _find_quick(tl.program_id(0), ends, offsets, limit, EXPERTS, ACROSS, HEIGHT, GROUP)
    if (expert < EXPERTS) & (low < end):
        if end - low > HEIGHT // 2:
            _gated_tile(
                rows, pair_row, pair_slot, gate, up, weights, kept_gate, kept_up, hidden_out, expert, low, end, block,
                row_stride, hidden, inner, width, weights_stride, top_k, KEEP, TMA, STREAM, HEIGHT, COLUMNS, DEPTH,
            )  # fmt: skip
        else:
            _gated_tile(
                rows, pair_row, pair_slot, gate, up, weights, kept_gate, kept_up, hidden_out, expert, low, end, block,
                row_stride, hidden, inner, width, weights_stride, top_k, KEEP, TMA, STREAM, HEIGHT // 2, COLUMNS, DEPTH,
            )  # fmt: skip


@triton.jit
def _both(
    gate, up, expert, block, start, hidden: tl.constexpr, inner: tl.constexpr, width: tl.constexpr,
    TMA: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """[DEPTH, 2 * COLUMNS] of gate and, beside it, of up. TMA: `gate` is a descriptor of [E, 2, I, H]."""
    if TMA:
        return gate.load([expert, 0, block * COLUMNS, start]).reshape(2 * COLUMNS, DEPTH).T
    else:
        both = tl.arange(0, 2 * COLUMNS)
        column = block * COLUMNS + both % COLUMNS
        deep = start + tl.arange(0, DEPTH)
        at = expert.to(tl.int64) * (width * hidden) + column.to(tl.int64)[None, :] * hidden + deep[:, None]
        second = (width - inner) * hidden
        to = tl.where(both[None, :] >= COLUMNS, up + at + second, gate + at)
        if inner % COLUMNS == 0 and hidden % DEPTH == 0:
            return tl.load(to)
        else:
            return tl.load(to, mask=(deep < hidden)[:, None] & (column < inner)[None, :], other=0.0)


@triton.jit
def _joined_end(
    total, pair_slot, weights, kept_gate, kept_up, hidden_out, low, end, block,
    inner: tl.constexpr, width: tl.constexpr, weights_stride: tl.constexpr, top_k: tl.constexpr, KEEP: tl.constexpr,
    HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    sum_gate, sum_up = total.reshape(HEIGHT, 2, COLUMNS).permute(0, 2, 1).split()
    _gated_end(
        sum_gate, sum_up, pair_slot, weights, kept_gate, kept_up, hidden_out, low, end,
        block * COLUMNS + tl.arange(0, COLUMNS), inner, width, weights_stride, top_k, KEEP, HEIGHT, STREAM,
    )  # fmt: skip


@triton.jit
def _joined_tile(
    rows, pair_row, pair_slot, gate, up, weights, kept_gate, kept_up, hidden_out, expert, low, end, block,
    row_stride: tl.constexpr, hidden: tl.constexpr, inner: tl.constexpr, width: tl.constexpr,
    weights_stride: tl.constexpr, top_k: tl.constexpr, KEEP: tl.constexpr, TMA: tl.constexpr, STREAM: tl.constexpr,
    HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    pair = low + tl.arange(0, HEIGHT)
    row = rows + tl.load(pair_row + pair, mask=pair < end, other=0).to(tl.int64)[:, None] * row_stride
    deep = tl.arange(0, DEPTH)
    total = tl.zeros((HEIGHT, 2 * COLUMNS), tl.float32)
    for start in range(0, hidden, DEPTH):
        value = _row_at(row, (deep + start)[None, :], (deep + start < hidden)[None, :], hidden % DEPTH == 0)
        both = _both(gate, up, expert, block, start, hidden, inner, width, TMA, COLUMNS, DEPTH)
        total = tl.dot(value, both, total, input_precision="ieee")
    _joined_end(
        total, pair_slot, weights, kept_gate, kept_up, hidden_out, low, end, block,
        inner, width, weights_stride, top_k, KEEP, HEIGHT, COLUMNS, STREAM,
    )  # fmt: skip


@triton.jit(do_not_specialize=["limit"])
def gated_joined(
    rows, pair_row, pair_slot, offsets, gate, up, weights, kept_gate, kept_up, hidden_out, limit,
    row_stride: tl.constexpr, hidden: tl.constexpr, inner: tl.constexpr, width: tl.constexpr,
    weights_stride: tl.constexpr, top_k: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr,
    KEEP: tl.constexpr, TMA: tl.constexpr, STREAM: tl.constexpr,
    HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One product of 2 * COLUMNS columns instead of two: rows are read from shared memory once."""
    ACROSS: tl.constexpr = (inner + COLUMNS - 1) // COLUMNS
    ends = _tile_ends(offsets, limit, EXPERTS, PADDED, ACROSS, HEIGHT)
    expert, low, end, block = _find_quick(tl.program_id(0), ends, offsets, limit, EXPERTS, ACROSS, HEIGHT, GROUP)
    if (expert < EXPERTS) & (low < end):
        if end - low > HEIGHT // 2:
            _joined_tile(
                rows, pair_row, pair_slot, gate, up, weights, kept_gate, kept_up, hidden_out, expert, low, end, block,
                row_stride, hidden, inner, width, weights_stride, top_k, KEEP, TMA, STREAM, HEIGHT, COLUMNS, DEPTH,
            )  # fmt: skip
        else:
            _joined_tile(
                rows, pair_row, pair_slot, gate, up, weights, kept_gate, kept_up, hidden_out, expert, low, end, block,
                row_stride, hidden, inner, width, weights_stride, top_k, KEEP, TMA, STREAM, HEIGHT // 2, COLUMNS, DEPTH,
            )  # fmt: skip


@triton.jit(do_not_specialize=["limit"])
def gated_persistent(
    rows, pair_row, pair_slot, offsets, gate, up, weights, kept_gate, kept_up, hidden_out, limit,
    row_stride: tl.constexpr, hidden: tl.constexpr, inner: tl.constexpr, width: tl.constexpr,
    weights_stride: tl.constexpr, top_k: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr,
    KEEP: tl.constexpr, TMA: tl.constexpr, STREAM: tl.constexpr, PROGRAMS: tl.constexpr,
    HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`gated_joined` in one loop over the steps of all tiles of a program; no half tiles."""
    ACROSS: tl.constexpr = (inner + COLUMNS - 1) // COLUMNS
    STEPS: tl.constexpr = (hidden + DEPTH - 1) // DEPTH
    ends = _tile_ends(offsets, limit, EXPERTS, PADDED, ACROSS, HEIGHT)
    tiles = (tl.max(ends, 0) & 0xFFFFFF).to(tl.int32)
    tile = tl.program_id(0)
    expert, low, end, block = _find_quick(tile, ends, offsets, limit, EXPERTS, ACROSS, HEIGHT, GROUP)
    lines = tl.arange(0, HEIGHT)
    place = tl.load(pair_row + low + lines, mask=low + lines < end, other=0)
    deep = tl.arange(0, DEPTH)
    total = tl.zeros((HEIGHT, 2 * COLUMNS), tl.float32)
    start = 0
    for _ in range(0, tl.maximum((tiles - tile + PROGRAMS - 1) // PROGRAMS, 0) * STEPS):
        row = rows + place.to(tl.int64)[:, None] * row_stride
        value = _row_at(row, (deep + start)[None, :], (deep + start < hidden)[None, :], hidden % DEPTH == 0)
        both = _both(gate, up, expert, block, start, hidden, inner, width, TMA, COLUMNS, DEPTH)
        to_low, to_end, to_block = low, end, block
        start += DEPTH
        last = start >= hidden
        if last:
            start = 0
            tile += PROGRAMS
            expert, low, end, block = _find_quick(tile, ends, offsets, limit, EXPERTS, ACROSS, HEIGHT, GROUP)
            expert = tl.minimum(expert, EXPERTS - 1)
        # Outside of the branch: there, it would keep the loop from being pipelined.
        place = tl.load(pair_row + low + lines, mask=low + lines < end, other=0)
        total = tl.dot(value, both, total, input_precision="ieee")
        if last:
            _joined_end(
                total, pair_slot, weights, kept_gate, kept_up, hidden_out, to_low, to_end, to_block,
                inner, width, weights_stride, top_k, KEEP, HEIGHT, COLUMNS, STREAM,
            )  # fmt: skip
            total = tl.zeros((HEIGHT, 2 * COLUMNS), tl.float32)


@triton.jit
def _linear_weight(
    weight, at, expert, start, block, mask, hidden: tl.constexpr, width: tl.constexpr, TRANSPOSED: tl.constexpr,
    COLUMNS: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    if TMA:
        if TRANSPOSED:
            return weight.load([expert * hidden + start, block * COLUMNS])
        else:
            return weight.load([expert * width + block * COLUMNS, start]).T
    else:
        return _weight_at(weight, at, mask, width, COLUMNS, EVEN)


@triton.jit
def _linear_end(total, out, low, end, block, width: tl.constexpr, HEIGHT: tl.constexpr, COLUMNS: tl.constexpr):
    pair = low + tl.arange(0, HEIGHT)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    mask = (pair < end)[:, None] & (column < width)[None, :]
    tl.store(out + pair.to(tl.int64)[:, None] * width + column[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _linear_tile(
    rows, pair_row, weight, out, expert, low, end, block,
    row_stride: tl.constexpr, hidden: tl.constexpr, width: tl.constexpr, TRANSPOSED: tl.constexpr, GATHER: tl.constexpr,
    TMA: tl.constexpr, HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    pair = low + tl.arange(0, HEIGHT)
    known = pair < end
    row = tl.load(pair_row + pair, mask=known, other=0) if GATHER else tl.where(known, pair, 0)
    row = rows + row.to(tl.int64)[:, None] * row_stride
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    deep = tl.arange(0, DEPTH)
    EVEN: tl.constexpr = hidden % DEPTH == 0
    STEP: tl.constexpr = width if TRANSPOSED else 1
    ACROSS: tl.constexpr = 1 if TRANSPOSED else hidden
    at = expert.to(tl.int64) * (width * hidden) + column.to(tl.int64)[None, :] * ACROSS + deep[:, None] * STEP
    total = tl.zeros((HEIGHT, COLUMNS), tl.float32)
    for start in range(0, hidden, DEPTH):
        left = deep + start < hidden
        value = _row_at(row, (deep + start)[None, :], left[None, :], EVEN)
        mask = left[:, None] & inside[None, :]
        weights = _linear_weight(
            weight, at + start * STEP, expert, start, block, mask, hidden, width, TRANSPOSED, COLUMNS, EVEN, TMA
        )
        total = tl.dot(value, weights, total, input_precision="ieee")
    _linear_end(total, out, low, end, block, width, HEIGHT, COLUMNS)


@triton.jit(do_not_specialize=["limit"])
def linear_quick(
    rows, pair_row, offsets, weight, out, limit,
    row_stride: tl.constexpr, hidden: tl.constexpr, width: tl.constexpr, TRANSPOSED: tl.constexpr, GATHER: tl.constexpr,
    EXPERTS: tl.constexpr, PADDED: tl.constexpr, TMA: tl.constexpr,
    HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    ACROSS: tl.constexpr = (width + COLUMNS - 1) // COLUMNS
    ends = _tile_ends(offsets, limit, EXPERTS, PADDED, ACROSS, HEIGHT)
    expert, low, end, block = _find_quick(tl.program_id(0), ends, offsets, limit, EXPERTS, ACROSS, HEIGHT, GROUP)
    if (expert < EXPERTS) & (low < end):
        if end - low > HEIGHT // 2:
            _linear_tile(
                rows, pair_row, weight, out, expert, low, end, block,
                row_stride, hidden, width, TRANSPOSED, GATHER, TMA, HEIGHT, COLUMNS, DEPTH,
            )  # fmt: skip
        else:
            _linear_tile(
                rows, pair_row, weight, out, expert, low, end, block,
                row_stride, hidden, width, TRANSPOSED, GATHER, TMA, HEIGHT // 2, COLUMNS, DEPTH,
            )  # fmt: skip


@triton.jit(do_not_specialize=["limit"])
def linear_persistent(
    rows, pair_row, offsets, weight, out, limit,
    row_stride: tl.constexpr, hidden: tl.constexpr, width: tl.constexpr, TRANSPOSED: tl.constexpr, GATHER: tl.constexpr,
    EXPERTS: tl.constexpr, PADDED: tl.constexpr, TMA: tl.constexpr, PROGRAMS: tl.constexpr,
    HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One loop over the steps of all tiles of a program; no half tiles. TMA: hidden must be a multiple of DEPTH."""
    ACROSS: tl.constexpr = (width + COLUMNS - 1) // COLUMNS
    STEPS: tl.constexpr = (hidden + DEPTH - 1) // DEPTH
    EVEN: tl.constexpr = hidden % DEPTH == 0
    STEP: tl.constexpr = width if TRANSPOSED else 1
    BESIDE: tl.constexpr = 1 if TRANSPOSED else hidden
    ends = _tile_ends(offsets, limit, EXPERTS, PADDED, ACROSS, HEIGHT)
    tiles = (tl.max(ends, 0) & 0xFFFFFF).to(tl.int32)
    tile = tl.program_id(0)
    expert, low, end, block = _find_quick(tile, ends, offsets, limit, EXPERTS, ACROSS, HEIGHT, GROUP)
    lines = tl.arange(0, HEIGHT)
    place = low + lines
    if GATHER:
        place = tl.load(pair_row + low + lines, mask=low + lines < end, other=0)
    else:
        place = tl.where(low + lines < end, low + lines, 0)
    deep = tl.arange(0, DEPTH)
    total = tl.zeros((HEIGHT, COLUMNS), tl.float32)
    start = 0
    for _ in range(0, tl.maximum((tiles - tile + PROGRAMS - 1) // PROGRAMS, 0) * STEPS):
        left = deep + start < hidden
        column = block * COLUMNS + tl.arange(0, COLUMNS)
        at = expert.to(tl.int64) * (width * hidden) + column.to(tl.int64)[None, :] * BESIDE
        at += (deep + start)[:, None].to(tl.int64) * STEP
        row = rows + place.to(tl.int64)[:, None] * row_stride
        value = _row_at(row, (deep + start)[None, :], left[None, :], EVEN)
        mask = left[:, None] & (column < width)[None, :]
        weights = _linear_weight(weight, at, expert, start, block, mask, hidden, width, TRANSPOSED, COLUMNS, EVEN, TMA)
        to_low, to_end, to_block = low, end, block
        start += DEPTH
        last = start >= hidden
        if last:
            start = 0
            tile += PROGRAMS
            expert, low, end, block = _find_quick(tile, ends, offsets, limit, EXPERTS, ACROSS, HEIGHT, GROUP)
            expert = tl.minimum(expert, EXPERTS - 1)
        if GATHER:
            place = tl.load(pair_row + low + lines, mask=low + lines < end, other=0)
        else:
            place = tl.where(low + lines < end, low + lines, 0)
        total = tl.dot(value, weights, total, input_precision="ieee")
        if last:
            _linear_end(total, out, to_low, to_end, to_block, width, HEIGHT, COLUMNS)
            total = tl.zeros((HEIGHT, COLUMNS), tl.float32)
