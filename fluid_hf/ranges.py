"""Named ranges for torch.profiler: they cost one call (about 0.2 microseconds) while no profiler runs.

A layer's phases are named `fluid::LAYER::PHASE`; inside them are `fluid::post EXCHANGE N BYTES` and
`fluid::wait EXCHANGE N` for every exchange, and `fluid::event NAME` marks without length.
`torch.autograd.profiler.emit_nvtx()` turns all of them into NVTX ranges; `fluid_hf.profiling` reads them from a trace.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["PREFIX", "mark", "ranged", "span"]

PREFIX = "fluid::"
_OFF = contextlib.nullcontext()
FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def span(name: str, *details: object) -> contextlib.AbstractContextManager[Any]:
    """A range around a `with` block, named only if a profiler is running."""
    if not torch.autograd._profiler_enabled():
        return _OFF
    return torch.profiler.record_function(" ".join([PREFIX + name, *map(str, details)]))


def mark(name: str) -> None:
    """A range without length."""
    if torch.autograd._profiler_enabled():
        with span("event", name):
            pass


def ranged(phase: str) -> Callable[[FunctionT], FunctionT]:
    """Make a range of every call of a method whose object has a `context` with a `name` (the layer's)."""

    def decorate(function: FunctionT) -> FunctionT:
        @functools.wraps(function)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not torch.autograd._profiler_enabled():
                return function(self, *args, **kwargs)
            with span(f"{self.context.name}::{phase}"):
                return function(self, *args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate
