"""Tournament rounds, waves and parts: every pair of ranks meets once, in the same order on both sides."""

from __future__ import annotations

import pytest

from fluid_hf.comm.tournament import num_rounds, part_bounds, plan_waves, round_peer


@pytest.mark.parametrize("size", range(2, 10))
def test_every_pair_meets_once(size: int) -> None:
    met = []
    for index in range(num_rounds(size)):
        peers = [round_peer(index, rank, size) for rank in range(size)]
        for rank, peer in enumerate(peers):
            assert peer is None or (peer != rank and peers[peer] == rank)
        assert peers.count(None) == size % 2  # an odd size idles one rank a round
        met += [frozenset((rank, peer)) for rank, peer in enumerate(peers) if peer is not None and rank < peer]
    assert len(met) == len(set(met)) == size * (size - 1) // 2


def test_rounds_of_four() -> None:
    # Circle method with rank 3 fixed: round 0: 0-3, 1-2; round 1: 0-1, 2-3; round 2: 0-2, 1-3.
    assert [[round_peer(index, rank, 4) for rank in range(4)] for index in range(3)] == [
        [3, 2, 1, 0],
        [1, 0, 3, 2],
        [2, 3, 0, 1],
    ]


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("waves", [1, 2, 3, 4, 7, 9, 20])
def test_waves_serve_every_part_once_and_alike(size: int, waves: int) -> None:
    plans = [plan_waves(rank, size, waves) for rank in range(size)]
    assert len({(len(planned), parts) for planned, parts in plans}) == 1
    parts = plans[0][1]
    orders = []
    for rank, (planned, _) in enumerate(plans):
        messages = [(message.peer, message.part) for wave in planned for message in wave]
        expected = [(peer, part) for peer in range(size) if peer != rank for part in range(parts)]
        assert sorted(messages) == (expected if size > 1 else [])
        orders.append([(index, message) for index, wave in enumerate(planned) for message in wave])
    for a in range(size):
        for b in range(a):
            mine = [(index, message.part) for index, message in orders[a] if message.peer == b]
            theirs = [(index, message.part) for index, message in orders[b] if message.peer == a]
            assert mine == theirs


def test_number_of_waves() -> None:
    # 8 ranks have 7 rounds: grouped for fewer waves, cut into parts for more.
    assert [len(plan_waves(0, 8, waves)[0]) for waves in (1, 2, 7)] == [1, 2, 7]
    assert len(plan_waves(0, 2, 4)[0]) == 4 and plan_waves(0, 2, 4)[1] == 4
    assert plan_waves(0, 1, 3) == ((), 1)


@pytest.mark.parametrize(("rows", "parts"), [(0, 3), (1, 3), (7, 3), (9, 3), (10, 1)])
def test_parts_cover_all_rows(rows: int, parts: int) -> None:
    bounds = [part_bounds(rows, part, parts) for part in range(parts)]
    assert bounds[0][0] == 0 and bounds[-1][1] == rows
    assert all(before[1] == after[0] for before, after in zip(bounds, bounds[1:], strict=False))
    assert max(high - low for low, high in bounds) - min(high - low for low, high in bounds) <= 1
