"""Tracing: a few steps under torch.profiler, and what is written about them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fluid_hf.errors import MissingPackageError, TraceError
from fluid_hf.profiling.picture import draw_timeline
from fluid_hf.profiling.timeline import layer_passes, summarize
from fluid_hf.profiling.trace import Trace, read_trace

__all__ = ["StepTrace", "draw_traces", "write_report"]


class StepTrace:
    """One stretch of training under torch.profiler.

    Args:
        path: where the Chrome (Perfetto) trace goes; ending `.json` or `.json.gz`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)

    def start(self) -> None:
        """Begin to trace."""
        self._profiler.start()

    def stop(self) -> Path:
        """Wait for the device, end the trace and write it."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profiler.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self.path))
        return self.path


def draw_traces(
    traces: Sequence[tuple[str, Trace]], out: str | Path, *, layer: str | None = None, title: str = ""
) -> list[Path]:
    """The timeline picture of one layer: forward of each `(name, trace)`, then backward of each, under each other.

    Raises:
        TraceError: a trace has no whole pass of the layer.
        MissingPackageError: matplotlib is not installed.
    """
    found = [(name, timeline) for name, trace in traces for timeline in layer_passes(trace, layer)]
    found.sort(key=lambda entry: entry[1].backward)  # stable: what is compared stands next to each other
    passes = [
        (f"{'backward' if timeline.backward else 'forward'}, {name or timeline.layer}", timeline)
        for name, timeline in found
    ]
    return draw_timeline(passes, out, title=title)


def write_report(trace: str | Path, out: str | Path, *, layer: str | None = None) -> tuple[dict[str, Any], list[Path]]:
    """Summary (`OUT.json`) and picture (`OUT.png`, `OUT.svg`) of a trace.

    No picture where matplotlib is missing, or where there is nothing to draw: a model without experts has no layer, a
    short trace no whole pass.

    Returns:
        The summary, and the files written.

    Raises:
        TraceError: the file is no trace of a patched model, or has no whole pass of the `layer` asked for.
    """
    found = read_trace(trace)
    summary = summarize(found)
    base = Path(out)
    base.parent.mkdir(parents=True, exist_ok=True)
    numbers = base.with_name(base.name + ".json")
    numbers.write_text(json.dumps(summary, indent=1), encoding="utf-8")
    try:
        pictures = draw_traces([("", found)], base, layer=layer)
    except MissingPackageError:
        pictures = []
    except TraceError:
        if layer is not None:
            raise
        pictures = []
    return summary, [numbers, *pictures]
