"""Sets of half-open intervals of time, as sorted lists of `(start, end)` in microseconds."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["Interval", "clip", "intersect", "length", "subtract", "union"]

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points, as disjoint intervals in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def intersect(first: Iterable[Interval], second: Iterable[Interval]) -> list[Interval]:
    """Points in both."""
    a, b = union(first), union(second)
    found: list[Interval] = []
    i = j = 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            found.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def subtract(first: Iterable[Interval], second: Iterable[Interval]) -> list[Interval]:
    """Points of the first that are not in the second."""
    left: list[Interval] = []
    holes = union(second)
    position = 0
    for start, end in union(first):
        while position < len(holes) and holes[position][1] <= start:
            position += 1
        at = position
        while at < len(holes) and holes[at][0] < end:
            if holes[at][0] > start:
                left.append((start, holes[at][0]))
            start = max(start, holes[at][1])
            at += 1
        if start < end:
            left.append((start, end))
    return left


def clip(intervals: Iterable[Interval], low: float, high: float) -> list[Interval]:
    """Points between two times."""
    return intersect(intervals, [(low, high)])


def length(intervals: Iterable[Interval]) -> float:
    """Total length of their union."""
    return sum(end - start for start, end in union(intervals))
