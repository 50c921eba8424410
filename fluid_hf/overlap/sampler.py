"""Samples one step: how long exchanges were in flight, and how long computation stood still for them.

On a GPU, events on the computing stream before and after each wait, and on a side stream at each arrival; nothing waits
for the device until `result()`. On a CPU the host's clock; a message is in flight until it has been waited for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

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
        self._side = torch.cuda.Stream(device) if self._on_gpu else None
        self._begin = self._now()
        self._flights: list[Flight] = []

    def post(self, works: Sequence[Any]) -> Flight:
        """An exchange was posted."""
        flight = Flight(self._now())
        if self._side is not None:
            with torch.cuda.stream(self._side):
                for work in works:
                    work.wait()
                flight.arrived = self._now()
        self._flights.append(flight)
        return flight

    def begin_wait(self, flight: Flight) -> None:
        """Computation is about to wait for it."""
        flight.wait_begins = self._now()

    def end_wait(self, flight: Flight) -> None:
        """Computation may go on."""
        flight.wait_ends = self._now()

    def result(self) -> tuple[float, float]:
        """Milliseconds with an exchange in flight, and those of them in which computation waited."""
        done = [flight for flight in self._flights if flight.wait_ends is not None]
        if self._on_gpu:
            torch.cuda.synchronize()  # host synchronisation, once per sampled step
        in_flight, exposed = [], []
        for flight in done:
            posted, begins, ends = (self._ms(at) for at in (flight.posted, flight.wait_begins, flight.wait_ends))
            arrived = ends if flight.arrived is None else self._ms(flight.arrived)
            in_flight.append((posted, arrived))
            exposed.append((begins, min(ends, arrived)))
        return length(in_flight), length(exposed)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter() * 1e3
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _ms(self, at: Any) -> float:
        return float(self._begin.elapsed_time(at) if self._on_gpu else at - self._begin)
