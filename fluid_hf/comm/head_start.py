"""Rows that travel before the ranks know how many there are: as many as they promised each other in the call before.

A receive needs its size, and sizes depend on the routing: the ranks tell each other their counts, and the host waits
for them, while the link is idle. Routing changes little between calls, so a rank promises rows for its next call, sends
them at once, and the counts travel beside them. Both sides work out the promise from the counts that both have, so no
message carries it. Only what is sent when depends on it, never what is computed, nor in which order: a wrong guess
costs time or bytes (rows that are promised and not there travel as padding that nobody reads).

Served between two ranks: with more, where a peer's rows start depends on how many go to the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["EarlyRows", "HeadStart", "message_bounds", "needed_messages"]


class EarlyRows(NamedTuple):
    """Rows that go early in one call between two ranks.

    Attributes:
        sent, received: rows for, and from, the peer; more or fewer than there turn out to be.
        capacity: rows of the buffer in which they arrive, with room for those that follow if there are not many more
            than in the call before.
    """

    sent: int = 0
    received: int = 0
    capacity: int = 0


class HeadStart:
    """What two ranks have promised each other for the next call of one layer with as many waves and bytes of a row.

    Equal on both sides as long as they call the layer in the same order, which every collective needs.
    """

    def __init__(self) -> None:
        self._kind: tuple[int, int] | None = None  # of the last call: its waves and bytes of a row
        self._rows = EarlyRows()

    def begin(self, waves: int, row_bytes: int) -> EarlyRows:
        """Rows that go early in this call; none in the first."""
        return self._rows if self._kind == (waves, row_bytes) else EarlyRows()

    def padding(self, waves: int, row_bytes: int) -> tuple[int, int]:
        """Bytes to send and receive in a call of another kind than the last one, which the promise was made for.

        The promise is kept all the same, with bytes that nobody reads: if only one of the ranks calls in another way,
        which both of them learn from the counts, no message is left over that the next one would be taken for.
        """
        if self._kind is None or self._kind == (waves, row_bytes):
            return 0, 0
        return self._rows.sent * self._kind[1], self._rows.received * self._kind[1]

    def promise(self, waves: int, row_bytes: int, sent: int, received: int) -> None:
        """Promise rows for the next call from those of this one: the first wave, and a little for chance."""
        capacity = received + received // 16
        self._kind = waves, row_bytes
        self._rows = EarlyRows(_share(sent, waves), _share(received, waves), capacity)

    def forget(self) -> None:
        """Promise nothing: after an error that ended the call on both ranks."""
        self._kind, self._rows = None, EarlyRows()


def _share(rows: int, waves: int) -> int:
    return -(-rows // waves) + rows // 64


def message_bounds(rows: int, early: int, index: int, messages: int) -> tuple[int, int]:
    """First and last-plus-one row of a message: the first has the early rows, the others share the rest."""
    if index == 0:
        return 0, early
    left, rest = max(0, rows - early), messages - 1
    return early + left * (index - 1) // rest, early + left * index // rest


def needed_messages(rows: int, early: int, messages: int, ends: Sequence[int]) -> list[int]:
    """For each wave, which ends at one of `ends`, the messages that must have arrived; for the last one all."""
    arrived = [message_bounds(rows, early, index, messages)[1] for index in range(messages)]
    return [*(1 + sum(end > have for have in arrived[:-1]) for end in ends[:-1]), messages]
