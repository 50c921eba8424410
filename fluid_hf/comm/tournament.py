"""Round-robin tournament: in each round every rank exchanges with one peer only, and all pairs meet once.

The circle method (Kirkman, 1847), used for peer-to-peer exchange by FluidMoE. Pure functions on integers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

__all__ = ["Message", "Wave", "num_rounds", "part_bounds", "plan_waves", "round_peer"]


def num_rounds(size: int) -> int:
    """Rounds in which all pairs of `size` ranks meet: `size - 1` if even, `size` if odd (one rank idles)."""
    return 0 if size < 2 else size - 1 + size % 2


def round_peer(round_index: int, rank: int, size: int) -> int | None:
    """The peer that `rank` meets in a round, or `None` if it idles. Symmetric: the peer's peer is `rank`."""
    seats = size + size % 2
    last = seats - 1
    if rank == last:
        peer = round_index * (seats // 2) % last
    else:
        peer = (round_index - rank) % last
        if peer == rank:
            peer = last
    return peer if peer < size else None


@dataclass(frozen=True)
class Message:
    """One part of the rows exchanged with one peer: part `part` of `parts` in each direction."""

    peer: int
    part: int
    parts: int


Wave = tuple[Message, ...]


@functools.lru_cache(maxsize=1024)
def plan_waves(rank: int, size: int, waves: int) -> tuple[tuple[Wave, ...], int]:
    """Group the tournament's rounds into waves, the same number on every rank.

    With fewer waves than rounds, neighbouring rounds share a wave; with more, each peer's rows are cut into parts
    along the rows (never along the experts, which would send a token twice).

    Returns:
        The waves of this rank, in the order in which they are posted, and the number of parts a peer's rows are cut in.
    """
    rounds = num_rounds(size)
    if rounds == 0:
        return (), 1
    parts = max(1, -(-waves // rounds))
    steps = [(index, part) for part in range(parts) for index in range(rounds)]
    count = min(waves, len(steps)) if parts == 1 else len(steps)
    planned: list[Wave] = []
    for wave in range(count):
        members = steps[len(steps) * wave // count : len(steps) * (wave + 1) // count]
        peers = ((round_peer(index, rank, size), part) for index, part in members)
        planned.append(tuple(Message(peer, part, parts) for peer, part in peers if peer is not None))
    return tuple(planned), parts


def part_bounds(rows: int, part: int, parts: int) -> tuple[int, int]:
    """First and last-plus-one row of a part when `rows` rows are cut into `parts` nearly equal parts."""
    return rows * part // parts, rows * (part + 1) // parts
