"""Where the time of a layer goes, from a timeline: computing, messages, both, neither, and what was waited for."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fluid_hf.errors import TraceError
from fluid_hf.overlap.intervals import Interval, intersect, length, subtract, union
from fluid_hf.profiling.session import StepTrace
from fluid_hf.profiling.trace import Trace, Work, read_trace

__all__ = ["breakdown", "breakdown_text", "record"]

NUM_GAPS, NUM_KERNELS, NAME_LENGTH = 5, 12, 80


def record(run: Callable[[], None]) -> tuple[Trace, dict[str, float]]:
    """Run once more, and once under the profiler: the trace, and the microseconds of each kernel of a GPU by its name.

    Raises:
        TraceError: nothing in it is a patched layer's.
    """
    run()
    kernels: dict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        recorded = StepTrace(Path(folder) / "trace.json")
        recorded.start()
        run()
        path = recorded.stop()
        for event in json.loads(path.read_text(encoding="utf-8"))["traceEvents"]:
            if event.get("cat") == "kernel":
                kernels[event["name"][:NAME_LENGTH]] += event["dur"]
        return read_trace(path), dict(kernels)


def breakdown(trace: Trace, kernels: dict[str, float], calls: int = 1) -> dict[str, Any]:
    """How one call's time is spent, in milliseconds (means over `calls` calls in a row).

    Returns:
        `ms` from the first to the last work; `compute_ms`, of it `beside_ms` with messages in flight; `exposed_ms` with
        messages in flight and nothing computed; `idle_ms` with neither, where the host has not queued what comes next;
        `link_ms` with messages in flight; `compute` by what is computed; `waits` by what computing waited for, the
        longest first: a message, or "host: " and what it queued late; `gaps`, the longest single ones of the run;
        `kernels`, the longest.

    Raises:
        TraceError: the trace has no work.
    """
    works, messages = trace.compute, trace.communication
    busy, flight = union(_spans(works)), union(_spans(messages))
    every = union([*busy, *flight])
    if not every:
        raise TraceError(
            "trace must have work, neither computes nor sends anything; profile a whole step with ProfilerActivity.CPU "
            "and, on a GPU, also ProfilerActivity.CUDA."
        )
    low, high = every[0][0], every[-1][1]
    gaps = [part for gap in subtract([(low, high)], busy) for part in _causes(gap, works, messages, flight)]
    waits: dict[str, float] = defaultdict(float)
    for (start, end), cause in gaps:
        waits[cause] += end - start
    compute: dict[str, list[Interval]] = defaultdict(list)
    for work in works:
        compute[work.label].append((work.start, work.end))
    longest = sorted(gaps, key=lambda gap: gap[0][0] - gap[0][1])[:NUM_GAPS]
    each = 1e3 * calls
    return {
        "ms": _ms(high - low, each),
        "compute_ms": _ms(length(busy), each),
        "link_ms": _ms(length(flight), each),
        "beside_ms": _ms(length(intersect(busy, flight)), each),
        "exposed_ms": _ms(length(subtract(flight, busy)), each),
        "idle_ms": _ms(high - low - length(every), each),
        "compute": _longest_first({label: length(spans) for label, spans in compute.items()}, each),
        "waits": _longest_first(waits, each),
        "kernels": dict(list(_longest_first(kernels, each).items())[:NUM_KERNELS]),
        "gaps": [{"at_ms": _ms(s - low, 1e3), "ms": _ms(e - s, 1e3), "waited_for": cause} for (s, e), cause in longest],
    }


def breakdown_text(found: dict[str, Any], num_waits: int = 4) -> str:
    """One line."""
    waits = ", ".join(f"{cause} {ms:.2f}" for cause, ms in list(found["waits"].items())[:num_waits])
    return (
        f"{found['ms']:.2f} ms = compute {found['compute_ms']:.2f} (beside messages {found['beside_ms']:.2f}) + "
        f"messages alone {found['exposed_ms']:.2f} + neither {found['idle_ms']:.2f}; waited for {waits or 'nothing'}"
    )


def _causes(
    gap: Interval, works: list[Work], messages: list[Work], flight: list[Interval]
) -> list[tuple[Interval, str]]:
    """The parts of a gap in computing, each with what was waited for."""
    found = []
    for start, end in intersect([gap], flight):
        flying = [message for message in messages if message.start < end and message.end > start]
        # The one in flight whose arrival ends the wait, or the last to leave if none of them does.
        ending = min(flying, key=lambda message: (abs(message.end - end), -message.start))
        found.append(((start, end), ending.label))
    following = next((work for work in works if work.start >= gap[1]), None)
    late = f"host: {following.label}" if following is not None else "host: end"
    return found + [(part, late) for part in subtract([gap], flight)]


def _spans(works: Iterable[Work]) -> list[Interval]:
    return [(work.start, work.end) for work in works]


def _longest_first(values: dict[str, float], each: float) -> dict[str, float]:
    ordered = sorted(values.items(), key=lambda item: -item[1])
    return {name: _ms(value, each) for name, value in ordered}


def _ms(microseconds: float, each: float) -> float:
    return round(microseconds / each, 4)
