"""Grouped GEMMs that read rows by index, against plain products. On a GPU, or on the CPU with TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from families import relative_error

from fluid_hf.moe.permutation import PairPlan, make_pair_plan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
AVAILABLE = importlib.util.find_spec("triton") is not None and (torch.cuda.is_available() or INTERPRETED)
kernels = pytest.mark.skipif(not AVAILABLE, reason="needs Triton and a GPU, or its interpreter")
if AVAILABLE:
    from fluid_hf import launch
    from fluid_hf.moe import gemm_kernels, linear_kernels, wgrad_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Triton's interpreter multiplies bfloat16 as the integers it keeps it in.
DTYPES = [dtype for dtype in TOLERANCE if not (INTERPRETED and dtype == torch.bfloat16)]
# Tokens, hidden, inner, experts held, experts per token; one has experts without a pair, the last one an expert with
# more rows than a tile.
SIZES = [(1, 32, 32, 1, 1), (50, 96, 40, 6, 3), (30, 40, 72, 5, 4), (40, 33, 30, 4, 2), (3, 40, 48, 8, 1)]
SIZES += [(150, 64, 32, 2, 2), (10, 136, 128, 2, 2)]  # the last one's other gradient has tiles of 256 rows
UNDESCRIBED = (20, 33, 24, 3, 2)  # the copy engine loads the other operand of a weight gradient, but cannot write it
MANY = 7  # places for pairs that there are not


class Case:
    """Rows of a wider buffer, their pairs among experts of which two are elsewhere, and weights."""

    def __init__(self, size: tuple[int, ...], dtype: torch.dtype) -> None:
        tokens, hidden, inner, experts, top_k = size
        generator = torch.Generator().manual_seed(tokens)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

        index = torch.rand(tokens, experts + 2, generator=generator).argsort(1)[:, :top_k]
        ids = torch.where(index < experts, index, -1)
        plan = make_pair_plan(ids, experts, int((ids >= 0).sum()))
        self.plan = PairPlan(*(field.to(DEVICE, torch.int32) for field in plan))
        self.expert = torch.repeat_interleave(
            torch.arange(experts), torch.diff(plan.offsets_E, prepend=torch.zeros(1, dtype=torch.int32))
        ).to(DEVICE)
        self.one_hot = torch.nn.functional.one_hot(self.expert, experts).float()
        self.rows = random(tokens, hidden + 8)[:, :hidden]
        self.pairs = self.rows[self.plan.pair_row_S.long()].float()
        self.weights = torch.rand(tokens, top_k + 2, generator=generator).to(DEVICE)[:, :top_k]
        self.gate_up, self.down = random(experts, 2 * inner, hidden), random(experts, hidden, inner)
        self.first = torch.einsum("sh,snh->sn", self.pairs, self.gate_up[self.expert].float())
        self.grad, self.inner = random(plan.num_pairs, 2 * inner), inner

    def near(self, ours: torch.Tensor, theirs: torch.Tensor) -> bool:
        if ours.shape != theirs.shape or ours.dtype != self.rows.dtype:
            return False
        return not theirs.numel() or relative_error(ours.double(), theirs.double()) <= TOLERANCE[ours.dtype]


@kernels
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_projections(size: tuple[int, ...], dtype: torch.dtype) -> None:
    case = Case(size, dtype)
    plan, inner = case.plan, case.inner
    weight_S = case.weights.reshape(-1)[plan.pair_slot_S.long()]
    hidden = torch.nn.functional.silu(case.first[:, :inner]) * case.first[:, inner:] * weight_S[:, None]
    separate = case.gate_up[:, :inner].contiguous(), case.gate_up[:, inner:].contiguous()
    beyond = torch.full((MANY,), 10**6, dtype=torch.int32, device=DEVICE)
    behind, before = torch.stack(separate), torch.stack(separate[::-1])  # up behind gate in memory, and before it
    for first in ((case.gate_up,), (behind[0], behind[1]), (before[1], before[0])):
        for places in (plan.num_pairs, plan.num_pairs + MANY, plan.num_pairs // 2):
            where = [torch.cat([field, beyond])[:places] for field in (plan.pair_row_S, plan.pair_slot_S)]
            known = min(places, plan.num_pairs)
            for keep in (True, False):
                kept, ours = gemm_kernels.gated_linear(case.rows, *where, plan.offsets_E, first, case.weights, keep)
                assert case.near(ours[:known], hidden[:known])
                assert [tensor.shape[1] for tensor in kept] == [w.shape[1] for w in first] * keep
                if keep:
                    assert case.near(torch.cat(kept, 1)[:known], case.first[:known])
    ours = linear_kernels.gathered_linear(case.rows, plan.pair_row_S, plan.offsets_E, case.gate_up, False)
    assert case.near(ours, case.first)
    pairs = case.pairs.to(dtype)
    assert case.near(linear_kernels.gathered_linear(pairs, None, plan.offsets_E, case.gate_up, False), case.first)
    gate, up = (weight.transpose(1, 2).contiguous() for weight in separate)
    both = linear_kernels.gathered_linear(pairs, None, plan.offsets_E, separate[0], False, (pairs, separate[1]))
    assert case.near(both, case.first[:, :inner] + case.first[:, inner:])
    both = linear_kernels.gathered_linear(case.rows, plan.pair_row_S, plan.offsets_E, gate, True, (case.rows, up))
    assert case.near(both, case.first[:, :inner] + case.first[:, inner:])
    ours = linear_kernels.gathered_linear(case.rows, plan.pair_row_S, plan.offsets_E, case.down, True)
    assert case.near(ours, torch.einsum("sh,shi->si", case.pairs, case.down[case.expert].float()))


@kernels
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_projections_by_the_copy_engine(
    size: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as by threads; a row that is not finite reaches no other expert's."""
    case = Case(size, dtype)
    linear, plan, inner, experts_held = linear_kernels.gathered_linear, case.plan, case.inner, size[3]
    pairs, index = case.pairs.to(dtype), case.expert
    gate, up = case.gate_up[:, :inner].contiguous(), case.gate_up[:, inner:].contiguous()
    turned = [weight.transpose(1, 2).contiguous() for weight in (gate, up)]
    more = pairs.flip(0).contiguous()
    order = (pairs, gate, more, up), (torch.stack([more, pairs]), torch.stack([up, gate]))
    behind = order[1][0][1], order[1][1][1], order[1][0][0], order[1][1][0]  # the second ones lie before the first ones

    def found() -> list[torch.Tensor]:
        results = [
            linear(case.rows, plan.pair_row_S, plan.offsets_E, weight, of) for weight, of in ((gate, 0), (case.down, 1))
        ]
        for rows, weight, rows2, weight2 in (order[0], behind):
            results += [
                linear(rows, None, plan.offsets_E, weight, False),
                linear(more, None, plan.offsets_E, weight2, False),
            ]
            results.append(linear(rows, None, plan.offsets_E, weight, False, (rows2, weight2)))
        results.append(linear(pairs, None, plan.offsets_E, turned[0], True, (more, turned[1])))
        return results

    by_threads = found()
    monkeypatch.setattr(linear_kernels, "LONG", 0)
    monkeypatch.setattr(linear_kernels, "MIN_DEEP", 1)
    by_engine = found()
    for ours, theirs in zip(by_engine, by_threads, strict=True):
        assert case.near(ours, theirs.float())
    assert torch.equal(by_engine[4], by_engine[7]), "the order of a sum does not depend on where its operands lie"
    if experts_held > 1 and pairs.shape[0]:
        poisoned = pairs.clone()
        poisoned[-1] = torch.inf
        result = linear(poisoned, None, plan.offsets_E, gate, False)
        elsewhere = index != index[-1]
        assert torch.equal(result[elsewhere], by_engine[2][elsewhere])


@kernels
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_rows_that_lie_apart_for_each_expert(
    size: tuple[int, ...], engine: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits of rows side by side; what lies between is not read."""
    case = Case(size, dtype)
    plan, inner, held = case.plan, case.inner, size[3]
    if engine:
        monkeypatch.setattr(linear_kernels, "LONG", 0)
        monkeypatch.setattr(linear_kernels, "MIN_DEEP", 1)
    gap = torch.arange(1, held + 1, device=DEVICE, dtype=torch.int32) * 3
    starts = torch.cat([plan.offsets_E.new_zeros(1), plan.offsets_E[:-1]]) + gap
    at = torch.arange(plan.num_pairs, device=DEVICE) + gap[case.expert]
    places = linear_kernels.Places(starts, plan.num_pairs)
    rows = case.grad[:, :inner].contiguous(), case.grad[:, inner:].contiguous()
    apart = [torch.full((plan.num_pairs + 3 * held + 3, inner), torch.nan, device=DEVICE, dtype=dtype) for _ in rows]
    for tensor, values in zip(apart, rows, strict=True):
        tensor[at] = values
    weights = case.gate_up[:, :inner].contiguous(), case.gate_up[:, inner:].contiguous()
    linear, second = linear_kernels.gathered_linear, (apart[1], weights[1])
    ours = linear(apart[0], None, plan.offsets_E, weights[0], True, None, places)
    assert torch.equal(ours, linear(rows[0], None, plan.offsets_E, weights[0], True))
    ours = linear(apart[0], None, plan.offsets_E, weights[0], True, second, places)
    assert torch.equal(ours, linear(rows[0], None, plan.offsets_E, weights[0], True, (rows[1], weights[1])))


@kernels
def test_long_products_are_left_to_the_copy_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(pairs: int, deep: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(1, dtype=dtype, device=DEVICE).expand(pairs, deep)

    weight = torch.empty(1, dtype=torch.bfloat16, device=DEVICE).expand(4, 2048, 4096)
    monkeypatch.setattr(linear_kernels, "can_describe", lambda tensor: tensor.dtype != torch.float32)
    monkeypatch.setattr(torch.Tensor, "is_contiguous", lambda tensor: True)
    for pairs, deep, expected in ((100, 4096, False), (20000, 768, False), (20000, 4096, True)):
        way = linear_kernels._Engine.of(rows(pairs, deep), None, weight[:, :, :deep], None)
        assert (way is not None and linear_kernels._is_long(pairs, weight)) == expected
        assert linear_kernels.prefers_linear(rows(pairs, deep), weight)
    half = rows(20000, 1536), weight[:, :, :1536]
    assert linear_kernels._Engine.of(half[0], None, half[1], None) is None
    assert linear_kernels._Engine.of(half[0], None, half[1], half) is not None, "two short sums are a long one"
    assert not linear_kernels.prefers_linear(rows(100, 2048), weight.float())
    monkeypatch.setattr(linear_kernels, "can_describe", lambda tensor: False)
    assert linear_kernels.prefers_linear(rows(100, 4096), weight), "a short one takes the host less than torch's"
    assert not linear_kernels.prefers_linear(rows(20000, 4096), weight)


@kernels
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [*SIZES, UNDESCRIBED])
def test_weight_gradients(size: tuple[int, ...], dtype: torch.dtype) -> None:
    case = Case(size, dtype)
    expected = torch.einsum("se,sn,sh->enh", case.one_hot, case.grad.float(), case.pairs)
    rows, plan, half = case.rows, case.plan, case.rows.shape[0] // 2
    copy = torch.empty(rows.shape[0], rows.shape[1] + 16, device=DEVICE, dtype=dtype)[:, : rows.shape[1]]
    copy.copy_(rows)  # the rows of the second half are read from here
    row_S = plan.pair_row_S.long()
    between = (copy.data_ptr() - rows.data_ptr()) // rows.element_size()
    where_S = torch.where(row_S < half, row_S * rows.stride(0), row_S * copy.stride(0) + between)
    unit = 2 if int((where_S % 2).sum()) == 0 else 1
    for where in ((plan.pair_row_S, 0), (where_S // unit, unit)):
        args = rows, *where, case.grad, plan.offsets_E
        assert case.near(wgrad_kernels.gathered_wgrad(*args, False), expected)
        assert case.near(wgrad_kernels.gathered_wgrad(*args, True), expected.transpose(1, 2))


@kernels
@pytest.mark.gpu
@pytest.mark.parametrize("parts", [0, 1, 4])
def test_weight_gradients_are_written_in_any_parts(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((30, 40, 72, 5, 4), torch.float16)
    args = case.rows, case.plan.pair_row_S, 0, case.grad, case.plan.offsets_E
    expected = [wgrad_kernels.gathered_wgrad(*args, rows_first) for rows_first in (False, True)]
    monkeypatch.setattr(wgrad_kernels, "PARTS", parts)
    for rows_first in (False, True):
        assert torch.equal(wgrad_kernels.gathered_wgrad(*args, rows_first), expected[rows_first])


@kernels
@pytest.mark.parametrize(
    ("spared", "shared", "expected"),
    [(0, False, (20, 1)), (0, True, (20, 4)), (3, True, (14, 1)), (99, True, (2, 1))],
)
def test_multiprocessors_left_to_messages(
    spared: int, shared: bool, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wgrad_kernels, "_processors", lambda device: 10)
    monkeypatch.setattr(wgrad_kernels, "spared_now", lambda: spared)
    assert wgrad_kernels._programs_at_once(2, None, shared) == expected


@kernels
def test_tiles_fit_results_and_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def tile(tall: int, wide: int, rows_first: bool, parts: int = 2) -> tuple[int, int]:
        return wgrad_kernels._tile_of(torch.empty(1, tall, wide, device="meta"), rows_first, parts)[:2]

    monkeypatch.setattr(wgrad_kernels, "shared_bytes", lambda device: 227 * 1024)
    assert tile(512, 384, False) == (256, 128) and tile(512, 512, True) == (128, 256)
    assert tile(384, 512, False) == (128, 256) and tile(512, 384, True) == (128, 128)
    assert tile(512, 512, False, parts=1) == tile(512, 512, False, parts=0) == (128, 256)
    monkeypatch.setattr(wgrad_kernels, "shared_bytes", lambda device: 163 * 1024)
    assert tile(512, 384, False) == (128, 128)


@kernels
def test_descriptors_hold_plain_integers() -> None:
    """Triton's launcher takes no others; its interpreter takes what it gets."""
    pairs, gate_up = (torch.empty(*shape, dtype=torch.float16, device=DEVICE) for shape in ((6, 16), (2, 16, 8)))
    made = [
        launch.describe_ragged(pairs, 64, 128),
        launch.describe_ragged(pairs, 64, 128, 96),
        wgrad_kernels._tiles_of(gate_up, 128, 64),
    ]
    for of in (*made, gemm_kernels._gate_and_up(gate_up, gate_up, 8, 128, 64)[0]):
        assert {type(number) for number in (*of.shape, *of.strides, *of.block_shape)} == {int}
