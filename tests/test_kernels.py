"""Triton kernels against the plain references. On a GPU, or on the CPU with TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from fluid_hf import ExpertParallelExperts
from fluid_hf.comm.late_status import LateStatus
from fluid_hf.errors import RoutingError
from fluid_hf.moe.activation import glu_backward, glu_forward
from fluid_hf.moe.grouped_gemm import grouped_wgrad
from fluid_hf.moe.permutation import PairPlan, make_pair_plan, reduce_pairs, reduce_rows
from fluid_hf.moe.routing_plan import count_rows, local_expert_ids, place_rows
from fluid_hf.moe.rows import RowFormat

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
AVAILABLE = importlib.util.find_spec("triton") is not None and (torch.cuda.is_available() or INTERPRETED)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not AVAILABLE, reason="needs Triton and a GPU, or its interpreter")]
if AVAILABLE:
    from fluid_hf.moe import joint_kernels, row_kernels, sort_kernels, wire_kernels

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
        expected = make_pair_plan(ids.cpu(), count, int((ids >= 0).sum()))
        wide = torch.full((rows, top_k + 3), 7, dtype=torch.int16, device=DEVICE)
        wide[:, 1 : 1 + top_k] = ids
        for source, start in ((index, first), (wide[:, 1 : 1 + top_k], 0)):
            found = sort_kernels.pair_plan(source, start, count, expected.num_pairs)
            fields = (expected.pair_row_S, expected.pair_slot_S, expected.row_pair_RK, expected.offsets_E)
            for ours, theirs in zip(found, fields, strict=True):
                assert torch.equal(ours.cpu().long(), theirs.long())


def test_ids_out_of_range_are_told_where_nothing_is_exchanged() -> None:
    late, device = LateStatus(), torch.device(DEVICE)
    index = routing(70 * SCALE, 2, 8)
    sort_kernels.pair_plan(index, 0, 8, index.numel(), late.flag(device))
    torch.cuda.synchronize() if device.type == "cuda" else None
    late.check("x")
    for wrong in (-1, 8):
        index[-1, 1] = wrong  # in the last of several blocks
        sort_kernels.pair_plan(index, 0, 8, index.numel())  # elsewhere others' ids are no fault
        late.check("x")
        sort_kernels.pair_plan(index, 0, 8, index.numel(), late.flag(device))
        torch.cuda.synchronize() if device.type == "cuda" else None
        with pytest.raises(RoutingError, match="rank 0 in layer x: expert ids must be in .* in a call before this one"):
            late.check("x")
        late.check("x")  # once


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("tokens", "top_k", "experts", "ranks"), SIZES)
def test_source_plan_and_pack(tokens: int, top_k: int, experts: int, ranks: int, parts: int) -> None:
    index, local = routing(tokens, top_k, experts), -(-experts // ranks)
    for skip in (None, ranks - 1):
        words = (2**31 - 1, 5) if parts > 1 else ()
        hits = count_rows(index.cpu(), local, ranks, skip_rank=skip, parts=parts, words=words)
        rows = tuple(hits.counts_2PC[0, :, 0].tolist())
        expected = place_rows(hits, rows)
        finite = torch.rand(tokens, top_k, device=DEVICE).bfloat16()
        counts, token_row, own = sort_kernels.source_plan(
            index, finite, local, ranks, skip, parts, hits.counts_2PC.shape[2], words
        )
        assert torch.equal(counts[0].cpu(), hits.counts_2PC[0])
        total, most = sum(rows), sort_kernels.most_rows(tokens, top_k, ranks)
        assert torch.equal(torch.where(token_row == most, total, token_row).cpu().long(), expected.token_row_TP)
        if own is None:
            assert skip is None
        else:
            own_pairs = make_pair_plan(index.cpu(), local, int((index // local == skip).sum()), skip * local)
            count = own_pairs.num_pairs
            assert torch.equal(own[0][:count].cpu().long(), own_pairs.pair_row_S)
            assert torch.equal(own[1][:count].cpu().long(), own_pairs.pair_slot_S)
            found = torch.where(own[2] == tokens * top_k, count, own[2])
            assert torch.equal(found.cpu().long(), own_pairs.row_pair_RK)
            assert torch.equal(own[3].cpu(), own_pairs.offsets_E)
        form = RowFormat(40, top_k, torch.bfloat16)
        hidden = torch.randn(tokens, 40, device=DEVICE).bfloat16()
        weights = torch.rand(tokens, top_k, device=DEVICE)
        packed = wire_kernels.pack_rows(hidden, weights, index, token_row, most, most + 3, form, local)[:total]
        assert expected.row_token_R is not None and expected.row_rank_R is not None
        row_token, row_rank = expected.row_token_R.to(DEVICE), expected.row_rank_R.to(DEVICE)
        assert torch.equal(form.hidden_of(packed), hidden[row_token])
        assert torch.equal(form.weights_of(packed), weights[row_token])
        assert torch.equal(form.ids_of(packed), local_expert_ids(index[row_token], local, row_rank))
        assert torch.equal(wire_kernels.spread_rows(hidden, token_row, total), hidden[row_token])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_cannot_be_routed_is_told_with_the_counts(value: float) -> None:
    tokens = 130 * SCALE  # several blocks
    index = routing(tokens, 2, 8)
    weights = torch.rand(tokens, 2, device=DEVICE)
    weights[tokens - 3, 1] = value
    counts = sort_kernels.source_plan(index, weights, 2, 4, 1, 2, 3)[0]
    assert counts[0, :, 0].tolist() == [-1] * 4
    for expert in (-1, 8):  # of 4 ranks with 2 experts each
        wrong = index.clone()
        wrong[tokens // 2, 0] = expert
        assert sort_kernels.source_plan(wrong, weights, 2, 4, 1, 2, 3)[0][0, :, 0].tolist() == [-2] * 4
    weights[tokens - 3, 1] = 3e38  # the sum of such would be infinite, they are not
    weights[0, 0] = 3e38
    assert int(sort_kernels.source_plan(index, weights, 2, 4, 1, 2, 3)[0][0, :, 0].min()) >= 0


@pytest.mark.parametrize("sizes", [[5], [0, 7], [300, 0, 41, 2000]])
def test_joint_places(sizes: list[int]) -> None:
    """Pairs of all pieces sorted by expert, ties by piece, as a stable sort of the concatenation gives them."""
    generator = torch.Generator().manual_seed(len(sizes))
    experts = [torch.randint(0, 5, (size,), generator=generator).sort().values for size in sizes]
    offsets = torch.stack([torch.bincount(expert, minlength=5).cumsum(0) for expert in experts])
    place, ends, starts = joint_kernels.joint_places(offsets.to(DEVICE, torch.int32), sum(sizes))
    order = torch.cat(experts).argsort(stable=True)
    expected = torch.empty_like(order).scatter_(0, order, torch.arange(sum(sizes)))
    assert torch.equal(place.cpu().long(), expected)
    assert ends.tolist() == offsets.sum(0).tolist()
    for found, expert, piece in zip(starts.cpu(), experts, expected.split(sizes), strict=True):
        first = torch.searchsorted(expert, expert)  # of each pair, the first one of its expert in the piece
        assert torch.equal(found[expert].long(), piece[first])


ROWS, TOP_K = 23, 3
SIZES = [(40, 24), (200, 136), (2049, 1030)]  # hidden, inner


class RowCase:
    """Pairs of some rows with 4 of 8 experts, and how near results must be."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        index = routing(ROWS, TOP_K, 8)
        ids = torch.where(index < 4, index, -1)
        self.on_cpu = make_pair_plan(ids.cpu(), 4, int((ids >= 0).sum()))  # references are computed on the CPU
        self.plan = PairPlan(*(field.to(DEVICE) for field in self.on_cpu))
        self.place = torch.randperm(self.plan.num_pairs, device=DEVICE).int()
        self.tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]

    def near(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-9)
        assert float(error) <= self.tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [hidden for hidden, _ in SIZES])
def test_rows(dtype: torch.dtype, hidden: int) -> None:
    case = RowCase(dtype)
    plan, place = case.plan, case.place
    wide = torch.randn(ROWS, hidden + 8, device=DEVICE).to(dtype)
    expanded = row_kernels.expand(wide[:, :hidden], plan.pair_row_S.int())
    assert torch.equal(expanded, wide[:, :hidden][plan.pair_row_S])
    placed = row_kernels.expand(wide[:, :hidden], plan.pair_row_S.int(), torch.empty_like(expanded), place)
    assert torch.equal(placed[place.long()], expanded)
    more = torch.randn_like(expanded)
    for tensors in ([expanded], [expanded, more]):
        ours = torch.full((ROWS, hidden + 8), float("nan"), device=DEVICE, dtype=dtype)[:, :hidden]
        theirs = torch.empty(ROWS, hidden, dtype=dtype)
        row_kernels.reduce_pairs(tensors, plan.row_pair_RK.int(), ours)
        reduce_pairs([tensor.cpu() for tensor in tensors], case.on_cpu, theirs)
        case.near(ours.cpu(), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize(("hidden", "inner"), SIZES)
def test_activation(dtype: torch.dtype, separate: bool, hidden: int, inner: int) -> None:
    case = RowCase(dtype)
    plan, place, near = case.plan, case.place, case.near
    pairs = plan.num_pairs
    wide, fused = (torch.randn(size, device=DEVICE).to(dtype) for size in ((ROWS, hidden + 8), (pairs, 2 * inner)))
    gate, up = fused[:, :inner], fused[:, inner:]
    weights = torch.rand(ROWS, TOP_K + 2, device=DEVICE)[:, :TOP_K]
    pair_weights = weights.reshape(-1)[plan.pair_slot_S]
    projections = (gate.contiguous(), up.contiguous()) if separate else (fused,)
    forward = row_kernels.glu_forward(projections, weights, plan.pair_slot_S.int())
    near(forward, glu_forward(gate, up, pair_weights, silu))
    grad = torch.randn(pairs, inner, device=DEVICE).to(dtype)
    expected = glu_backward(grad, gate, up, pair_weights, silu)
    grads = tuple(torch.empty_like(projection) for projection in projections)
    weight_grads = torch.zeros(ROWS, TOP_K, device=DEVICE)
    activation = torch.empty_like(grad)
    seconds = tuple(torch.empty_like(projection) for projection in projections)
    addresses = torch.empty(2, pairs, dtype=torch.int64, device=DEVICE)
    joint = row_kernels.JointPlaces(seconds, place, addresses, (wide, wide), (wide[:1], wide[3:]), 1)
    args = (grad, projections, weights, plan.pair_slot_S.int(), weight_grads)
    row_kernels.glu_backward(*args, grads, activation, joint)
    near(torch.cat(grads, 1), torch.cat(expected[:2], 1))
    near(activation[place.long()], expected[2])
    assert torch.equal(addresses[0][place.long()], plan.pair_row_S * (hidden + 8))
    assert torch.equal(addresses[1][place.long()], (plan.pair_row_S + 3) * (hidden + 8))
    near(weight_grads.flatten()[plan.pair_slot_S], expected[3].float())
    for second, first in zip(seconds, grads, strict=True):
        assert torch.equal(second[place.long()], first)
    only = joint._replace(grads=tuple(torch.full_like(second, torch.nan) for second in seconds), addresses=None)
    row_kernels.glu_backward(*args, None, activation, only)
    for second, joint_only in zip(seconds, only.grads, strict=True):
        assert torch.equal(second, joint_only)
    for _ in range(2):  # the second time where the gradient was
        row_kernels.glu_backward(*args, grads, activation)
        near(activation, expected[2])
        near(torch.cat(grads, 1), torch.cat(expected[:2], 1))
        activation = grad.clone()
        args = (activation, *args[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_per_token(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens, top_k, experts, ranks, hidden = 29, 3, 12, 4, 72
    index = routing(tokens, top_k, experts)
    hits = count_rows(index.cpu(), 3, ranks, skip_rank=1, parts=1)
    plan = place_rows(hits, tuple(hits.counts_2PC[0, :, 0].tolist()))
    rows = torch.randn(sum(plan.rows), hidden + 8, device=DEVICE).to(dtype)[:, :hidden]
    own = torch.randn(tokens, hidden, device=DEVICE).to(dtype)
    for part in (own, None):
        ours = row_kernels.reduce_rows(part, rows, plan.token_row_TP.int().to(DEVICE), dtype).cpu()
        theirs = reduce_rows(part.cpu() if part is not None else None, rows.cpu(), plan.token_row_TP, dtype)
        assert torch.allclose(ours.float(), theirs.float(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    own_grads = torch.rand(tokens, top_k, device=DEVICE)
    row_grads = torch.rand(sum(plan.rows), top_k + 2, device=DEVICE)[:, :top_k]
    found = wire_kernels.gather_weight_grads(
        own_grads, row_grads, plan.token_row_TP.int().to(DEVICE), index, 3, 1, torch.float32
    )
    for token in range(tokens):
        for k in range(top_k):
            owner = int(index[token, k]) // 3
            row = int(plan.token_row_TP[token, owner])
            assert found[token, k] == (own_grads[token, k] if owner == 1 else row_grads[row, k])


@pytest.mark.parametrize("shape", [(5, 3, 7), (3, 130, 257), (1, 1, 1)])
def test_matrices_of_experts_without_pairs_are_zero(shape: tuple[int, ...]) -> None:
    for counts in ([2, 0, 1, 0, 4], [0, 3, 0, 0, 0], [0] * 5, [1] * 5):
        offsets = torch.tensor(counts[: shape[0]]).cumsum(0).to(torch.int32).to(DEVICE)
        weight = torch.full(shape, float("nan"), dtype=torch.bfloat16, device=DEVICE)
        row_kernels.zero_empty(weight, offsets)
        for expert, count in enumerate(counts[: shape[0]]):
            assert weight[expert].isnan().all() if count else weight[expert].eq(0).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="about torch's kernel on a GPU")
def test_torchs_weight_gradient_of_experts_without_pairs_is_zero() -> None:
    counts = [0, 130, 0, 7, 0, 1, 64, 0]
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32).to(DEVICE)
    grads, inputs = (torch.randn(sum(counts), width, dtype=torch.bfloat16, device=DEVICE) for width in (256, 512))
    for _ in range(4):
        torch.full((len(counts), 256, 512), float("nan"), dtype=torch.bfloat16, device=DEVICE)  # memory used again
        found = grouped_wgrad([grads], [inputs], [offsets])
        assert found.isfinite().all()
        assert all(found[expert].eq(0).all() for expert, count in enumerate(counts) if not count)


def test_layer_takes_tokens_and_ids_of_any_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a router that works on the transposed tokens gives them; the gradient of a sum has strides of 0."""
    monkeypatch.setattr("fluid_hf.moe.permutation.use_kernels", lambda tensor: True)
    torch.manual_seed(0)
    layer = ExpertParallelExperts(4, 16, 8, device=DEVICE)
    x, w = torch.randn(5, 16, device=DEVICE), torch.rand(5, 2, device=DEVICE)
    index, found = routing(5, 2, 4), []
    for arrange in (torch.Tensor.contiguous, lambda tensor: tensor.t().contiguous().t()):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, w)]
        hidden, weights = (arrange(tensor) for tensor in inputs)
        y = layer(hidden, arrange(index), weights)
        found.append((y, *torch.autograd.grad(y.sum(), [*inputs, *layer.parameters()])))
    layer.context.late_status.check("x")
    torch.testing.assert_close(*found)
