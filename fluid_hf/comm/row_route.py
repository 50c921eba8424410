"""The way of the rows of one layer call: from the ranks that own tokens to the ranks that own experts, and back.

Legend: R rows this rank sends, ordered by destination; Q rows it receives. The overlapped route receives wave by wave
(wave-major buffer); the serial route receives everything in one all-to-all (ordered by source), its own rows included.
Every transfer works on any buffer whose first dimension is R or Q. The first way of a dispatch has messages, which are
the waves unless rows go early (`fluid_hf.comm.head_start`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch

from fluid_hf.comm.head_start import EarlyRows, message_bounds, needed_messages
from fluid_hf.comm.peer_exchange import ExchangeHandle, PeerExchange, PeerTensor
from fluid_hf.comm.tournament import Wave, part_bounds, plan_waves

__all__ = [
    "EarlyRoute",
    "RowRoute",
    "SerialRoute",
    "WaveRoute",
    "make_route",
    "post_between_two",
    "route_parts",
    "route_waves",
]

Slice = tuple[int, int, int]  # a peer, the first and the last-plus-one of the rows from or for it


class RowRoute(Protocol):
    """What the layer needs to know about a route."""

    serial: bool
    num_waves: int  # equal on all ranks
    num_sent: int
    num_received: int

    def wave_bounds(self, wave: int) -> tuple[int, int]:
        """First and last-plus-one received row of a wave."""

    def wave_pairs(self, wave: int) -> int:
        """Number of (row, expert) pairs in a wave."""

    @property
    def num_messages(self) -> int:
        """Number of messages of the dispatch, equal on all ranks."""

    def needed(self) -> list[int]:
        """For each wave, how many of the dispatch's messages must have arrived; for the last wave all of them."""

    def post_dispatch(self, message: int, sent: torch.Tensor, received: torch.Tensor) -> ExchangeHandle:
        """Start a message of the dispatch: from `sent` [R, ...] into `received` [Q, ...]."""

    def post_out(self, wave: int, sent: torch.Tensor, received: torch.Tensor) -> ExchangeHandle:
        """Start a wave towards the experts: from `sent` [R, ...] into `received` [Q, ...]."""

    def post_back(self, wave: int, processed: torch.Tensor, returned: torch.Tensor) -> ExchangeHandle:
        """Start a wave back: from `processed` (this wave's rows only) into `returned` [R, ...]."""


class WaveRoute:
    """Tournament rounds grouped into waves; the rank's own rows are not sent.

    Args:
        exchange: where messages are posted.
        waves: this rank's waves, from `plan_waves`.
        sent_rows: rows for each destination.
        received_counts: for each source: rows, then pairs of each part.
    """

    serial = False

    def __init__(
        self,
        exchange: PeerExchange,
        waves: tuple[Wave, ...],
        sent_rows: Sequence[int],
        received_counts: Sequence[Sequence[int]],
    ) -> None:
        self._exchange = exchange
        self._waves = waves
        self._received = received_counts
        sent_starts = [0, *itertools.accumulate(sent_rows)]
        # What each message of a wave sends and receives, worked out once for the four ways that the rows go.
        self._outgoing: list[list[Slice]] = []
        self._incoming: list[list[Slice]] = []
        self._starts = [0]
        for wave in waves:
            outgoing: list[Slice] = []
            incoming: list[Slice] = []
            end = self._starts[-1]
            for message in wave:
                peer, start = message.peer, end
                low, high = part_bounds(sent_rows[peer], message.part, message.parts)
                outgoing.append((peer, sent_starts[peer] + low, sent_starts[peer] + high))
                low, high = part_bounds(received_counts[peer][0], message.part, message.parts)
                end += high - low
                incoming.append((peer, start, end))
            self._outgoing.append(outgoing)
            self._incoming.append(incoming)
            self._starts.append(end)
        self.num_waves = len(waves)
        self.num_sent = sent_starts[-1]
        self.num_received = self._starts[-1]

    def wave_bounds(self, wave: int) -> tuple[int, int]:
        return self._starts[wave], self._starts[wave + 1]

    def wave_pairs(self, wave: int) -> int:
        return sum(self._received[message.peer][1 + message.part] for message in self._waves[wave])

    @property
    def num_messages(self) -> int:
        return self.num_waves

    def needed(self) -> list[int]:
        return list(range(1, self.num_waves + 1))

    def post_dispatch(self, message: int, sent: torch.Tensor, received: torch.Tensor) -> ExchangeHandle:
        return self.post_out(message, sent, received)

    def post_out(self, wave: int, sent: torch.Tensor, received: torch.Tensor) -> ExchangeHandle:
        self._exchange.at_round(wave)
        recvs = _slices(self._incoming[wave], received)
        return self._exchange.post(_slices(self._outgoing[wave], sent), recvs)

    def post_back(self, wave: int, processed: torch.Tensor, returned: torch.Tensor) -> ExchangeHandle:
        self._exchange.at_round(wave)
        incoming, start = self._incoming[wave], self._starts[wave]
        if len(incoming) == 1:  # all of them
            sends = [(incoming[0][0], processed)]
        else:
            sends = [(peer, processed[low - start : high - start]) for peer, low, high in incoming]
        return self._exchange.post(sends, _slices(self._outgoing[wave], returned))


def _slices(slices: Sequence[Slice], rows: torch.Tensor) -> list[PeerTensor]:
    return [(peer, rows[low:high]) for peer, low, high in slices]


class EarlyRoute(WaveRoute):
    """A route between two ranks of which the first message was sent before the counts were known.

    Args:
        exchange, sent_rows, received_counts: as for `WaveRoute`.
        waves: number of waves.
        early: rows that went early.
    """

    def __init__(
        self,
        exchange: PeerExchange,
        waves: int,
        sent_rows: Sequence[int],
        received_counts: Sequence[Sequence[int]],
        early: EarlyRows,
    ) -> None:
        super().__init__(exchange, plan_waves(exchange.rank, 2, waves)[0], sent_rows, received_counts)
        self._early = early
        self._messages = max(2, waves)

    @property
    def num_messages(self) -> int:
        return self._messages

    def needed(self) -> list[int]:
        ends = [self.wave_bounds(wave)[1] for wave in range(self.num_waves)]
        return needed_messages(self.num_received, self._early.received, self._messages, ends)

    def post_dispatch(self, message: int, sent: torch.Tensor, received: torch.Tensor) -> ExchangeHandle:
        low, high = message_bounds(self.num_sent, self._early.sent, message, self._messages)
        first, last = message_bounds(self.num_received, self._early.received, message, self._messages)
        return post_between_two(self._exchange, message, sent[low:high], received[first:last])


def post_between_two(exchange: PeerExchange, index: int, sent: torch.Tensor, received: torch.Tensor) -> ExchangeHandle:
    """Start a message in both directions between two ranks."""
    exchange.at_round(index)
    peer = 1 - exchange.rank
    return exchange.post([(peer, sent)], [(peer, received)])


class SerialRoute:
    """One uneven all-to-all each way, own rows included: the reference and baseline.

    Args:
        exchange: where the collectives are posted.
        sent_rows: rows for each destination.
        received_counts: for each source: rows, then pairs.
    """

    serial = True
    num_waves = num_messages = 1

    def __init__(
        self, exchange: PeerExchange, sent_rows: Sequence[int], received_counts: Sequence[Sequence[int]]
    ) -> None:
        self._exchange = exchange
        self._sent = list(sent_rows)
        self._received = [counts[0] for counts in received_counts]
        self._pairs = sum(counts[1] for counts in received_counts)
        self.num_sent = sum(self._sent)
        self.num_received = sum(self._received)

    def wave_bounds(self, wave: int) -> tuple[int, int]:
        return 0, self.num_received

    def wave_pairs(self, wave: int) -> int:
        return self._pairs

    def needed(self) -> list[int]:
        return [1]

    def post_dispatch(self, message: int, sent: torch.Tensor, received: torch.Tensor) -> ExchangeHandle:
        return self.post_out(message, sent, received)

    def post_out(self, wave: int, sent: torch.Tensor, received: torch.Tensor) -> ExchangeHandle:
        return self._exchange.all_to_all(received, sent, self._received, self._sent)

    def post_back(self, wave: int, processed: torch.Tensor, returned: torch.Tensor) -> ExchangeHandle:
        return self._exchange.all_to_all(returned, processed, self._sent, self._received)


def route_parts(size: int, waves: int, serial: bool) -> int:
    """Parts that each peer's rows are cut into; needed before the rows are counted."""
    return 1 if serial else plan_waves(0, size, waves)[1]


def route_waves(exchange: PeerExchange, waves: int, serial: bool) -> int:
    """Waves that the route will have."""
    return 1 if serial else len(plan_waves(exchange.rank, exchange.size, waves)[0])


def make_route(
    exchange: PeerExchange,
    waves: int,
    serial: bool,
    sent_rows: Sequence[int],
    received_counts: Sequence[Sequence[int]],
    early: EarlyRows | None = None,
) -> RowRoute:
    """The route for one layer call, with the same number of waves on every rank."""
    if serial:
        return SerialRoute(exchange, sent_rows, received_counts)
    if early is not None:
        return EarlyRoute(exchange, waves, sent_rows, received_counts, early)
    return WaveRoute(exchange, plan_waves(exchange.rank, exchange.size, waves)[0], sent_rows, received_counts)
