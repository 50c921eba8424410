"""Tournament rounds, waves and parts: every pair of ranks meets once, in the same order on both sides."""

from __future__ import annotations

import pytest

from fluid_hf.comm.tournament import Message, num_rounds, part_bounds, plan_waves, round_peer

SIZES = range(1, 10)


def test_number_of_rounds() -> None:
    # Even sizes: every rank meets each of the others in size - 1 rounds; odd sizes idle once each, so one round more.
    assert [num_rounds(size) for size in SIZES] == [0, 1, 3, 3, 5, 5, 7, 7, 9]


def test_rounds_of_four() -> None:
    # Round 0: 0-3 and 1-2; round 1: 0-1 and 2-3; round 2: 0-2 and 1-3.
    peers = [[round_peer(index, rank, 4) for rank in range(4)] for index in range(3)]
    assert peers == [[3, 2, 1, 0], [1, 0, 3, 2], [2, 3, 0, 1]]


def test_rounds_of_three() -> None:
    # As with four ranks, where who meets rank 3 idles. Round 0: 1-2; round 1: 0-1; round 2: 0-2.
    peers = [[round_peer(index, rank, 3) for rank in range(3)] for index in range(3)]
    assert peers == [[None, 2, 1], [1, 0, None], [2, None, 0]]


@pytest.mark.parametrize("size", SIZES)
def test_every_pair_meets_once(size: int) -> None:
    met: list[tuple[int, int]] = []
    idle: list[int] = []
    for index in range(num_rounds(size)):
        peers = [round_peer(index, rank, size) for rank in range(size)]
        for rank, peer in enumerate(peers):
            if peer is None:
                idle.append(rank)
                continue
            assert peer != rank and peers[peer] == rank  # symmetric, so one peer per round
            met.append((rank, peer))
        assert peers.count(None) == size % 2
    assert sorted(met) == [(a, b) for a in range(size) for b in range(size) if a != b]
    assert sorted(idle) == (list(range(size)) if size % 2 and size > 1 else [])  # everyone idles once


def test_fewer_waves_than_rounds() -> None:
    # Rank 0 of 4 meets 3, 1, 2. Three rounds in two waves: 3 * 1 // 2 = 1 round, then the other two.
    assert plan_waves(0, 4, 1) == (((Message(3, 0, 1), Message(1, 0, 1), Message(2, 0, 1)),), 1)
    assert plan_waves(0, 4, 2) == (((Message(3, 0, 1),), (Message(1, 0, 1), Message(2, 0, 1))), 1)
    assert plan_waves(0, 4, 3) == (((Message(3, 0, 1),), (Message(1, 0, 1),), (Message(2, 0, 1),)), 1)


def test_more_waves_than_rounds() -> None:
    # Two ranks have one round: three waves are three parts. Four have three: four waves need two parts, 6 waves.
    assert plan_waves(1, 2, 3) == (tuple((Message(0, part, 3),) for part in range(3)), 3)
    planned, parts = plan_waves(0, 4, 4)
    assert parts == 2
    assert [(message.peer, message.part) for wave in planned for message in wave] == [
        (3, 0), (1, 0), (2, 0), (3, 1), (1, 1), (2, 1),
    ]  # fmt: skip
    assert [len(wave) for wave in planned] == [1] * 6


def test_idle_rank_has_empty_waves() -> None:
    # Rank 0 of 3 idles in round 0 but still has its three waves.
    assert plan_waves(0, 3, 3) == (((), (Message(1, 0, 1),), (Message(2, 0, 1),)), 1)


def test_nothing_to_exchange() -> None:
    assert [plan_waves(0, 1, waves) for waves in (1, 2, 7)] == [((), 1)] * 3


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("waves", [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 20])
def test_waves_on_all_ranks(size: int, waves: int) -> None:
    plans = [plan_waves(rank, size, waves) for rank in range(size)]
    counts = {(len(planned), parts) for planned, parts in plans}
    assert len(counts) == 1
    ((count, parts),) = counts
    if 1 < size and waves <= num_rounds(size):
        assert (count, parts) == (waves, 1)
    elif size > 1:
        assert waves <= count == parts * num_rounds(size) < waves + num_rounds(size)
    orders = []
    for rank, (planned, _) in enumerate(plans):
        messages = [(index, message) for index, wave in enumerate(planned) for message in wave]
        assert all(message.parts == parts for _, message in messages)
        others = [(peer, part) for peer in range(size) if peer != rank for part in range(parts)]
        assert sorted((message.peer, message.part) for _, message in messages) == (others if size > 1 else [])
        orders.append(messages)
    for a in range(size):
        for b in range(a):
            # In the same waves and in the same order on both sides, or messages would be taken for one another.
            mine = [(index, message.part) for index, message in orders[a] if message.peer == b]
            theirs = [(index, message.part) for index, message in orders[b] if message.peer == a]
            assert mine == theirs


@pytest.mark.parametrize(
    ("rows", "parts", "bounds"),
    [
        (7, 1, [(0, 7)]),
        (7, 2, [(0, 3), (3, 7)]),
        (7, 3, [(0, 2), (2, 4), (4, 7)]),
        (2, 3, [(0, 0), (0, 1), (1, 2)]),
        (0, 2, [(0, 0), (0, 0)]),
    ],
)
def test_parts(rows: int, parts: int, bounds: list[tuple[int, int]]) -> None:
    assert [part_bounds(rows, part, parts) for part in range(parts)] == bounds


def test_parts_cover_all_rows_evenly() -> None:
    for rows in range(40):
        for parts in range(1, 12):
            bounds = [part_bounds(rows, part, parts) for part in range(parts)]
            assert [row for low, high in bounds for row in range(low, high)] == list(range(rows))
            sizes = [high - low for low, high in bounds]
            assert max(sizes) - min(sizes) <= 1
