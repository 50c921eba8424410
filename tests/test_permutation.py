"""Rows to expert-sorted pairs and back, on hand-written cases."""

from __future__ import annotations

import pytest
import torch

from fluid_hf.moe.permutation import expand_rows, make_pair_plan, reduce_pairs, reduce_rows, sum_dtype

# The example of fluid_hf.moe.permutation: row 0 wants experts 1 and 0, row 1 expert 1 only, row 2 experts 0 and 1.
#   pair   0        1        2        3        4
#   from   (0, e0)  (2, e0)  (0, e1)  (1, e1)  (2, e1)
IDS = torch.tensor([[1, 0], [1, -1], [0, 1]], dtype=torch.int16)
NAN = float("nan")


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_pairs_are_sorted_by_expert(dtype: torch.dtype) -> None:
    plan = make_pair_plan(IDS.to(dtype), 2, 5)
    assert plan.num_pairs == 5
    assert plan.pair_row_S.tolist() == [0, 2, 0, 1, 2]
    assert plan.pair_slot_S.tolist() == [1, 4, 0, 2, 5]  # row * 2 + slot
    assert plan.row_pair_RK.tolist() == [[2, 0], [3, 5], [1, 4]]  # 5 where there is none
    assert plan.offsets_E.tolist() == [2, 5] and plan.offsets_E.dtype == torch.int32


def test_experts_without_pairs() -> None:
    # Of 5 experts only 1 and 3 are wanted: ends 0, 2, 2, 3, 3.
    plan = make_pair_plan(torch.tensor([[3, 1], [-1, 1]]), 5, 3)
    assert plan.offsets_E.tolist() == [0, 2, 2, 3, 3]
    assert plan.pair_row_S.tolist() == [0, 1, 0]
    assert plan.row_pair_RK.tolist() == [[2, 0], [3, 1]]


def test_rows_are_copied_to_their_pairs() -> None:
    rows = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    pairs = expand_rows(rows, make_pair_plan(IDS, 2, 5))
    assert pairs.tolist() == [[1, 10], [3, 30], [1, 10], [2, 20], [3, 30]]


def test_pairs_are_summed_into_their_rows() -> None:
    plan = make_pair_plan(IDS, 2, 5)
    pairs = torch.tensor([[1.0], [10.0], [100.0], [1000.0], [10000.0]])
    out = torch.full((3, 1), NAN)
    reduce_pairs([pairs], plan, out)
    # Row 0 has pairs 2 and 0, row 1 pair 3, row 2 pairs 1 and 4.
    assert out.flatten().tolist() == [101, 1000, 10010]
    reduce_pairs([pairs, 2 * pairs], plan, out)  # both projections' gradients at once
    assert out.flatten().tolist() == [303, 3000, 30030]


def test_rows_without_pairs_are_zero() -> None:
    plan = make_pair_plan(torch.tensor([[-1, -1], [0, -1]]), 1, 1)
    out = torch.full((2, 3), NAN)
    reduce_pairs([torch.ones(1, 3)], plan, out)
    assert out.tolist() == [[0, 0, 0], [1, 1, 1]]


def test_no_pairs() -> None:
    plan = make_pair_plan(torch.full((2, 3), -1), 4, 0)
    assert plan.num_pairs == 0 and plan.offsets_E.tolist() == [0, 0, 0, 0]
    assert expand_rows(torch.ones(2, 5), plan).shape == (0, 5)
    out = torch.full((2, 5), NAN)
    reduce_pairs([torch.empty(0, 5)], plan, out)
    assert out.eq(0).all()


def test_no_rows() -> None:
    plan = make_pair_plan(torch.empty(0, 3, dtype=torch.int16), 4, 0)
    assert plan.row_pair_RK.shape == (0, 3) and plan.offsets_E.tolist() == [0, 0, 0, 0]
    assert expand_rows(torch.ones(0, 5), plan).shape == (0, 5)
    reduce_pairs([torch.empty(0, 5)], plan, torch.empty(0, 5))
    assert reduce_rows(None, torch.empty(0, 5), torch.empty(0, 2, dtype=torch.int64), torch.float32).shape == (0, 5)


def test_rows_are_summed_into_their_tokens() -> None:
    # 3 rows; token 0: own part and rows 0, 2; token 1: own part only; token 2: own part and row 1. 3 is "none".
    rows = torch.tensor([[1.0], [10.0], [100.0]])
    token_row = torch.tensor([[0, 3, 2], [3, 3, 3], [3, 1, 3]])
    own = torch.tensor([[1000.0], [2000.0], [3000.0]])
    assert reduce_rows(own, rows, token_row, torch.float32).flatten().tolist() == [1101, 2000, 3010]
    assert reduce_rows(None, rows, token_row, torch.float32).flatten().tolist() == [101, 0, 10]
    assert own.flatten().tolist() == [1000, 2000, 3000]  # not added to in place


def test_tokens_that_sent_nothing() -> None:
    token_row, none = torch.tensor([[0, 0], [0, 0]]), torch.empty(0, 1)  # 0 rows, so 0 is "none"
    assert reduce_rows(torch.tensor([[1.0], [2.0]]), none, token_row, torch.float32).flatten().tolist() == [1, 2]
    assert reduce_rows(None, none, token_row, torch.float32).flatten().tolist() == [0, 0]


def test_bfloat16_is_summed_in_float32() -> None:
    # bfloat16 has 8 bits: 256 + 1 rounds to 256 (a tie, to even), so step by step the sum would stay 256.
    one, large = torch.tensor(1.0).bfloat16(), torch.tensor(256.0).bfloat16()
    assert (large + one + one).item() == 256
    out = torch.empty(1, 1, dtype=torch.bfloat16)
    # Slots want experts 0, 1, 2, so the pairs are summed in the order 256, 1, 1.
    reduce_pairs([torch.stack([large, one, one])[:, None]], make_pair_plan(torch.tensor([[0, 1, 2]]), 3, 3), out)
    assert out.item() == 258
    token_row = torch.tensor([[0, 1]])
    found = reduce_rows(large.view(1, 1), torch.stack([one, one])[:, None], token_row, torch.bfloat16)
    assert found.dtype == torch.bfloat16 and found.item() == 258


def test_type_of_sums() -> None:
    wide = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float32}
    assert {dtype: sum_dtype(dtype) for dtype in wide} == wide
    assert sum_dtype(torch.float64) == torch.float64
    # 1 + 2^-40 is lost in float32.
    rows = torch.tensor([[1.0], [2.0**-40]], dtype=torch.float64)
    assert reduce_rows(None, rows, torch.tensor([[0, 1]]), torch.float64).item() == 1 + 2.0**-40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_repeated_runs_are_bit_equal(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(50, 8, generator=generator).argsort(1)[:, :4] - 2  # -2 and -1 both mean none
    num_pairs = int((ids >= 0).sum())
    rows = torch.randn(50, 33, generator=generator).to(dtype)
    token_row = torch.randint(0, 51, (20, 3), generator=generator)
    runs = []
    for _ in range(3):
        plan = make_pair_plan(ids, 6, num_pairs)
        pairs = expand_rows(rows, plan)
        out = torch.empty_like(rows)
        reduce_pairs([pairs, pairs * 0.3], plan, out)
        runs.append((out, reduce_rows(None, out, token_row, dtype)))
    for out, tokens in runs[1:]:
        assert torch.equal(out, runs[0][0]) and torch.equal(tokens, runs[0][1])
    # And equal to a plain loop in the order of the slots: each row's pairs, then 0.3 times as much.
    present = (ids >= 0).sum(1, keepdim=True)
    torch.testing.assert_close(runs[0][0].float(), rows.float() * present * 1.3, rtol=2e-2, atol=1e-2)
