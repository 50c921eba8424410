"""Reads a Chrome trace of torch.profiler: which work belongs to which layer, pass and wave.

On a GPU, work is what ran on it, attributed through the call that launched it; on a CPU, the operators themselves.
A message on a CPU counts as in flight from where it is posted to where it has been waited for, since gloo does not say
when it arrived.
"""

from __future__ import annotations

import bisect
import gzip
import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluid_hf.errors import TraceError
from fluid_hf.overlap.intervals import Interval, union
from fluid_hf.ranges import PREFIX

__all__ = ["Phase", "Trace", "Work", "read_trace"]

NEEDED = {"name", "ts", "dur", "tid"}  # without these an event says nothing: such are left out
DEVICE_WORK = {"kernel", "gpu_memcpy", "gpu_memset"}
# What an exchange moves in each phase, by the order in which it is posted there.
MESSAGES = {
    "plan": "counts",
    "forward dispatch": "dispatch",
    "forward experts": "combine",
    "backward combine": "output grad",
    "backward experts": "input grad",
    "backward return": "input grad",
    "forward attention": "heads",
    "backward attention": "head gradients",
}


@dataclass
class Phase:
    """One phase of one layer call, as the host ran it.

    Attributes:
        layer, name: as in the range's name, `fluid::LAYER::NAME`.
        start, end: microseconds.
        thread: host thread.
        marks: `(time, event)` inside it.
        num_posted: exchanges started inside it.
        num_bytes: bytes they sent.
    """

    layer: str
    name: str
    start: float
    end: float
    thread: Any
    marks: list[tuple[float, str]] = field(default_factory=list)
    num_posted: int = 0
    num_bytes: int = 0

    @property
    def backward(self) -> bool:
        """Whether it belongs to the backward pass."""
        return self.name.startswith(("backward", "wgrad"))


@dataclass(frozen=True)
class Work:
    """A stretch of computation or communication.

    Attributes:
        start, end: microseconds.
        label: what it is: "own tokens", "wave 0", "wgrad down", "dispatch 0", ...
        phase: where it was launched; `None` outside the layers.
    """

    start: float
    end: float
    label: str
    phase: Phase | None = None


@dataclass(frozen=True)
class _Post:
    start: float
    end: float
    label: str
    phase: Phase | None


@dataclass(frozen=True)
class Trace:
    """What a trace says.

    Attributes:
        on_gpu: whether times are those of a GPU.
        phases: of all layers, by start.
        compute: computation, by start.
        communication: exchanges in flight, by start; those outside the layers have no phase.
        blocked: where the host posts an exchange or waits for one.
    """

    on_gpu: bool
    phases: list[Phase]
    compute: list[Work]
    communication: list[Work]
    blocked: list[Interval]


def read_trace(path: str | Path) -> Trace:
    """Read a trace exported by torch.profiler, plain or gzipped.

    Raises:
        TraceError: the file is no such trace, or was made without fluid_hf's ranges.
    """
    try:
        opener = gzip.open if str(path).endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8") as file:
            found = json.load(file)["traceEvents"]
            events = [event for event in found if event.get("ph") == "X" and event.keys() >= NEEDED]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TraceError(f"trace ({path}) must be a Chrome trace of torch.profiler: {error}.") from error
    return _Reader(events, str(path)).read()


class _Reader:
    """Builds a `Trace`; one object per file."""

    def __init__(self, events: list[dict[str, Any]], path: str) -> None:
        self.events = sorted(events, key=lambda event: (event["ts"], -event["dur"]))
        self.path = path
        self.phases: dict[Any, list[Phase]] = defaultdict(list)
        self.posts: dict[Any, list[_Post]] = defaultdict(list)
        self.waits: list[tuple[float, float, str]] = []
        self.posted: dict[str, list[_Post]] = defaultdict(list)

    def read(self) -> Trace:
        for event in self.events:
            # On a GPU the ranges appear a second time, as annotations of its streams.
            if event["name"].startswith(PREFIX) and event.get("cat") == "user_annotation":
                self._range(event)
        if not self.phases:
            raise TraceError(
                f"trace ({self.path}) must hold ranges that start with {PREFIX!r}, has none; profile a step of a "
                "patched model."
            )
        device = [event for event in self.events if event.get("cat") in DEVICE_WORK]
        compute, communication = self._device_work(device) if device else self._host_work()
        phases = sorted((p for found in self.phases.values() for p in found), key=lambda phase: phase.start)
        compute.sort(key=lambda work: work.start)
        communication.sort(key=lambda work: work.start)
        return Trace(bool(device), phases, compute, communication, self._blocked())

    def _range(self, event: dict[str, Any]) -> None:
        name, thread = event["name"][len(PREFIX) :], event["tid"]
        start, end = event["ts"], event["ts"] + event["dur"]
        inside = _innermost(self.phases[thread], start)
        layer, separator, phase = name.rpartition("::")
        if separator:
            self.phases[thread].append(Phase(layer, phase, start, end, thread))
        elif name.startswith("event ") and inside is not None:
            inside.marks.append((start, name[6:]))
        elif name.startswith("post "):
            _, exchange, number, num_bytes = name.split()
            post = _Post(start, end, self._message(inside), inside)
            if inside is not None:
                inside.num_bytes += int(num_bytes)
            self.posts[thread].append(post)
            self.posted[f"{exchange} {number}"].append(post)
        elif name.startswith("wait "):
            self.waits.append((start, end, name[5:]))

    def _message(self, inside: Phase | None) -> str:
        if inside is None:
            return "exchange"
        label = MESSAGES.get(inside.name, "exchange")
        if label in ("counts", "heads", "head gradients"):
            return label
        number = inside.num_posted
        inside.num_posted += 1
        if inside.name == "backward return":  # goes on counting where the experts' phase left off
            before = [p for p in self.phases[inside.thread] if p.layer == inside.layer and p.name == "backward experts"]
            number += before[-1].num_posted if before else 0
        return f"{label} {number}"

    def _blocked(self) -> list[Interval]:
        posts = [(post.start, post.end) for found in self.posts.values() for post in found]
        return union([*posts, *((start, end) for start, end, _ in self.waits)])

    def _device_work(self, device: list[dict[str, Any]]) -> tuple[list[Work], list[Work]]:
        launches = {
            event["args"]["correlation"]: event
            for event in self.events
            if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
        }
        compute, communication = [], []
        for event in device:
            start, end = event["ts"], event["ts"] + event["dur"]
            launch = launches.get(event.get("args", {}).get("correlation"))
            thread, at = (launch["tid"], launch["ts"]) if launch is not None else (None, 0.0)
            phase = _innermost(self.phases[thread], at) if launch is not None else None
            posts = self.posts[thread] if launch is not None else []
            index = bisect.bisect_right(posts, at, key=lambda post: post.start) - 1
            post = posts[index] if index >= 0 and at <= posts[index].end else None
            if post is not None and _is_transfer(event["name"]):
                communication.append(Work(start, end, post.label, post.phase))
            elif "nccl" in event["name"].lower():
                communication.append(Work(start, end, "collective", phase))
            else:
                compute.append(Work(start, end, _label(phase, at), phase))
        return compute, communication

    def _host_work(self) -> tuple[list[Work], list[Work]]:
        """Outermost operators outside of posts and waits; messages from post to the end of their wait."""
        blocked = self._blocked()
        compute = []
        last_end: dict[Any, float] = defaultdict(float)
        for event in self.events:
            start, end, thread = event["ts"], event["ts"] + event["dur"], event["tid"]
            outermost = event["name"].startswith("aten::") and start >= last_end[thread]
            if event.get("cat") != "cpu_op" or not outermost or thread not in self.phases:
                continue
            last_end[thread] = end
            index = bisect.bisect_right(blocked, (start, float("inf"))) - 1
            if index < 0 or start >= blocked[index][1]:
                phase = _innermost(self.phases[thread], start)
                compute.append(Work(start, end, _label(phase, start), phase))
        communication = []
        for _, end, key in self.waits:
            if self.posted.get(key):
                post = self.posted[key].pop(0)
                communication.append(Work(post.start, end, post.label, post.phase))
        return compute, communication


def _innermost(phases: list[Phase], at: float) -> Phase | None:
    """The last phase to start among those that contain a time; phases come in order of their start."""
    index = bisect.bisect_right(phases, at, key=lambda phase: phase.start)
    for phase in reversed(phases[max(0, index - 4) : index]):  # nesting is shallow
        if at <= phase.end:
            return phase
    return None


def _is_transfer(name: str) -> bool:
    lowered = name.lower()
    return "nccl" in lowered or any(kind in lowered for kind in ("memcpy dtoh", "memcpy htod", "memcpy ptop"))


def _label(phase: Phase | None, at: float) -> str:
    """What is computed at a point of a phase, from the marks around it."""
    if phase is None:
        return "rest of the model"
    if phase.name.startswith("wgrad") or phase.name in ("shared expert", "own tokens"):
        return phase.name
    if phase.name.endswith("attention"):
        return "attention"
    if phase.name == "forward experts":
        before = [event for time, event in phase.marks if time <= at]
        if before and before[-1].startswith("wait dispatch"):
            return f"wave {before[-1].rpartition(' ')[2]}"
        return "own tokens"
    if phase.name == "backward experts":
        after = [event for time, event in phase.marks if time >= at and event.startswith("dgrad")]
        if not after:
            return "own tokens"
        what = after[0].removeprefix("dgrad ")
        return "own tokens" if what == "own" else f"wave {what}"
    return "plan, pack, sum"
