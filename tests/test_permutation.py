"""Routing plan, row format, permutation, grouped GEMM and activation on hand-written cases."""

from __future__ import annotations

import math

import pytest
import torch

from fluid_hf.moe.activation import glu_backward, glu_forward
from fluid_hf.moe.grouped_gemm import grouped_dgrad, grouped_linear, grouped_wgrad
from fluid_hf.moe.permutation import expand_rows, make_pair_plan, reduce_pairs, reduce_rows
from fluid_hf.moe.routing_plan import count_rows, local_expert_ids, place_rows
from fluid_hf.moe.rows import RowFormat

# 4 experts on 2 ranks: experts 0, 1 on rank 0 and 2, 3 on rank 1.
INDEX = torch.tensor([[0, 1], [1, 3], [2, 3], [3, 0]])


def test_rows_are_unique_per_token_and_rank() -> None:
    # rank 0: tokens 0, 1, 3 (token 0 once, though both its experts are there); rank 1: tokens 1, 2, 3.
    hits = count_rows(INDEX, 2, 2, skip_rank=None, parts=1)
    # rank 0: 3 rows, 4 pairs (0,0) (0,1) (1,1) (3,0); rank 1: 3 rows, 4 pairs (1,3) (2,2) (2,3) (3,3).
    assert hits.counts_PC.tolist() == [[3, 4], [3, 4]]
    plan = place_rows(hits, (3, 3))
    assert plan.row_token_R.tolist() == [0, 1, 3, 1, 2, 3]
    assert plan.row_rank_R.tolist() == [0, 0, 0, 1, 1, 1]
    assert plan.token_row_TP.tolist() == [[0, 6], [1, 3], [6, 4], [2, 5]]
    ids = local_expert_ids(INDEX[plan.row_token_R], 2, plan.row_rank_R)
    assert ids.tolist() == [[0, 1], [1, -1], [-1, 0], [-1, 1], [0, 1], [1, -1]]


def test_own_rank_is_skipped_and_parts_are_counted() -> None:
    hits = count_rows(INDEX, 2, 2, skip_rank=0, parts=2)
    # rank 1 has rows of tokens 1, 2, 3; cut 3 * 1 // 2 = 1: part 0 is token 1 (1 pair), part 1 tokens 2, 3 (3 pairs).
    assert hits.counts_PC.tolist() == [[0, 0, 0], [3, 1, 3]]
    assert place_rows(hits, (0, 3)).row_token_R.tolist() == [1, 2, 3]


def test_no_tokens() -> None:
    hits = count_rows(torch.zeros(0, 2, dtype=torch.int64), 2, 2, skip_rank=0, parts=3)
    assert hits.counts_PC.tolist() == [[0] * 4] * 2
    assert place_rows(hits, (0, 0)).token_row_TP.shape == (0, 2)


@pytest.mark.parametrize(("experts", "top_k", "ranks"), [(128, 8, 2), (128, 8, 4), (64, 8, 8), (8, 2, 2)])
def test_number_of_rows_is_as_expected(experts: int, top_k: int, ranks: int) -> None:
    tokens, local = 4000, experts // ranks
    index = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :top_k]
    rows = int(count_rows(index, local, ranks, skip_rank=0, parts=1).counts_PC[:, 0].sum())
    probability = 1 - math.comb(experts - local, top_k) / math.comb(experts, top_k)
    expected = (ranks - 1) * tokens * probability
    assert abs(rows - expected) <= 6 * math.sqrt(expected) + 1


# The example in the docstring of fluid_hf.moe.permutation.
IDS = torch.tensor([[1, 0], [1, -1], [0, 1]], dtype=torch.int16)


def test_pairs_are_sorted_by_expert() -> None:
    plan = make_pair_plan(IDS, 2, 5)
    assert plan.pair_row_S.tolist() == [0, 2, 0, 1, 2]
    assert plan.pair_slot_S.tolist() == [1, 4, 0, 2, 5]
    assert plan.row_pair_RK.tolist() == [[2, 0], [3, 5], [1, 4]]
    assert plan.offsets_E.tolist() == [2, 5]


def test_expand_and_reduce() -> None:
    plan = make_pair_plan(IDS, 2, 5)
    rows = torch.tensor([[1.0], [10.0], [100.0]])
    pairs = expand_rows(rows, plan)
    assert pairs.flatten().tolist() == [1, 100, 1, 10, 100]
    out = torch.full((3, 1), float("nan"))
    reduce_pairs([pairs, 2 * pairs], plan, out)
    assert out.flatten().tolist() == [6, 30, 600]


def test_rows_without_pairs_are_zero() -> None:
    plan = make_pair_plan(torch.full((2, 3), -1), 4, 0)
    out = torch.full((2, 5), float("nan"))
    reduce_pairs([torch.empty(0, 5)], plan, out)
    assert out.eq(0).all() and plan.offsets_E.tolist() == [0] * 4


def test_tokens_sum_their_rows_in_float32() -> None:
    # 256 + 1 + 1 is 258 in float32; summed in bfloat16 (8 bits) it would stay at 256.
    own = torch.tensor([[256.0], [0.0]]).bfloat16()
    rows = torch.tensor([[1.0], [1.0], [7.0]]).bfloat16()
    token_row = torch.tensor([[3, 0, 1], [2, 3, 3]])
    assert reduce_rows(own, rows, token_row, torch.bfloat16).flatten().tolist() == [258.0, 7.0]
    assert reduce_rows(None, rows, token_row, torch.float32).flatten().tolist() == [2.0, 7.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("hidden", "top_k"), [(5, 1), (7, 3), (16, 8)])
def test_row_format_fields_do_not_overlap(dtype: torch.dtype, hidden: int, top_k: int) -> None:
    form = RowFormat(hidden, top_k, dtype)
    rows = form.new_rows(3, torch.device("cpu"))
    values = torch.arange(3 * hidden).view(3, hidden).to(dtype)
    ids = torch.arange(3 * top_k).view(3, top_k).to(torch.int16) - 1
    weights = torch.rand(3, top_k).to(form.weight_dtype)
    form.hidden_of(rows).copy_(values)
    form.ids_of(rows).copy_(ids)
    form.weights_of(rows).copy_(weights)
    assert form.hidden_of(rows).equal(values) and form.ids_of(rows).equal(ids) and form.weights_of(rows).equal(weights)
    back = form.new_gradient_rows(3, torch.device("cpu"))
    form.hidden_of(back).copy_(values)
    form.weight_gradients_of(back).copy_(weights)
    assert form.hidden_of(back).equal(values) and form.weight_gradients_of(back).equal(weights)
    assert form.stride % 16 == 0 and form.gradient_stride % 16 == 0


def test_grouped_gemm_matches_autograd() -> None:
    torch.manual_seed(0)
    # Expert 1 has no pairs; two pieces of 5 and 2 pairs.
    offsets = [torch.tensor([2, 2, 5], dtype=torch.int32), torch.tensor([0, 0, 2], dtype=torch.int32)]
    experts = [torch.tensor([0, 0, 2, 2, 2]), torch.tensor([2, 2])]
    weight = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    inputs = [torch.randn(len(e), 6, dtype=torch.float64, requires_grad=True) for e in experts]
    grads = [torch.randn(len(e), 4, dtype=torch.float64) for e in experts]
    outputs = [torch.einsum("sm,snm->sn", x, weight[e]) for x, e in zip(inputs, experts, strict=True)]
    torch.autograd.backward(outputs, grads)
    for x, grad, ends, output in zip(inputs, grads, offsets, outputs, strict=True):
        assert torch.allclose(grouped_linear(x.detach(), weight.detach(), ends), output)
        assert torch.allclose(grouped_dgrad(grad, weight.detach(), ends), x.grad)
    assert weight.grad is not None
    assert torch.allclose(grouped_wgrad(grads, [x.detach() for x in inputs], offsets), weight.grad)
    assert grouped_linear(torch.empty(0, 6), torch.empty(3, 4, 6), torch.zeros(3, dtype=torch.int32)).shape == (0, 4)


@pytest.mark.parametrize("act", [torch.nn.functional.silu, torch.nn.functional.gelu, torch.nn.functional.relu])
def test_activation_matches_autograd(act: torch.nn.Module) -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.rand(5, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(5, 3, dtype=torch.float64)
    expected = weight[:, None] * act(gate) * up
    expected.backward(grad)
    plain = gate.detach(), up.detach(), weight.detach()
    assert torch.allclose(glu_forward(*plain, act), expected)
    grad_gate, grad_up, hidden, grad_weight = glu_backward(grad, *plain, act)
    assert torch.allclose(grad_gate, gate.grad) and torch.allclose(grad_up, up.grad)
    assert torch.allclose(hidden, expected) and torch.allclose(grad_weight, weight.grad)
