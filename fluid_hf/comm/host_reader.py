"""Small numbers from the device to the host, without stopping the work that is queued meanwhile."""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from fluid_hf.comm.side_stream import record

__all__ = ["HostReader", "let_others_run", "wait_in_time"]


def let_others_run() -> None:
    """Give other threads their turn, between two looks at what is waited for.

    About 1 us. `time.sleep(0)` arms a timer before Python 3.13, which Linux rounds up to 50 us and more.
    """
    select.select((), (), (), 0)


def wait_in_time(event: torch.cuda.Event, seconds: float, what: str) -> None:
    """Wait on the host until an event has passed on the device; polled, so that it can end.

    Raises:
        TimeoutError: it has not passed after `seconds`; says that `what` did not arrive.
    """
    deadline = time.monotonic() + seconds
    while not event.query():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not arrive on the device within {seconds:.0f} s")
        let_others_run()


class Waitable(Protocol):
    """Communication in flight."""

    def wait(self) -> None:
        """Make the current stream (or, without one, the host) wait for it."""


class HostReader:
    """Copies to pinned memory. One reading at a time."""

    def __init__(self) -> None:
        self._done: torch.cuda.Event | None = None
        self._pinned: torch.Tensor | None = None

    def start(
        self, tensor: torch.Tensor, arrival: Waitable, stream: contextlib.AbstractContextManager[Any]
    ) -> Callable[[float], list[Any]]:
        """Read `tensor` once `arrival` has been; call the result with a limit in seconds for its nested lists.

        On CUDA the copy is queued on `stream`, so that the host waits for nothing else. The caller keeps `tensor` until
        it has read it.
        """
        with stream:
            arrival.wait()
            if not tensor.is_cuda:
                return lambda seconds: tensor.tolist()
            return self._copy(tensor)

    def _copy(self, tensor: torch.Tensor) -> Callable[[float], list[Any]]:
        if self._done is None:
            self._done = torch.cuda.Event()
        if self._pinned is None or self._pinned.shape != tensor.shape:
            with torch.inference_mode(False):  # kept: written by calls in and outside of torch.inference_mode
                self._pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        done, pinned = self._done, self._pinned
        pinned.copy_(tensor, non_blocking=True)
        record(done, tensor.device)

        def read(seconds: float) -> list[Any]:
            wait_in_time(done, seconds, "counts")  # the one host synchronisation of the layer: receives need sizes
            return pinned.tolist()

        return read
