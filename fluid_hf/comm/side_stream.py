"""Communication that need not wait for what the computing stream was given after its data were ready."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch

__all__ = ["SideStream", "record"]


class _On:
    """`torch.cuda.stream` without making stream objects, which takes the host as long as a launch."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = (stream.stream_id, stream.device_index, stream.device_type)
        self._before = self._stream

    def __enter__(self) -> None:
        self._before = torch._C._cuda_getCurrentStream(self._stream[1])
        self._set(self._stream)

    def __exit__(self, *error: object) -> None:
        self._set(self._before)

    def _set(self, stream: tuple[int, int, int]) -> None:
        torch._C._cuda_setStream(stream_id=stream[0], device_index=stream[1], device_type=stream[2])


@functools.lru_cache(maxsize=64)
def _stream(number: int, device: int, kind: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(stream_id=number, device_index=device, device_type=kind)


def record(event: torch.cuda.Event, device: torch.device) -> None:
    """Record an event on the current stream of a device, whose object torch would make anew every time."""
    event.record(_stream(*torch._C._cuda_getCurrentStream(device.index)))


class SideStream:
    """A process group makes communication wait for all that the current stream holds; here, for what it held at a mark.

    Buffers that the communication writes must have been allocated before anything was queued after the mark: memory
    that the computing stream gets back later is free in its own order only. On the CPU both calls do nothing.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._mark: torch.cuda.Event | None = None

    def mark(self, device: torch.device) -> None:
        """All that was queued on the current stream until now is what the next `posting()` waits for."""
        if device.type != "cuda":
            return
        if self._mark is None:
            self._mark = torch.cuda.Event()
        record(self._mark, device)

    def alone(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Context in which nothing is waited for but what is asked for inside."""
        if device.type != "cuda":
            return contextlib.nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(device, priority=-1)
        return _On(self._stream)

    def posting(self) -> contextlib.AbstractContextManager[Any]:
        """Context in which communication is posted behind the mark only."""
        if self._mark is None:
            return contextlib.nullcontext()
        context = self.alone(torch.device("cuda"))
        assert self._stream is not None
        self._stream.wait_event(self._mark)
        return context
