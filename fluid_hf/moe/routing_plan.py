"""Routing plan of the sending side: one row per (token, destination rank) that holds at least one of its experts.

Legend: T tokens, K experts per token, P ranks, E_l experts per rank, R rows to send. Rows are ordered by destination,
then by token. Deduplicated rows follow DeepSpeed's and DeepEP's observation that a token's experts often share a rank:
the expected number is `sum_r T * (1 - C(E - n_r, K) / C(E, K))` over the destinations r holding n_r experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fluid_hf.comm.tournament import part_bounds
from fluid_hf.kernels import kernel_module, use_kernels
from fluid_hf.moe.permutation import PairPlan

__all__ = ["HitMap", "SourcePlan", "count_rows", "local_expert_ids", "place_rows"]

ROOM = 8  # parts up to which counts with words are equally long, also those of ranks that cut otherwise


class HitMap(NamedTuple):
    """What can be known about the rows before their number is on the host.

    Attributes:
        position_TP: position of the token's row among the rows for that destination, int64; -1 where there is none.
            From the kernels: `SourcePlan.token_row_TP`.
        counts_2PC: two tables, int32. The first has per destination: rows, then (row, expert) pairs of each part
            [P, 1 + parts or more]; the skipped rank has no rows, and all its pairs in the first part. Words that are to
            travel along come last. The second is not initialised: the other ranks' counts go there.
        own_pairs: from the kernels, the pair plan of the skipped rank's pairs, as `make_pair_plan` returns it with
            T * K places; `None` otherwise.
        from_kernels: whether the kernels made it.
    """

    position_TP: torch.Tensor
    counts_2PC: torch.Tensor
    own_pairs: PairPlan | None = None
    from_kernels: bool = False


class SourcePlan(NamedTuple):
    """Rows to send.

    Attributes:
        row_token_R: token of each row; `None` from the kernels, which need `token_row_TP` only.
        row_rank_R: destination of each row; `None` from the kernels.
        token_row_TP: row of each (token, destination); R or more where there is none.
        rows: number of rows per destination, on the host.
    """

    row_token_R: torch.Tensor | None
    row_rank_R: torch.Tensor | None
    token_row_TP: torch.Tensor
    rows: tuple[int, ...]

    def bounds(self, rank: int, part: int = 0, parts: int = 1) -> tuple[int, int]:
        """First and last-plus-one row of a part of one destination's rows."""
        start = sum(self.rows[:rank])
        low, high = part_bounds(self.rows[rank], part, parts)
        return start + low, start + high


def count_rows(
    top_k_index_TK: torch.Tensor,
    num_local_experts: int,
    ep_size: int,
    *,
    skip_rank: int | None,
    parts: int,
    weights_TK: torch.Tensor | None = None,
    words: tuple[int, ...] = (),
    offsets: torch.Tensor | None = None,
) -> HitMap:
    """Find which (token, destination) rows exist and count rows and pairs, without waiting for the device.

    Args:
        top_k_index_TK: global expert ids, int64 [T, K].
        skip_rank: destination without rows (the rank's own tokens stay where they are), or `None`.
        parts: number of parts each destination's rows are cut into.
        weights_TK: routing weights. The kernels put a status in place of the numbers of rows if one is not finite or
            an expert id is out of range.
        words: integers that every destination gets after its counts (`fluid_hf.comm.call_form`).
        offsets: where the kernels write `offsets_E` of the own pairs; a new tensor by default.
    """
    columns = 1 + max(parts, ROOM) + len(words) if words else 1 + parts
    if use_kernels(top_k_index_TK):
        sort_kernels = kernel_module("sort_kernels")
        index = top_k_index_TK.contiguous()
        weights = weights_TK.contiguous() if weights_TK is not None else index
        ways = (num_local_experts, ep_size, skip_rank, parts, columns, words, offsets)
        counts, token_row, own = sort_kernels.source_plan(index, weights, *ways)
        return HitMap(token_row, counts, PairPlan(*own) if own is not None else None, True)
    tokens = top_k_index_TK.shape[0]
    rank_TK = top_k_index_TK // num_local_experts
    hit_TP = torch.zeros(tokens, ep_size, dtype=torch.bool, device=top_k_index_TK.device)
    hit_TP.scatter_(1, rank_TK, True)
    if skip_rank is not None:
        hit_TP[:, skip_rank] = False
    position_TP = torch.where(hit_TP, hit_TP.cumsum(0) - 1, -1)
    rows_P = hit_TP.sum(0)
    part_TP = torch.zeros_like(position_TP)
    for part in range(1, parts):
        part_TP += position_TP >= rows_P * part // parts
    slot_TK = rank_TK * parts + part_TP.gather(1, rank_TK)
    pairs = torch.zeros(ep_size * parts, dtype=torch.int64, device=hit_TP.device)
    pairs.scatter_add_(0, slot_TK.reshape(-1), torch.ones_like(slot_TK.reshape(-1)))
    counts_2PC = torch.zeros(2, ep_size, columns, dtype=torch.int32, device=hit_TP.device)
    counts_2PC[0, :, 0] = rows_P
    counts_2PC[0, :, 1 : 1 + parts] = pairs.view(ep_size, parts)
    if words:
        counts_2PC[0, :, -len(words) :] = torch.tensor(words, dtype=torch.int32)
    return HitMap(position_TP, counts_2PC)


def place_rows(hits: HitMap, rows: tuple[int, ...]) -> SourcePlan:
    """Give every row its place, once the number of rows per destination is on the host."""
    position_TP = hits.position_TP
    tokens, ranks = position_TP.shape
    total = sum(rows)
    if hits.from_kernels:
        return SourcePlan(None, None, position_TP, rows)
    starts_P = torch.tensor([sum(rows[:rank]) for rank in range(ranks)], device=position_TP.device)
    token_row_TP = torch.where(position_TP >= 0, position_TP + starts_P, total)
    row_token = torch.empty(total + 1, dtype=torch.int64, device=position_TP.device)
    row_rank = torch.empty_like(row_token)
    token_TP = torch.arange(tokens, device=position_TP.device)[:, None].expand(tokens, ranks)
    rank_TP = torch.arange(ranks, device=position_TP.device).expand(tokens, ranks)
    row_token[token_row_TP] = token_TP  # entry `total` collects the places without a row
    row_rank[token_row_TP] = rank_TP
    return SourcePlan(row_token[:total], row_rank[:total], token_row_TP, rows)


def local_expert_ids(top_k_index: torch.Tensor, num_local_experts: int, rank: torch.Tensor | int) -> torch.Tensor:
    """Expert ids as the destination numbers them, int16; -1 for experts of other ranks.

    Args:
        top_k_index: global expert ids [R, K].
        rank: destination of each row, [R] or one number.
    """
    owner = top_k_index // num_local_experts
    wanted = rank[:, None] if isinstance(rank, torch.Tensor) else rank
    return torch.where(owner == wanted, top_k_index % num_local_experts, -1).to(torch.int16)
