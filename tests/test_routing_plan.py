"""Which rows are sent: one for each token and rank that holds at least one of the token's experts."""

from __future__ import annotations

import math

import pytest
import torch

from fluid_hf.comm.tournament import part_bounds
from fluid_hf.moe.routing_plan import SourcePlan, count_rows, local_expert_ids, place_rows

# 6 experts on 3 ranks: experts 0, 1 on rank 0; 2, 3 on rank 1; 4, 5 on rank 2.
#   token 0: both experts on rank 0   -> 1 row to rank 0
#   token 1: experts on ranks 1 and 2 -> 1 row to each
#   token 2: both experts on rank 2   -> 1 row to rank 2
#   token 3: experts on ranks 1 and 0 -> 1 row to each
INDEX = torch.tensor([[0, 1], [2, 5], [4, 5], [3, 0]])


def plan_of(index: torch.Tensor, local: int, size: int, skip_rank: int | None = None) -> SourcePlan:
    hits = count_rows(index, local, size, skip_rank=skip_rank, parts=1)
    return place_rows(hits, tuple(hits.counts_2PC[0, :, 0].tolist()))


def test_two_experts_on_one_rank_are_one_row() -> None:
    hits = count_rows(INDEX, 2, 3, skip_rank=None, parts=1)
    # Rows, pairs. Rank 0: tokens 0 (2 pairs) and 3 (1); rank 1: tokens 1 (1) and 3 (1); rank 2: tokens 1 (1) and 2 (2).
    assert hits.counts_2PC[0].tolist() == [[2, 3], [2, 2], [2, 3]]
    plan = place_rows(hits, (2, 2, 2))
    assert plan.rows == (2, 2, 2)
    assert plan.row_token_R.tolist() == [0, 3, 1, 3, 1, 2]
    assert plan.row_rank_R.tolist() == [0, 0, 1, 1, 2, 2]
    # 6 (the number of rows) where a token has no row.
    assert plan.token_row_TP.tolist() == [[0, 6, 6], [6, 2, 4], [6, 6, 5], [1, 3, 6]]


def test_skipped_rank_has_no_rows() -> None:
    # Rank 1 has no rows; its 2 pairs, which stay here, are counted in the first part.
    assert count_rows(INDEX, 2, 3, skip_rank=1, parts=2).counts_2PC[0].tolist() == [[2, 2, 1], [0, 2, 0], [2, 1, 2]]
    hits = count_rows(INDEX, 2, 3, skip_rank=1, parts=1)
    assert hits.counts_2PC[0].tolist() == [[2, 3], [0, 2], [2, 3]]
    plan = place_rows(hits, (2, 0, 2))
    assert plan.row_token_R.tolist() == [0, 3, 1, 2]
    assert plan.row_rank_R.tolist() == [0, 0, 2, 2]
    assert plan.token_row_TP.tolist() == [[0, 4, 4], [4, 4, 2], [4, 4, 3], [1, 4, 4]]


def test_pairs_of_each_part() -> None:
    # 2 rows in 2 parts: the first row, the second row. Rank 0: token 0 (2 pairs), token 3 (1); and so on.
    assert count_rows(INDEX, 2, 3, skip_rank=None, parts=2).counts_2PC[0].tolist() == [[2, 2, 1], [2, 1, 1], [2, 1, 2]]
    # 2 rows in 3 parts: 2/3 and 4/3 round down to 0 and 1, so part 0 is empty.
    expected = [[2, 0, 2, 1], [2, 0, 1, 1], [2, 0, 1, 2]]
    assert count_rows(INDEX, 2, 3, skip_rank=None, parts=3).counts_2PC[0].tolist() == expected


def test_bounds_of_parts() -> None:
    plan = place_rows(count_rows(INDEX, 2, 3, skip_rank=1, parts=2), (2, 0, 2))
    assert [plan.bounds(rank) for rank in range(3)] == [(0, 2), (2, 2), (2, 4)]
    assert [plan.bounds(2, part, 2) for part in range(2)] == [(2, 3), (3, 4)]
    assert [plan.bounds(2, part, 3) for part in range(3)] == [(2, 2), (2, 3), (3, 4)]


def test_local_expert_ids() -> None:
    plan = plan_of(INDEX, 2, 3)
    ids = local_expert_ids(INDEX[plan.row_token_R], 2, plan.row_rank_R)
    assert ids.dtype == torch.int16
    # Rows: token 0 and token 3 on rank 0, tokens 1 and 3 on rank 1, tokens 1 and 2 on rank 2.
    assert ids.tolist() == [[0, 1], [-1, 0], [0, -1], [1, -1], [-1, 1], [0, 1]]
    # One destination for all rows: what each token wants of rank 2.
    assert local_expert_ids(INDEX, 2, 2).tolist() == [[-1, -1], [-1, 1], [0, 1], [-1, -1]]


def test_all_tokens_to_one_rank() -> None:
    plan = plan_of(torch.tensor([[5, 4]] * 3), 2, 3, skip_rank=0)
    assert plan.rows == (0, 0, 3)
    assert plan.row_token_R.tolist() == [0, 1, 2] and plan.row_rank_R.tolist() == [2, 2, 2]
    assert plan.token_row_TP.tolist() == [[3, 3, 0], [3, 3, 1], [3, 3, 2]]


@pytest.mark.parametrize("skip_rank", [None, 0, 2])
def test_no_tokens(skip_rank: int | None) -> None:
    hits = count_rows(torch.zeros(0, 2, dtype=torch.int64), 2, 3, skip_rank=skip_rank, parts=2)
    assert hits.counts_2PC[0].tolist() == [[0, 0, 0]] * 3
    plan = place_rows(hits, (0, 0, 0))
    assert plan.row_token_R.tolist() == [] and plan.row_rank_R.tolist() == []
    assert plan.token_row_TP.shape == (0, 3)
    assert local_expert_ids(torch.zeros(0, 2, dtype=torch.int64), 2, plan.row_rank_R).shape == (0, 2)


def test_single_rank() -> None:
    index = torch.tensor([[0, 1], [2, 3], [3, 0]])
    hits = count_rows(index, 4, 1, skip_rank=None, parts=1)
    assert hits.counts_2PC[0].tolist() == [[3, 6]]
    assert place_rows(hits, (3,)).token_row_TP.tolist() == [[0], [1], [2]]
    alone = plan_of(index, 4, 1, skip_rank=0)
    assert alone.rows == (0,) and alone.row_token_R.tolist() == []
    assert alone.token_row_TP.tolist() == [[0], [0], [0]]  # 0 rows, so 0 means none


def random_routing(tokens: int, experts: int, top_k: int) -> torch.Tensor:
    """Distinct experts for each token, all choices equally likely."""
    return torch.rand(tokens, experts, generator=torch.Generator().manual_seed(7)).argsort(1)[:, :top_k]


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize(("experts", "top_k", "size"), [(8, 2, 2), (12, 3, 4), (6, 4, 3), (5, 1, 5)])
def test_counts_against_plain_loops(experts: int, top_k: int, size: int, parts: int) -> None:
    tokens, local = 23, experts // size
    index = random_routing(tokens, experts, top_k)
    counts = count_rows(index, local, size, skip_rank=None, parts=parts).counts_2PC[0].tolist()
    plan = plan_of(index, local, size)
    for rank in range(size):
        pairs_of = [(token, sum(int(e) // local == rank for e in index[token])) for token in range(tokens)]
        rows = [(token, pairs) for token, pairs in pairs_of if pairs]
        assert counts[rank][0] == len(rows)
        bounds = [part_bounds(len(rows), part, parts) for part in range(parts)]
        assert counts[rank][1:] == [sum(pairs for _, pairs in rows[low:high]) for low, high in bounds]
        low, high = plan.bounds(rank)
        assert plan.row_token_R[low:high].tolist() == [token for token, _ in rows]


@pytest.mark.parametrize(("experts", "top_k", "size"), [(128, 8, 2), (128, 8, 4), (64, 8, 8), (8, 2, 4), (60, 4, 4)])
def test_number_of_rows_follows_the_formula(experts: int, top_k: int, size: int) -> None:
    tokens, local = 4000, experts // size
    index = random_routing(tokens, experts, top_k)
    rows = [row[0] for row in count_rows(index, local, size, skip_rank=None, parts=1).counts_2PC[0].tolist()]
    # A token misses a rank when its K experts are all among the other E - n: C(E - n, K) of C(E, K) choices.
    hit = 1 - math.comb(experts - local, top_k) / math.comb(experts, top_k)
    # Tokens are independent, so the rows for one rank are binomial; 5 standard deviations.
    bound = 5 * math.sqrt(tokens * hit * (1 - hit)) + 1e-9
    assert all(abs(count - tokens * hit) <= bound for count in rows)
    # For one token the hits of different ranks are negatively correlated, so the variances at most add up.
    assert abs(sum(rows) - size * tokens * hit) <= bound * math.sqrt(size)
    assert tokens * top_k - sum(rows) > bound * math.sqrt(size)  # rows that were not deduplicated would be seen


def test_number_of_rows_is_exact_when_every_rank_is_hit() -> None:
    # 6 of 8 experts cannot fit into one rank's 4: C(4, 6) = 0, so every token has a row for both ranks.
    counts = count_rows(random_routing(50, 8, 6), 4, 2, skip_rank=None, parts=1).counts_2PC[0]
    assert counts[:, 0].tolist() == [50, 50] and int(counts[:, 1].sum()) == 300
