"""Samples one step: how long exchanges were in flight, and how long computation stood still for them.

On a GPU, events on the computing stream where it posts and where it begins to wait, and on a side stream at each
arrival; nothing waits for the device until `result()`. On a CPU the host's clock; a message is in flight until it has
been waited for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fluid_hf.comm.side_stream import SideStream, record
from fluid_hf.overlap.intervals import length

__all__ = ["Flight", "OverlapSampler"]


@dataclass
class Flight:
    """One exchange: points in time, as CUDA events or as milliseconds of the host's clock."""

    posted: Any
    arrived: Any = None
    wait_begins: Any = None
    wait_ends: Any = None


class OverlapSampler:
    """Collects the exchanges of one step.

    Args:
        device: where the rows live.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        unnamed = self._on_gpu and device.index is None
        self._device = torch.device("cuda", torch.cuda.current_device()) if unnamed else device
        self._side = SideStream()
        with self._side.alone(self._device):
            pass  # the first stream of a process takes milliseconds to make: not between two events
        self._events: list[torch.cuda.Event] = []
        self.restart()

    def restart(self) -> None:
        """Collect another step, with the events of the one before: making one takes longer than recording it."""
        self._used = 0
        self._flights: list[Flight] = []
        self._begin = self._now()

    def post(self, works: Sequence[Any]) -> Flight:
        """An exchange was posted."""
        flight = Flight(self._now())
        if self._on_gpu:
            with self._side.alone(self._device):
                for work in works:
                    work.wait()
                flight.arrived = self._now()
        self._flights.append(flight)
        return flight

    def begin_wait(self, flight: Flight) -> None:
        """Computation is about to wait for it."""
        flight.wait_begins = self._now()

    def end_wait(self, flight: Flight) -> None:
        """Computation may go on: on a GPU when the exchange has arrived, or at once if it had."""
        flight.wait_ends = flight.arrived if self._on_gpu else self._now()

    def result(self) -> tuple[float, float]:
        """Milliseconds with an exchange in flight, and those of them in which computation waited."""
        done = [flight for flight in self._flights if flight.wait_ends is not None]
        if self._on_gpu:
            torch.cuda.synchronize()  # host synchronisation, once per sampled step
        in_flight, exposed = [], []
        for flight in done:
            posted, begins, ends = (self._ms(at) for at in (flight.posted, flight.wait_begins, flight.wait_ends))
            in_flight.append((posted, ends))
            exposed.append((begins, ends))
        return length(in_flight), length(exposed)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter() * 1e3
        if self._used == len(self._events):
            self._events.append(torch.cuda.Event(enable_timing=True))
        event = self._events[self._used]
        self._used += 1
        record(event, self._device)
        return event

    def _ms(self, at: Any) -> float:
        return float(self._begin.elapsed_time(at) if self._on_gpu else at - self._begin)
