"""Routes of rows: which slices each peer gets and gives, from hand-written row counts; no process group."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fluid_hf.comm.peer_exchange import PeerTensor
from fluid_hf.comm.row_route import RowRoute, SerialRoute, WaveRoute, make_route, route_parts
from fluid_hf.comm.tournament import Message, plan_waves

Posted = list[tuple[int, list[int]]]


class FakeExchange:
    """Records what is posted; sends nothing."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.posts: list[tuple[list[PeerTensor], list[PeerTensor]]] = []
        self.collectives: list[tuple[torch.Tensor, torch.Tensor, list[int], list[int]]] = []
        self.rounds: list[int] = []

    def at_round(self, index: int) -> None:
        self.rounds.append(index)

    def post(self, sends: Sequence[PeerTensor], recvs: Sequence[PeerTensor]) -> int:
        self.posts.append((list(sends), list(recvs)))
        return len(self.posts)

    def all_to_all(self, output: torch.Tensor, input: torch.Tensor, outputs: list[int], inputs: list[int]) -> str:
        self.collectives.append((output, input, outputs, inputs))
        return "handle"


def numbered(rows: int, start: int = 0) -> torch.Tensor:
    """Rows [rows, 2] whose first entry is their number."""
    return torch.stack([torch.arange(start, start + rows), torch.zeros(rows, dtype=torch.int64)], dim=1)


def numbers(tensors: Sequence[PeerTensor]) -> Posted:
    return [(peer, tensor[:, 0].tolist()) for peer, tensor in tensors]


def wave_route(exchange: Any, waves: Any, sent: Sequence[int], received: Sequence[Sequence[int]]) -> WaveRoute:
    return WaveRoute(exchange, waves, sent, received)


# Rank 0 of 4 meets rank 3, then ranks 1 and 2 in a second wave.
TWO_WAVES = ((Message(3, 0, 1),), (Message(1, 0, 1), Message(2, 0, 1)))
# To rank 1: rows 0, 1; to rank 2: rows 2, 3, 4; to rank 3: row 5.
SENT = [0, 2, 3, 1]
# (rows, pairs) from each source; the 9 pairs that stay here are in no wave, and rank 2 sends nothing.
RECEIVED = [[0, 9], [4, 6], [0, 0], [2, 3]]


def test_two_waves_out() -> None:
    exchange = FakeExchange()
    route = wave_route(exchange, TWO_WAVES, SENT, RECEIVED)
    assert (route.num_waves, route.num_sent, route.num_received, route.serial) == (2, 6, 6, False)
    # Wave 0 receives 2 rows of rank 3, wave 1 receives 4 of rank 1 and 0 of rank 2.
    assert [route.wave_bounds(wave) for wave in range(2)] == [(0, 2), (2, 6)]
    assert [route.wave_pairs(wave) for wave in range(2)] == [3, 6]
    sent, received = numbered(6), numbered(6, start=100)
    assert [route.post_out(wave, sent, received) for wave in range(2)] == [1, 2]
    (sends, recvs), (more_sends, more_recvs) = exchange.posts
    assert numbers(sends) == [(3, [5])]
    assert numbers(recvs) == [(3, [100, 101])]
    assert numbers(more_sends) == [(1, [0, 1]), (2, [2, 3, 4])]
    assert numbers(more_recvs) == [(1, [102, 103, 104, 105]), (2, [])]
    assert recvs[0][1].data_ptr() == received.data_ptr()  # rows arrive in the buffer itself, not in a copy


def test_two_waves_back() -> None:
    exchange = FakeExchange()
    route = wave_route(exchange, TWO_WAVES, SENT, RECEIVED)
    returned = numbered(6)
    route.post_back(0, numbered(2, start=200), returned)
    route.post_back(1, numbered(4, start=202), returned)
    (sends, recvs), (more_sends, more_recvs) = exchange.posts
    # Each peer gets back as many rows as it sent, and each row returns to its own place.
    assert numbers(sends) == [(3, [200, 201])]
    assert numbers(recvs) == [(3, [5])]
    assert numbers(more_sends) == [(1, [202, 203, 204, 205]), (2, [])]
    assert numbers(more_recvs) == [(1, [0, 1]), (2, [2, 3, 4])]
    assert more_recvs[0][1].data_ptr() == returned.data_ptr()


def test_one_peer_in_three_parts() -> None:
    # 7 rows to send: 7/3 and 14/3 round down to 2 and 4. 5 rows to receive: 5/3 and 10/3 round down to 1 and 3.
    exchange = FakeExchange()
    waves = tuple((Message(1, part, 3),) for part in range(3))
    route = wave_route(exchange, waves, [0, 7], [[0, 9, 0, 0], [5, 2, 4, 6]])
    assert [route.wave_bounds(wave) for wave in range(3)] == [(0, 1), (1, 3), (3, 5)]
    assert [route.wave_pairs(wave) for wave in range(3)] == [2, 4, 6]
    for wave in range(3):
        route.post_out(wave, numbered(7), numbered(5, start=100))
    assert [numbers(sends) for sends, _ in exchange.posts] == [[(1, [0, 1])], [(1, [2, 3])], [(1, [4, 5, 6])]]
    assert [numbers(recvs) for _, recvs in exchange.posts] == [[(1, [100])], [(1, [101, 102])], [(1, [103, 104])]]
    route.post_back(2, numbered(2, start=200), numbered(7))
    assert [numbers(tensors) for tensors in exchange.posts[3]] == [[(1, [200, 201])], [(1, [4, 5, 6])]]


def test_peers_without_rows() -> None:
    exchange = FakeExchange()
    waves = ((Message(1, 0, 1),), (), (Message(2, 0, 1),))  # an odd size: idle in the second round
    route = wave_route(exchange, waves, [0, 0, 0], [[0, 0], [0, 0], [0, 0]])
    assert (route.num_waves, route.num_sent, route.num_received) == (3, 0, 0)
    assert [route.wave_bounds(wave) for wave in range(3)] == [(0, 0)] * 3
    assert [route.wave_pairs(wave) for wave in range(3)] == [0] * 3
    for wave in range(3):
        route.post_out(wave, numbered(0), numbered(0))
        route.post_back(wave, numbered(0), numbered(0))
    empty: list[tuple[Posted, Posted]] = [([(1, [])], [(1, [])]), ([], []), ([(2, [])], [(2, [])])]
    expected = [posted for posted in empty for _ in ("out", "back")]
    assert [(numbers(sends), numbers(recvs)) for sends, recvs in exchange.posts] == expected


def test_serial_route() -> None:
    exchange: Any = FakeExchange(rank=1, size=3)
    # Own rows (3 of rank 1) take part; rank 2 gets and sends nothing.
    route = SerialRoute(exchange, (2, 3, 0), [[1, 4], [3, 5], [0, 0]])
    assert (route.serial, route.num_waves, route.num_sent, route.num_received) == (True, 1, 5, 4)
    assert route.wave_bounds(0) == (0, 4)
    assert route.wave_pairs(0) == 4 + 5 + 0
    sent, received, processed, returned = numbered(5), numbered(4), numbered(4), numbered(5)
    assert route.post_out(0, sent, received) == "handle"
    assert route.post_back(0, processed, returned) == "handle"
    out, back = exchange.collectives
    assert out[0] is received and out[1] is sent and out[2:] == ([1, 3, 0], [2, 3, 0])
    assert back[0] is returned and back[1] is processed and back[2:] == ([2, 3, 0], [1, 3, 0])
    assert not exchange.posts


def test_choice_of_route() -> None:
    exchange: Any = FakeExchange(rank=1, size=2)
    received = [[3, 1, 1, 1], [0, 0, 0, 0]]
    assert isinstance(make_route(exchange, 3, True, [1, 0], received), SerialRoute)
    route = make_route(exchange, 3, False, [1, 0], received)
    assert isinstance(route, WaveRoute) and route.num_waves == 3
    # 2 ranks have 1 round, so 3 waves are 3 parts; 4 ranks have 3 rounds, so 4 waves are 2 parts of each round.
    assert [route_parts(2, 3, False), route_parts(4, 3, False), route_parts(4, 4, False)] == [3, 1, 2]
    assert [route_parts(2, 3, True), route_parts(1, 3, False)] == [1, 1]


def deliver(exchanges: list[FakeExchange]) -> None:
    """Carry everything posted, pair by pair in the order of posting."""
    mail: dict[tuple[int, int], deque[torch.Tensor]] = {}
    for exchange in exchanges:
        for sends, _ in exchange.posts:
            for peer, tensor in sends:
                mail.setdefault((exchange.rank, peer), deque()).append(tensor)
    for exchange in exchanges:
        for _, recvs in exchange.posts:
            for peer, tensor in recvs:
                arriving = mail[peer, exchange.rank].popleft()
                assert arriving.shape == tensor.shape
                tensor.copy_(arriving)
        exchange.posts.clear()
    assert not any(mail.values())


# rows[a][b]: rows from rank a to rank b; with a rank that sends none and one that gets none.
THREE = [[0, 4, 0], [0, 0, 0], [5, 7, 0]]
FOUR = [[0, 1, 2, 3], [4, 0, 5, 6], [0, 0, 0, 0], [7, 8, 0, 0]]


@pytest.mark.parametrize("waves", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("rows", [THREE, FOUR])
def test_rows_arrive_and_return(rows: list[list[int]], waves: int) -> None:
    size = len(rows)
    parts = plan_waves(0, size, waves)[1]
    exchanges = [FakeExchange(rank, size) for rank in range(size)]
    routes: list[RowRoute] = []
    for rank, exchange in enumerate(exchanges):
        counts = [[rows[source][rank], *[0] * parts] for source in range(size)]
        fake: Any = exchange
        routes.append(make_route(fake, waves, False, rows[rank], counts))
    sent = [numbered(sum(rows[rank]), start=100 * rank) for rank in range(size)]
    received = [torch.full((route.num_received, 2), -1) for route in routes]
    returned = [torch.full((route.num_sent, 2), -1) for route in routes]
    for rank, route in enumerate(routes):
        for wave in range(route.num_waves):
            route.post_out(wave, sent[rank], received[rank])
    deliver(exchanges)
    for rank in range(size):
        expected: list[int] = []
        for source in range(size):
            start = 100 * source + sum(rows[source][:rank])
            expected += range(start, start + rows[source][rank])
        assert sorted(received[rank][:, 0].tolist()) == expected
    for rank, route in enumerate(routes):
        for wave in range(route.num_waves):
            low, high = route.wave_bounds(wave)
            route.post_back(wave, received[rank][low:high] + 1000, returned[rank])
    deliver(exchanges)
    for rank in range(size):
        assert torch.equal(returned[rank], sent[rank] + 1000)
