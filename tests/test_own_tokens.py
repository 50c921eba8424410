"""The own tokens' first projection, queued before their pairs are counted."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed import RankPool, rank_pool

from fluid_hf import ExpertParallelExperts
from fluid_hf.moe.expert_math import GatedMath
from fluid_hf.moe.experts import Piece, Projected, project_piece
from fluid_hf.moe.outgoing import Outgoing
from fluid_hf.moe.own_tokens import OwnTokens
from fluid_hf.moe.permutation import PairPlan, make_pair_plan

pool2 = rank_pool(2)

TOKENS, TOP_K, RANKS = 400, 4, 2
EXPECTED = TOKENS * TOP_K // RANKS


class Math:
    """Notes what it was given; the projection of a pair is its place."""

    def __init__(self, early: bool) -> None:
        self.early, self.pieces = early, list[Piece]()

    def starts_early(self, rows_RH: torch.Tensor, weights: Any, top_k: int) -> bool:
        return self.early

    def project(self, piece: Piece, weights: Any, keep: bool, early: bool = False) -> Projected:
        self.pieces.append(piece)
        places = torch.arange(piece.plan.num_pairs)
        return Projected((places,) if keep else (), places)


def plan() -> PairPlan:
    """With places for all pairs, as the kernels make it before they are counted."""
    places = torch.arange(TOKENS * TOP_K, dtype=torch.int32)
    return PairPlan(places // TOP_K, places, places.view(TOKENS, TOP_K), torch.tensor([5], dtype=torch.int32))


def no_plan() -> PairPlan:
    raise AssertionError("the plan was there")


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    ("early", "pairs", "calls"), [(True, EXPECTED, 1), (True, 0, 1), (True, 1500, 2), (False, 7, 1)]
)
def test_what_was_started_is_used_if_it_has_room(early: bool, pairs: int, calls: int, keep: bool) -> None:
    math = Math(early)
    own = OwnTokens(math, keep)  # type: ignore[arg-type]
    own.plan = plan()
    hidden, weights = torch.zeros(TOKENS, 3), torch.zeros(TOKENS, TOP_K)
    own.start_early(hidden, weights, None, 1 / RANKS)
    assert len(math.pieces) == int(early) and not own.ready
    if early:
        assert math.pieces[0].plan.num_pairs == EXPECTED * 9 // 8 + 256, "an eighth more than the share asked for"
    own.start(hidden, weights, None, no_plan, pairs)
    assert own.ready and len(math.pieces) == calls
    taken = own.take()
    assert taken is not None and own.take() is None
    piece, projected = taken
    assert piece.plan.num_pairs == pairs and piece.rows_RH is hidden
    assert projected.hidden_SI is not None
    for tensor in (projected.hidden_SI, *projected.kept):
        assert tensor.tolist() == list(range(pairs))
    assert len(projected.kept) == int(keep)


def test_without_a_plan_one_is_made() -> None:
    math = Math(True)
    own = OwnTokens(math, True)  # type: ignore[arg-type]
    hidden, weights = torch.zeros(TOKENS, 3), torch.zeros(TOKENS, TOP_K)
    own.start_early(hidden, weights, None, 1 / RANKS)
    own.start(hidden, weights, None, plan, 9)
    assert [piece.plan.num_pairs for piece in math.pieces] == [9]


def test_elements_of_a_row_reach_the_math_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels take any distance between rows, and none inside them."""
    found: list[tuple[int, ...]] = []

    def planned(ids_RK: torch.Tensor, *sizes: Any, **places: Any) -> PairPlan:
        found.append(ids_RK.stride())
        return make_pair_plan(ids_RK, *sizes, **places)

    def project(piece: Piece, *arguments: Any) -> Projected:
        found.extend((piece.rows_RH.stride(), piece.weights_RK.stride()))
        return project_piece(piece, *arguments)

    monkeypatch.setattr("fluid_hf.moe.layer_call.make_pair_plan", planned)
    monkeypatch.setattr("fluid_hf.moe.expert_math.project_piece", project)
    index = torch.tensor([[0, 3], [1, 2], [3, 1]])
    ExpertParallelExperts(4, 8, 6)(
        *(tensor.t().contiguous().t() for tensor in (torch.ones(3, 8), index, torch.ones(3, 2)))
    )
    assert found == [(2, 1), (8, 1), (2, 1)]
    ExpertParallelExperts(4, 8, 6)(torch.ones(1, 8).expand(3, 8), index, torch.ones(3, 2))
    assert found[4] == (0, 1), "rows may lie anywhere"


def run_skewed(rank: int, world: int) -> tuple[int, list[list[int]], bool]:
    """Number of the rank's own pairs; places of each projection of them in three calls; whether results are the same.

    Most pairs are for rank 0. As with kernels, which queue the projection before the host has the counts.
    """
    layer, generator = ExpertParallelExperts(4, 8, 6, group=dist.group.WORLD), torch.Generator().manual_seed(0)
    local = torch.rand(TOKENS, 1, generator=generator) < 0.95
    index = torch.where(local, torch.tensor([0, 1]), torch.tensor([2, 3]))
    hidden, weights = torch.randn(TOKENS, 8, generator=generator), torch.rand(TOKENS, 2, generator=generator)
    places: list[list[int]] = []
    project, pack = GatedMath.project, Outgoing.pack

    def noting(self: GatedMath, piece: Piece, *arguments: Any, **keywords: Any) -> Projected:
        if piece.rows_RH.shape[0] == TOKENS and piece.rows_RH.data_ptr() == hidden.data_ptr():
            places[-1].append(piece.plan.num_pairs)
        return project(self, piece, *arguments, **keywords)

    results = []
    with (
        mock.patch.object(GatedMath, "project", noting),
        mock.patch.object(GatedMath, "starts_early", lambda *arguments: True),
        mock.patch.object(Outgoing, "pack", lambda self: [pack(self)] != []),
    ):
        for _ in range(3):
            places.append([])
            results.append(layer(hidden, index, weights).detach())
    own = int((index // 2 == rank).sum())
    return own, places, all(torch.equal(results[0], result) for result in results)


def test_places_follow_the_routing_of_the_call_before(pool2: RankPool) -> None:
    """Projecting them a second time, as too few places make necessary, cost a tenth of a layer."""
    pairs, even = 2 * TOKENS, TOKENS * 9 // 8 + 256
    (most, *first), (least, *second) = pool2.run(run_skewed)
    assert least < pairs // 8 and even < most == pairs - least
    assert first == [[[even, most], [pairs], [pairs]], True]
    assert second == [[[even], *[[least * 9 // 8 + 256]] * 2], True]
