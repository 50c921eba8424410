"""Triton kernels for the plans: counting sorts that are stable and equal from run to run.

Legend: T tokens, K experts per token, R rows, S pairs, E experts held here, P ranks. A sort has two launches: counts
per block, and placement, in which every block adds up the counts of the blocks before it. The plan of a dispatch sorts
its rows by rank and its own pairs by expert in the same two launches. Only integers are added atomically, so order
never matters.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from fluid_hf.launch import Kernel, Layout, blocks_of, new_int32, power_of_two, together

__all__ = ["most_rows", "pair_plan", "source_plan"]

SORT_BLOCK = 512  # slots of a block: few enough blocks to add up their counts, enough to fill the GPU
SUM_TILE = 4096
PLACE_TILE = 8192


def pair_plan(
    ids_RK: torch.Tensor,
    first_expert: int,
    num_experts: int,
    num_pairs: int,
    flag: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`pair_row_S`, `pair_slot_S`, `row_pair_RK` and `offsets_E` (all int32) of `make_pair_plan`.

    Args:
        ids_RK: expert ids of any integer type and row stride; held here if in [first_expert, first_expert + E).
        flag: int32 in host memory that gets `fluid_hf.comm.faults.OUT_OF_RANGE` if one is not held here.
        offsets: where `offsets_E` is written; a new tensor by default.
    """
    rows, top_k = ids_RK.shape
    slots = rows * top_k
    blocks = blocks_of(slots, SORT_BLOCK)
    keys, chunk = _key_tile(num_experts)
    shapes = (num_pairs,), (num_pairs,), (rows, top_k)
    partial, pair_row, pair_slot, row_pair = new_int32(ids_RK.device, together(blocks * keys, *shapes))
    if offsets is None:  # of its own: kept for the statistics, long after the others
        offsets = torch.empty(num_experts, dtype=torch.int32, device=ids_RK.device)
    if blocks == 0:
        offsets.zero_()
    else:
        integers = (slots, first_expert, blocks, num_pairs)
        constants = (ids_RK.stride(0), top_k, num_experts, SORT_BLOCK, keys)
        told = partial if flag is None else flag
        _count_pairs((blocks, 1, 1), (ids_RK, partial, told), integers[:2], (*constants, flag is not None))
        pointers = (ids_RK, partial, pair_row, pair_slot, row_pair, offsets)
        tiles = chunk, max(1, SUM_TILE // keys), flag is not None
        _place_pairs((blocks, 1, 1), pointers, integers, (*constants, *tiles))
    return pair_row, pair_slot, row_pair, offsets


def source_plan(
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    num_local_experts: int,
    ranks: int,
    skip_rank: int | None,
    parts: int,
    columns: int,
    words: tuple[int, ...] = (),
    offsets: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None]:
    """Counts and places of the rows to send, without waiting for the device.

    Args:
        index_TK, weights_TK: contiguous int64 expert ids, and routing weights.
        skip_rank: destination whose pairs stay here and are sorted too, or `None`.
        columns: of the counts, 1 + parts or more.
        words: none or two integers for the last columns.
        offsets: where `offsets_E` of the pair plan is written; a new tensor by default.

    Returns:
        counts [2, P, columns] as `HitMap` has them, with -1 for every number of rows if a weight is not finite, -2 if
        an expert id is out of range (`fluid_hf.comm.faults`);
        token_row [T, P] (the most rows there can be, `most_rows`, where there is none); the pair plan of the skipped
        rank's pairs, with T * K places. All int32.
    """
    (tokens, top_k), device = index_TK.shape, index_TK.device
    skip = -1 if skip_rank is None else skip_rank
    layout, blocks, constants, tiles = _source_sizes(tokens, top_k, num_local_experts, ranks, skip, parts, columns)
    partial, *own, token_row = new_int32(device, layout)
    if offsets is None:  # of its own: kept for the statistics, long after the others
        offsets = torch.empty(num_local_experts, dtype=torch.int32, device=device)
    own.append(offsets)
    # Of its own: it is handed to the process group.
    counts = torch.empty(2, ranks, columns, dtype=torch.int32, device=device)
    if tokens == 0:
        offsets.zero_()
        counts.zero_()
        for column, word in enumerate(words, columns - len(words)):
            counts[0, :, column].fill_(word)
    else:
        integers = (tokens, blocks, most_rows(tokens, top_k, ranks))
        pointers = (index_TK, weights_TK, partial, counts)
        _count_source((blocks, 1, 1), pointers, (tokens, *(words or (0, 0))), constants)
        pointers = (index_TK, partial, counts, token_row, *own)
        _place_source((blocks, 1, 1), pointers, integers, (*constants, *tiles))
    return counts, token_row, None if skip_rank is None else tuple(own)


def most_rows(tokens: int, top_k: int, ranks: int) -> int:
    """Upper bound of the rows that a rank can send, its own included."""
    return tokens * min(top_k, ranks)


@functools.lru_cache(maxsize=256)
def _source_sizes(
    tokens: int, top_k: int, num_experts: int, ranks: int, skip: int, parts: int, columns: int
) -> tuple[Layout, int, tuple[int, ...], tuple[int, int, int]]:
    """Of `source_plan`: layout of what it allocates, blocks, constants of both kernels and those of placement."""
    per_block = max(16, power_of_two(SORT_BLOCK // top_k))
    slots, blocks = power_of_two(per_block * top_k), blocks_of(tokens, per_block)
    padded, (keys, chunk) = power_of_two(ranks), _key_tile(num_experts)
    # What is counted per block lies together (`_parts`).
    shapes = (tokens * top_k,), (tokens * top_k,), (tokens, top_k), (tokens, ranks)
    layout = together(blocks * (padded + keys + 1), *shapes)
    constants = (top_k, num_experts, ranks, skip, parts, columns, per_block, slots, padded, keys)
    return layout, blocks, constants, (min(chunk, slots), max(1, SUM_TILE // padded), max(1, SUM_TILE // keys))


@functools.cache
def _key_tile(num_experts: int) -> tuple[int, int]:
    """Keys as a power of two, and the slots that are placed at once."""
    keys = max(2, power_of_two(num_experts))
    return keys, max(16, min(SORT_BLOCK, PLACE_TILE // keys))


@triton.jit
def _load_experts(ids, stride, slot, inside, top_k, first, num_experts):
    row = slot // top_k
    expert = tl.load(ids + row.to(tl.int64) * stride + slot % top_k, mask=inside, other=-1).to(tl.int64) - first
    held = inside & (expert >= 0) & (expert < num_experts)
    return tl.where(held, expert, 0).to(tl.int32), held


@triton.jit
def _starts(partial, block, num_blocks, TILE: tl.constexpr, KEYS: tl.constexpr):
    """For each key: where this block's items start, the first and last-plus-one place of all its items."""
    key = tl.arange(0, KEYS)
    before = tl.zeros([KEYS], dtype=tl.int32)
    total = tl.zeros([KEYS], dtype=tl.int32)
    for start in range(0, num_blocks, TILE):
        other = start + tl.arange(0, TILE)
        at = partial + other[:, None] * KEYS + key[None, :]
        tile = tl.load(at, mask=(other < num_blocks)[:, None], other=0)
        total += tl.sum(tile, 0)
        before += tl.sum(tl.where((other < block)[:, None], tile, 0), 0)
    end = tl.cumsum(total, 0)
    return end - total + before, end - total, end


@triton.jit
def _place_chunks(
    ids,
    stride,
    first_slot,
    limit,
    first,
    running,
    pair_row,
    pair_slot,
    row_pair,
    absent,
    top_k: tl.constexpr,
    num_experts: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    ALL: tl.constexpr,
):
    """Place the pairs of slots [first_slot, limit), in order, from `running` on.

    With ALL those of no expert here too, at the first one, so that no place is left undefined.
    """
    key = tl.arange(0, KEYS)
    for start in range(0, SLOTS, CHUNK):
        slot = first_slot + start + tl.arange(0, CHUNK)
        expert, held = _load_experts(ids, stride, slot, slot < limit, top_k, first, num_experts)
        if ALL:
            held = slot < limit
        chosen = ((expert[:, None] == key[None, :]) & held[:, None]).to(tl.int32)
        place = tl.sum(chosen * (tl.cumsum(chosen, 0) - 1 + running[None, :]), 1)
        tl.store(row_pair + slot, tl.where(held, place, absent), mask=slot < limit)
        tl.store(pair_row + place, slot // top_k, mask=held)
        tl.store(pair_slot + place, slot, mask=held)
        running += tl.sum(chosen, 0)


@triton.jit(do_not_specialize=["num_slots", "first"])
def _count_pairs_kernel(
    ids,
    partial,
    flag,
    num_slots,
    first,
    stride: tl.constexpr,
    top_k: tl.constexpr,
    num_experts: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    FLAGS: tl.constexpr,
):
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    expert, held = _load_experts(ids, stride, slot, slot < num_slots, top_k, first, num_experts)
    if FLAGS:  # all that write do write the same
        tl.store(flag, 2, mask=tl.sum(((slot < num_slots) & ~held).to(tl.int32), 0) > 0)
        held = slot < num_slots
    found = tl.histogram(tl.where(held, expert, 0), KEYS, mask=held)
    tl.store(partial + block * KEYS + tl.arange(0, KEYS), found.to(tl.int32))


@triton.jit(do_not_specialize=["num_slots", "first", "num_blocks", "absent"])
def _place_pairs_kernel(
    ids,
    partial,
    pair_row,
    pair_slot,
    row_pair,
    offsets,
    num_slots,
    first,
    num_blocks,
    absent,
    stride: tl.constexpr,
    top_k: tl.constexpr,
    num_experts: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    ALL: tl.constexpr,
):
    block = tl.program_id(0)
    running, _, end = _starts(partial, block, num_blocks, TILE, KEYS)
    key = tl.arange(0, KEYS)
    tl.store(offsets + key, end, mask=(key < num_experts) & (block == 0))
    at = block * BLOCK
    limit = tl.minimum(at + BLOCK, num_slots)
    _place_chunks(
        ids, stride, at, limit, first, running, pair_row, pair_slot, row_pair, absent,
        top_k, num_experts, BLOCK, CHUNK, KEYS, ALL,
    )  # fmt: skip


@triton.jit
def _hits(index, token, num_tokens, num_local, skip, TOP_K: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Number of each token's experts on each rank, and whether a row goes there."""
    rank = tl.arange(0, PADDED)
    found = tl.zeros([BLOCK, PADDED], dtype=tl.int32)
    for k in tl.static_range(TOP_K):
        expert = tl.load(index + token.to(tl.int64) * TOP_K + k, mask=token < num_tokens, other=-1).to(tl.int32)
        owner = tl.where(expert >= 0, expert // num_local, -1)
        found += (owner[:, None] == rank[None, :]).to(tl.int32)
    sent = ((found > 0) & (rank != skip)[None, :]).to(tl.int32)
    return found, sent


@triton.jit
def _parts(partial, num_blocks, PADDED: tl.constexpr, KEYS: tl.constexpr):
    """Where the counts of each block begin: rows by rank, pairs by expert (most of them: aligned), the flag."""
    row_counts = partial + num_blocks * KEYS
    return row_counts, partial, row_counts + num_blocks * PADDED


@triton.jit(do_not_specialize=["num_tokens", "word", "last_word"])
def _count_source_kernel(
    index,
    weights,
    partial,
    counts,
    num_tokens,
    word,
    last_word,
    TOP_K: tl.constexpr,
    num_local: tl.constexpr,
    num_ranks: tl.constexpr,
    skip: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    PADDED: tl.constexpr,
    KEYS: tl.constexpr,
):
    block = tl.program_id(0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    rank = tl.arange(0, PADDED)
    _, sent = _hits(index, token, num_tokens, num_local, skip, TOP_K, PADDED, BLOCK)
    row_counts, pair_counts, flags = _parts(partial, tl.num_programs(0), PADDED, KEYS)
    tl.store(row_counts + block * PADDED + rank, tl.sum(sent, 0))
    for column in tl.static_range(COLUMNS):  # placement adds to those of the parts
        value = tl.zeros_like(rank)
        if column > PARTS and column >= COLUMNS - 2:
            value += word if column == COLUMNS - 2 else last_word
        tl.store(counts + rank * COLUMNS + column, value, mask=(rank < num_ranks) & (block == 0))
    slot = block * BLOCK * TOP_K + tl.arange(0, SLOTS)
    limit = tl.minimum((block + 1) * BLOCK, num_tokens) * TOP_K
    weight = tl.load(weights + slot, mask=slot < limit, other=0.0).to(tl.float32)
    chosen = tl.load(index + slot, mask=slot < limit, other=0)
    status = (weight - weight != 0).to(tl.int32)  # NaN for NaN and Inf
    status = tl.where((chosen < 0) | (chosen >= num_local * num_ranks), 2, status)
    tl.store(flags + block, tl.max(status, 0))
    if skip >= 0:
        expert, held = _load_experts(index, TOP_K, slot, slot < limit, TOP_K, skip * num_local, num_local)
        found = tl.histogram(tl.where(held, expert, 0), KEYS, mask=held)
        tl.store(pair_counts + block * KEYS + tl.arange(0, KEYS), found.to(tl.int32))


@triton.jit
def _place_rows(
    found,
    sent,
    token,
    block,
    row_counts,
    flags,
    counts,
    token_row,
    num_tokens,
    num_blocks,
    absent,
    num_ranks: tl.constexpr,
    skip: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Rows of a block's tokens, and the counts of their parts."""
    rank = tl.arange(0, PADDED)
    known = rank < num_ranks
    here, start, end = _starts(row_counts, block, num_blocks, TILE, PADDED)
    row = here[None, :] + tl.cumsum(sent, 0) - 1
    is_sent = sent > 0
    at = token_row + token.to(tl.int64)[:, None] * num_ranks + rank[None, :]
    tl.store(at, tl.where(is_sent, row, absent), mask=(token < num_tokens)[:, None] & known[None, :])
    rows = end - start
    position = row - start[None, :]
    part = tl.zeros([BLOCK, PADDED], dtype=tl.int32)
    for cut in tl.static_range(1, PARTS):
        part += (position >= (rows.to(tl.int64) * cut // PARTS).to(tl.int32)[None, :]).to(tl.int32)
    counted = tl.where(is_sent | (rank == skip)[None, :], found, 0)  # own pairs are counted in part 0
    part = tl.where(is_sent, part, 0)
    for wanted in tl.static_range(PARTS):
        pairs = tl.sum(tl.where(part == wanted, counted, 0), 0)
        tl.atomic_add(counts + rank * COLUMNS + 1 + wanted, pairs, mask=known & (pairs > 0))
    if block == 0:
        flagged = tl.zeros([64], dtype=tl.int32)
        for start_block in range(0, num_blocks, 64):
            other = start_block + tl.arange(0, 64)
            flagged = tl.maximum(flagged, tl.load(flags + other, mask=other < num_blocks, other=0))
        status = tl.max(flagged, 0)
        tl.store(counts + rank * COLUMNS, tl.where(status > 0, -status, rows), mask=known)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks", "absent"])
def _place_source_kernel(
    index, partial, counts, token_row, pair_row, pair_slot, row_pair, offsets, num_tokens, num_blocks, absent,
    TOP_K: tl.constexpr, num_local: tl.constexpr, num_ranks: tl.constexpr, skip: tl.constexpr, PARTS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr,
    CHUNK: tl.constexpr, ROW_TILE: tl.constexpr, PAIR_TILE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    found, sent = _hits(index, token, num_tokens, num_local, skip, TOP_K, PADDED, BLOCK)
    row_counts, pair_counts, flags = _parts(partial, num_blocks, PADDED, KEYS)
    _place_rows(
        found, sent, token, block, row_counts, flags, counts, token_row, num_tokens, num_blocks, absent,
        num_ranks, skip, PARTS, COLUMNS, BLOCK, PADDED, ROW_TILE,
    )  # fmt: skip
    if skip >= 0:
        running, _, last = _starts(pair_counts, block, num_blocks, PAIR_TILE, KEYS)
        key = tl.arange(0, KEYS)
        tl.store(offsets + key, last, mask=(key < num_local) & (block == 0))
        at = block * BLOCK * TOP_K
        limit = tl.minimum((block + 1) * BLOCK, num_tokens) * TOP_K
        none = num_tokens * TOP_K
        _place_chunks(
            index, TOP_K, at, limit, skip * num_local, running, pair_row, pair_slot, row_pair, none,
            TOP_K, num_local, SLOTS, CHUNK, KEYS, False,
        )  # fmt: skip


_count_pairs = Kernel(_count_pairs_kernel)
_place_pairs = Kernel(_place_pairs_kernel)
_count_source = Kernel(_count_source_kernel)
_place_source = Kernel(_place_source_kernel)
