"""Triton kernels for the plans: counting sorts that are stable and equal from run to run.

Legend: T tokens, K experts per token, R rows, S pairs, E experts held here, P ranks. Each sort has three launches:
counts per block, one scan over the blocks, placement. Only integers are added atomically, so order never matters.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["pair_plan", "source_plan"]

SCAN_TILE = 8192
PLACE_TILE = 8192


def pair_plan(
    ids_RK: torch.Tensor, first_expert: int, num_experts: int, num_pairs: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`pair_row_S`, `pair_slot_S`, `row_pair_RK` and `offsets_E` (all int32) of `make_pair_plan`.

    Args:
        ids_RK: expert ids of any integer type and row stride; held here if in [first_expert, first_expert + E).
    """
    rows, top_k = ids_RK.shape
    slots = rows * top_k
    device = ids_RK.device
    block = 256 if slots <= 1 << 17 else 1024  # many short blocks where there are few slots
    blocks = triton.cdiv(slots, block)
    padded = triton.next_power_of_2(num_experts + 1)
    pairs = torch.empty(2, num_pairs, dtype=torch.int32, device=device)
    row_pair = torch.empty(rows, top_k, dtype=torch.int32, device=device)
    if blocks == 0:
        return pairs[0], pairs[1], row_pair, torch.zeros(num_experts, dtype=torch.int32, device=device)
    offsets = torch.empty(num_experts, dtype=torch.int32, device=device)
    counts = torch.empty(blocks, padded, dtype=torch.int32, device=device)
    sort = (ids_RK, ids_RK.stride(0), slots, top_k, first_expert, num_experts)
    _count_experts[(blocks,)](*sort, counts, BLOCK=block, PADDED=padded)
    _scan_blocks[(1,)](counts, offsets, blocks, num_experts, TILE=max(1, SCAN_TILE // padded), PADDED=padded)
    keys = triton.next_power_of_2(num_experts)
    chunk = max(16, min(block, PLACE_TILE // keys))
    _place_pairs[(blocks,)](
        *sort, counts, pairs[0], pairs[1], row_pair, num_pairs, BLOCK=block, CHUNK=chunk, PADDED=padded, KEYS=keys
    )
    return pairs[0], pairs[1], row_pair, offsets


def source_plan(
    index_TK: torch.Tensor, num_local_experts: int, ranks: int, skip_rank: int | None, parts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Counts and places of the rows to send, without waiting for the device.

    Returns:
        counts [P, 1 + parts] as `count_rows` has them; token_row [T, P] (the number of rows where there is none);
        row_token and row_rank, longer than the number of rows, which the host does not know yet. All int32.
    """
    tokens, top_k = index_TK.shape
    device = index_TK.device
    counts = torch.zeros(ranks, 1 + parts, dtype=torch.int32, device=device)
    token_row = torch.empty(tokens, ranks, dtype=torch.int32, device=device)
    most = tokens * min(top_k, ranks)
    rows = torch.empty(2, most, dtype=torch.int32, device=device)
    padded = triton.next_power_of_2(ranks + 1)
    block = max(16, min(256, PLACE_TILE // padded))
    blocks = triton.cdiv(tokens, block)
    if blocks == 0:
        return counts, token_row, rows[0], rows[1]
    skip = -1 if skip_rank is None else skip_rank
    ends = torch.empty(ranks, dtype=torch.int32, device=device)
    partial = torch.empty(blocks, padded, dtype=torch.int32, device=device)
    hits = (index_TK, tokens, num_local_experts, ranks, skip, partial)
    _count_hits[(blocks,)](*hits, TOP_K=top_k, BLOCK=block, PADDED=padded)
    _scan_blocks[(1,)](partial, ends, blocks, ranks, TILE=max(1, SCAN_TILE // padded), PADDED=padded)
    _place_rows[(blocks,)](
        *hits, ends, counts, token_row, rows[0], rows[1], TOP_K=top_k, PARTS=parts, BLOCK=block, PADDED=padded
    )
    return counts, token_row, rows[0], rows[1]


@triton.jit
def _load_experts(ids, stride, slot, num_slots, top_k, first, num_experts):
    row = slot // top_k
    inside = slot < num_slots
    expert = tl.load(ids + row.to(tl.int64) * stride + slot % top_k, mask=inside, other=-1).to(tl.int32) - first
    return expert, inside & (expert >= 0) & (expert < num_experts)


@triton.jit
def _count_experts(
    ids, stride, num_slots, top_k, first, num_experts, counts, BLOCK: tl.constexpr, PADDED: tl.constexpr
):
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    expert, held = _load_experts(ids, stride, slot, num_slots, top_k, first, num_experts)
    found = tl.histogram(tl.where(held, expert, num_experts), PADDED)  # the bin after the last takes the others
    tl.store(counts + block * PADDED + tl.arange(0, PADDED), found.to(tl.int32))


@triton.jit
def _scan_blocks(counts, ends, num_blocks, num_keys, TILE: tl.constexpr, PADDED: tl.constexpr):
    key = tl.arange(0, PADDED)
    block = tl.arange(0, TILE)
    total = tl.zeros([PADDED], dtype=tl.int32)
    for start in range(0, num_blocks, TILE):
        at = counts + (start + block)[:, None] * PADDED + key[None, :]
        total += tl.sum(tl.load(at, mask=(start + block < num_blocks)[:, None], other=0), 0)
    total = tl.where(key < num_keys, total, 0)
    end = tl.cumsum(total, 0)
    tl.store(ends + key, end, mask=key < num_keys)
    running = end - total
    for start in range(0, num_blocks, TILE):
        at = counts + (start + block)[:, None] * PADDED + key[None, :]
        inside = (start + block < num_blocks)[:, None]
        tile = tl.load(at, mask=inside, other=0)
        tl.store(at, running[None, :] + tl.cumsum(tile, 0) - tile, mask=inside)
        running += tl.sum(tile, 0)


@triton.jit
def _place_pairs(
    ids,
    stride,
    num_slots,
    top_k,
    first,
    num_experts,
    counts,
    pair_row,
    pair_slot,
    row_pair,
    num_pairs,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PADDED: tl.constexpr,
    KEYS: tl.constexpr,
):
    block = tl.program_id(0)
    key = tl.arange(0, KEYS)
    running = tl.load(counts + block * PADDED + key)
    for start in range(0, BLOCK, CHUNK):
        slot = block * BLOCK + start + tl.arange(0, CHUNK)
        expert, held = _load_experts(ids, stride, slot, num_slots, top_k, first, num_experts)
        chosen = ((expert[:, None] == key[None, :]) & held[:, None]).to(tl.int32)
        place = tl.sum(chosen * (tl.cumsum(chosen, 0) - 1 + running[None, :]), 1)
        tl.store(row_pair + slot, tl.where(held, place, num_pairs), mask=slot < num_slots)
        tl.store(pair_row + place, slot // top_k, mask=held)
        tl.store(pair_slot + place, slot, mask=held)
        running += tl.sum(chosen, 0)


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
def _count_hits(
    index,
    num_tokens,
    num_local,
    num_ranks,
    skip,
    partial,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
):
    block = tl.program_id(0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    _, sent = _hits(index, token, num_tokens, num_local, skip, TOP_K, PADDED, BLOCK)
    tl.store(partial + block * PADDED + tl.arange(0, PADDED), tl.sum(sent, 0))


@triton.jit
def _place_rows(
    index,
    num_tokens,
    num_local,
    num_ranks,
    skip,
    partial,
    ends,
    counts,
    token_row,
    row_token,
    row_rank,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
):
    block = tl.program_id(0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    rank = tl.arange(0, PADDED)
    known = rank < num_ranks
    found, sent = _hits(index, token, num_tokens, num_local, skip, TOP_K, PADDED, BLOCK)
    end = tl.load(ends + rank, mask=known, other=0)
    start = tl.load(ends + rank - 1, mask=known & (rank > 0), other=0)
    rows = end - start
    total = tl.load(ends + num_ranks - 1)
    row = tl.load(partial + block * PADDED + rank)[None, :] + tl.cumsum(sent, 0) - 1
    is_sent = sent > 0
    tl.store(
        token_row + token.to(tl.int64)[:, None] * num_ranks + rank[None, :],
        tl.where(is_sent, row, total),
        mask=(token < num_tokens)[:, None] & known[None, :],
    )
    tl.store(row_token + row, token[:, None] + tl.zeros_like(row), mask=is_sent)
    tl.store(row_rank + row, rank[None, :] + tl.zeros_like(row), mask=is_sent)
    position = row - start[None, :]
    part = tl.zeros([BLOCK, PADDED], dtype=tl.int32)
    for cut in tl.static_range(1, PARTS):
        part += (position >= (rows.to(tl.int64) * cut // PARTS).to(tl.int32)[None, :]).to(tl.int32)
    counted = tl.where(is_sent | (rank == skip)[None, :], found, 0)  # own pairs are counted in part 0
    part = tl.where(is_sent, part, 0)
    for wanted in tl.static_range(PARTS):
        pairs = tl.sum(tl.where(part == wanted, counted, 0), 0)
        tl.atomic_add(counts + rank * (1 + PARTS) + 1 + wanted, pairs, mask=known & (pairs > 0))
    tl.store(counts + rank * (1 + PARTS), rows, mask=known & (block == 0))
