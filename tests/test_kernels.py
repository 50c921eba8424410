"""Triton kernels against the plain references. On a GPU, or on the CPU with TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from fluid_hf.moe.activation import glu_backward, glu_forward
from fluid_hf.moe.permutation import make_pair_plan, reduce_pairs, reduce_rows
from fluid_hf.moe.routing_plan import count_rows, local_expert_ids, place_rows
from fluid_hf.moe.rows import RowFormat

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
AVAILABLE = importlib.util.find_spec("triton") is not None and (torch.cuda.is_available() or INTERPRETED)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not AVAILABLE, reason="needs Triton and a GPU, or its interpreter")]
if AVAILABLE:
    from fluid_hf.moe import row_kernels, sort_kernels, wire_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCALE = 1 if INTERPRETED else 40
SIZES = [(0, 1, 4, 2), (1, 1, 8, 2), (37 * SCALE, 2, 8, 4), (50 * SCALE, 8, 60, 3), (65 * SCALE, 8, 128, 8)]
silu = torch.nn.functional.silu


def routing(tokens: int, top_k: int, experts: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens + experts)
    return torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k].contiguous().to(DEVICE)


@pytest.mark.parametrize(("rows", "top_k", "experts", "ranks"), SIZES)
def test_pair_plan(rows: int, top_k: int, experts: int, ranks: int) -> None:
    index = routing(rows, top_k, experts)
    for first, count in ((0, experts), (experts // 2, experts // 4)):
        ids = torch.where((index >= first) & (index < first + count), index - first, -1)
        expected = make_pair_plan(ids, count, int((ids >= 0).sum()))
        wide = torch.full((rows, top_k + 3), 7, dtype=torch.int16, device=DEVICE)
        wide[:, 1 : 1 + top_k] = ids
        for source, start in ((index, first), (wide[:, 1 : 1 + top_k], 0)):
            found = sort_kernels.pair_plan(source, start, count, expected.num_pairs)
            fields = (expected.pair_row_S, expected.pair_slot_S, expected.row_pair_RK, expected.offsets_E)
            for ours, theirs in zip(found, fields, strict=True):
                assert torch.equal(ours.long(), theirs.long())


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("tokens", "top_k", "experts", "ranks"), SIZES)
def test_source_plan_and_pack(tokens: int, top_k: int, experts: int, ranks: int, parts: int) -> None:
    index, local = routing(tokens, top_k, experts), -(-experts // ranks)
    for skip in (None, ranks - 1):
        hits = count_rows(index, local, ranks, skip_rank=skip, parts=parts)
        rows = tuple(hits.counts_PC[:, 0].tolist())
        expected = place_rows(hits, rows)
        counts, token_row, row_token, row_rank = sort_kernels.source_plan(index, local, ranks, skip, parts)
        assert torch.equal(counts.long(), hits.counts_PC)
        assert torch.equal(token_row.long(), expected.token_row_TP)
        total = sum(rows)
        assert torch.equal(row_token[:total].long(), expected.row_token_R)
        assert torch.equal(row_rank[:total].long(), expected.row_rank_R)
        form = RowFormat(40, top_k, torch.bfloat16)
        hidden = torch.randn(tokens, 40, device=DEVICE).bfloat16()
        weights = torch.rand(tokens, top_k, device=DEVICE)
        packed = wire_kernels.pack_rows(hidden, weights, index, row_token, row_rank, total, form, local)
        assert torch.equal(form.hidden_of(packed), hidden[expected.row_token_R])
        assert torch.equal(form.weights_of(packed), weights[expected.row_token_R])
        ids = local_expert_ids(index[expected.row_token_R], local, expected.row_rank_R)
        assert torch.equal(form.ids_of(packed), ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("hidden", "inner"), [(40, 24), (200, 136), (2049, 1030)])
def test_rows_and_activation(dtype: torch.dtype, hidden: int, inner: int) -> None:
    torch.manual_seed(0)
    rows, top_k, experts = 23, 3, 8
    index = routing(rows, top_k, experts)
    ids = torch.where(index < 4, index, -1)
    plan = make_pair_plan(ids, 4, int((ids >= 0).sum()))
    pairs = plan.num_pairs
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]

    def near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-9)
        assert float(error) <= tolerance

    wide = torch.randn(rows, hidden + 8, device=DEVICE).to(dtype)
    expanded = row_kernels.expand(wide[:, :hidden], plan.pair_row_S.int())
    assert torch.equal(expanded, wide[:, :hidden][plan.pair_row_S])
    place = torch.randperm(pairs, device=DEVICE).int()
    placed = row_kernels.expand(wide[:, :hidden], plan.pair_row_S.int(), torch.empty_like(expanded), place)
    assert torch.equal(placed[place.long()], expanded)

    fused = torch.randn(pairs, 2 * inner, device=DEVICE).to(dtype)
    gate, up = fused[:, :inner], fused[:, inner:]
    weights = torch.rand(rows, top_k + 2, device=DEVICE)[:, :top_k]
    pair_weights = weights.reshape(-1)[plan.pair_slot_S]
    near(row_kernels.glu_forward(gate, up, weights, plan.pair_slot_S.int()), glu_forward(gate, up, pair_weights, silu))
    grad = torch.randn(pairs, inner, device=DEVICE).to(dtype)
    expected = glu_backward(grad, gate, up, pair_weights, silu)
    grads = torch.empty_like(fused)
    halves = grads[:, :inner], grads[:, inner:]
    weight_grads = torch.zeros(rows, top_k, device=DEVICE)
    activation = torch.empty_like(grad)
    joint = (torch.empty_like(grad), torch.empty_like(grad), place)
    args = (grad, gate, up, weights, plan.pair_slot_S.int(), weight_grads, halves, activation)
    row_kernels.glu_backward(*args, joint)
    near(halves[0], expected[0])
    near(halves[1], expected[1])
    near(activation[place.long()], expected[2])
    near(weight_grads.flatten()[plan.pair_slot_S], expected[3].float())
    assert torch.equal(joint[0][place.long()], halves[0]) and torch.equal(joint[1][place.long()], halves[1])
    row_kernels.glu_backward(*args)
    near(activation, expected[2])

    more = torch.randn_like(expanded)
    for tensors in ([expanded], [expanded, more]):
        ours = torch.full((rows, hidden + 8), float("nan"), device=DEVICE, dtype=dtype)[:, :hidden]
        theirs = torch.empty(rows, hidden, device=DEVICE, dtype=dtype)
        row_kernels.reduce_pairs(tensors, plan.row_pair_RK.int(), ours)
        reduce_pairs(tensors, plan, theirs)
        near(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_per_token(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens, top_k, experts, ranks, hidden = 29, 3, 12, 4, 72
    index = routing(tokens, top_k, experts)
    hits = count_rows(index, 3, ranks, skip_rank=1, parts=1)
    plan = place_rows(hits, tuple(hits.counts_PC[:, 0].tolist()))
    rows = torch.randn(sum(plan.rows), hidden + 8, device=DEVICE).to(dtype)[:, :hidden]
    own = torch.randn(tokens, hidden, device=DEVICE).to(dtype)
    for part in (own, None):
        ours = row_kernels.reduce_rows(part, rows, plan.token_row_TP.int(), dtype)
        theirs = reduce_rows(part, rows, plan.token_row_TP, dtype)
        assert torch.allclose(ours.float(), theirs.float(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    own_grads = torch.rand(tokens, top_k, device=DEVICE)
    row_grads = torch.rand(sum(plan.rows), top_k + 2, device=DEVICE)[:, :top_k]
    found = wire_kernels.gather_weight_grads(own_grads, row_grads, plan.token_row_TP.int(), index, 3, 1)
    for token in range(tokens):
        for k in range(top_k):
            owner = int(index[token, k]) // 3
            row = int(plan.token_row_TP[token, owner])
            assert found[token, k] == (own_grads[token, k] if owner == 1 else row_grads[row, k])
