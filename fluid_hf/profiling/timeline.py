"""From a trace to numbers: what was in flight, what was exposed, per layer and pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fluid_hf.errors import TraceError
from fluid_hf.overlap.intervals import Interval, clip, intersect, length, subtract, union
from fluid_hf.profiling.trace import Phase, Trace, Work

__all__ = ["PassTimeline", "exposed", "layer_names", "layer_passes", "summarize"]

FIRST = {False: "forward dispatch", True: "backward combine"}
LAST = {False: "forward combine", True: "backward dispatch"}


@dataclass(frozen=True)
class PassTimeline:
    """One pass of one layer call, times in microseconds from its start.

    Attributes:
        layer: name of the layer.
        backward: which pass.
        duration: from its first to its last work.
        compute, communication: stretches of work by label; of equal labels, what is close is one stretch.
        exposed: communication in flight and nothing computed.
    """

    layer: str
    backward: bool
    duration: float
    compute: list[Work]
    communication: list[Work]
    exposed: list[Interval]

    @property
    def communication_time(self) -> float:
        """Time with communication in flight."""
        return length((work.start, work.end) for work in self.communication)


def exposed(trace: Trace) -> list[Interval]:
    """Times at which exchanges of the layers are in flight and nothing is computed.

    On a CPU: while the host that would compute posts an exchange or waits for one.
    """
    flight = _spans(work for work in trace.communication if work.phase is not None)
    if not trace.on_gpu:
        return intersect(flight, trace.blocked)
    return subtract(flight, _spans(trace.compute))


def layer_names(trace: Trace) -> list[str]:
    """Expert-parallel layers in the order of their first forward pass."""
    return list(dict.fromkeys(phase.layer for phase in trace.phases if phase.name in FIRST.values()))


def layer_passes(trace: Trace, layer: str | None = None) -> list[PassTimeline]:
    """The forward and the backward pass of median length of a layer (by default the one in the middle).

    Raises:
        TraceError: the trace has no such layer, no whole pass of it, or no work in one.
    """
    names = layer_names(trace)
    if not names:
        raise TraceError("trace must have a layer with patched experts, has none; profile a model that has experts.")
    layer = layer or names[len(names) // 2]
    if layer not in names:
        raise TraceError(f"layer ({layer}) must be one of those in the trace: {', '.join(names)}.")
    gaps = exposed(trace)
    whole = [_calls(trace, layer, backward) for backward in (False, True)]
    if not any(whole):
        raise TraceError(f"layer ({layer}) must have run a whole pass in the trace; profile a whole step.")
    found = []
    for backward, calls in zip((False, True), whole, strict=True):
        timed = [call for call in calls if length([_window(trace, call)])]  # on a GPU, nothing may be known of a call
        if timed:
            timed.sort(key=lambda call: length([_window(trace, call)]))
            found.append(_pass_timeline(trace, timed[(len(timed) - 1) // 2], layer, backward, gaps))
    if not any(timeline.compute or timeline.communication for timeline in found):
        raise TraceError(
            f"layer ({layer}) must have work in the trace, has none; profile a whole step with ProfilerActivity.CPU "
            "and, on a GPU, also ProfilerActivity.CUDA, whose trace says what launched which kernel."
        )
    return found


def summarize(trace: Trace) -> dict[str, Any]:
    """The numbers of a trace; times are in milliseconds, those of a layer are means over its calls.

    Returns:
        `overlap_ratio` (hidden communication over all communication of the layers), `communication_ms`, `exposed_ms`,
        `exposed_ms_per_layer` (one call, both passes), `bytes_sent`, `wgrad_ms`, `wgrad_in_windows` (share of the time
        of weight gradients with an exchange in flight), `attention` (what sequence parallelism adds to the first
        three), `other_communication_ms`, and `layers`.
    """
    gaps = exposed(trace)
    flight = union(_spans(work for work in trace.communication if work.phase is not None))
    other = _spans(work for work in trace.communication if work.phase is None)
    wgrad = _spans(work for work in trace.compute if work.label.startswith("wgrad"))
    layers = {name: _layer_summary(trace, name, gaps) for name in layer_names(trace)}
    per_layer = [entry["forward"]["exposed_ms"] + entry["backward"]["exposed_ms"] for entry in layers.values()]
    return {
        "measured_on": "GPU" if trace.on_gpu else "CPU (messages count as in flight until they have been waited for)",
        "overlap_ratio": _share(flight, gaps),
        "communication_ms": _ms(length(flight)),
        "exposed_ms": _ms(length(gaps)),
        "exposed_ms_per_layer": round(sum(per_layer) / max(1, len(per_layer)), 4),
        "bytes_sent": sum(phase.num_bytes for phase in trace.phases),
        "wgrad_ms": _ms(length(wgrad)),
        "wgrad_in_windows": round(length(intersect(wgrad, flight)) / length(wgrad), 4) if wgrad else 0.0,
        "attention": _attention_summary(trace, gaps),
        "other_communication_ms": _ms(length(other)),
        "layers": layers,
    }


def _attention_summary(trace: Trace, gaps: list[Interval]) -> dict[str, float]:
    phases = (work for work in trace.communication if work.phase is not None and work.phase.name.endswith("attention"))
    flight = union(_spans(phases))
    return {
        "overlap_ratio": _share(flight, intersect(flight, gaps)),
        "communication_ms": _ms(length(flight)),
        "exposed_ms": _ms(length(intersect(flight, gaps))),
    }


def _layer_summary(trace: Trace, layer: str, gaps: list[Interval]) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    for backward in (False, True):
        count = max(1, len(_calls(trace, layer, backward)))
        mine = [work for work in trace.communication if _belongs(work.phase, layer, backward)]
        flight = union(_spans(mine))
        durations = [high - low for low, high in (_window(trace, call) for call in _calls(trace, layer, backward))]
        entry["backward" if backward else "forward"] = {
            "calls": len(durations),
            "ms": _ms(sum(durations) / count),
            "communication_ms": _ms(length(flight) / count),
            "exposed_ms": _ms(length(intersect(flight, gaps)) / count),
            "overlap_ratio": _share(flight, intersect(flight, gaps)),
        }
    entry["bytes_sent"] = sum(phase.num_bytes for phase in trace.phases if phase.layer == layer)
    return entry


def _calls(trace: Trace, layer: str, backward: bool) -> list[list[Phase]]:
    """The phases of each whole pass of a layer."""
    calls: list[list[Phase]] = []
    current: list[Phase] | None = None
    for phase in trace.phases:
        if phase.layer != layer:
            continue
        if phase.name == FIRST[backward]:
            current = []
        if current is not None and (phase.backward == backward or phase.name in ("plan", "shared expert")):
            current.append(phase)
        if current and phase.name == LAST[backward]:
            calls.append(current)
            current = None
    return calls


def _window(trace: Trace, call: list[Phase]) -> Interval:
    if not trace.on_gpu:
        return call[0].start, max(phase.end for phase in call)
    mine = {id(phase) for phase in call}
    works = [work for work in (*trace.compute, *trace.communication) if id(work.phase) in mine]
    return min((work.start for work in works), default=0.0), max((work.end for work in works), default=0.0)


def _pass_timeline(trace: Trace, call: list[Phase], layer: str, backward: bool, gaps: list[Interval]) -> PassTimeline:
    low, high = _window(trace, call)
    near = 0.004 * (high - low)
    inside = [[work for work in works if work.end > low and work.start < high] for works in _lanes(trace)]
    compute, communication = (_merge(works, low, high, near) for works in inside)
    shifted = [(start - low, end - low) for start, end in clip(gaps, low, high)]
    return PassTimeline(layer, backward, high - low, compute, communication, shifted)


def _lanes(trace: Trace) -> tuple[list[Work], list[Work]]:
    return trace.compute, [work for work in trace.communication if work.phase is not None]


def _merge(works: list[Work], low: float, high: float, near: float) -> list[Work]:
    """Neighbours of equal label as one; times from `low`."""
    merged: list[Work] = []
    for label in dict.fromkeys(work.label for work in works):
        spans = union((work.start, work.end + near) for work in works if work.label == label)
        merged += [Work(max(start, low) - low, min(end - near, high) - low, label) for start, end in spans]
    return sorted(merged, key=lambda work: work.start)


def _belongs(phase: Phase | None, layer: str, backward: bool) -> bool:
    return phase is not None and phase.layer == layer and phase.backward == backward


def _spans(works: Any) -> list[Interval]:
    return [(work.start, work.end) for work in works]


def _share(flight: list[Interval], gaps: list[Interval]) -> float:
    total = length(flight)
    return round(1.0 - length(gaps) / total, 4) if total else 1.0


def _ms(microseconds: float) -> float:
    return round(microseconds / 1e3, 4)
