"""Results of `fluid-hf bench model`: timelines as numbers, pictures of them, and the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fluid_hf.bench.report import breakdown_table
from fluid_hf.errors import TraceError
from fluid_hf.profiling.breakdown import breakdown, record
from fluid_hf.profiling.picture import draw_timeline
from fluid_hf.profiling.timeline import PassTimeline, layer_passes, summarize
from fluid_hf.profiling.trace import Work

__all__ = ["draw_pictures", "join_reports", "model_table", "trace_pass"]

MODES = ("inference", "forward", "backward", "step")
TRACED_RUNS = 3


def trace_pass(run: Callable[[], None], is_first: bool) -> dict[str, Any] | None:
    """Run under the profiler on rank 0: summary, breakdown, and the forward and backward pass of the middle layer.

    Of several runs the one of median length, as a host that does something else for a moment makes one run say
    nothing. The trace itself is not kept. `None` on the other ranks, or if no trace has a whole pass. Collective.
    """
    if not is_first:
        for _ in range(2 * TRACED_RUNS):
            run()
        return None
    found = [timeline for timeline in [_record(run) for _ in range(TRACED_RUNS)] if timeline is not None]
    return sorted(found, key=lambda timeline: timeline["breakdown"]["ms"])[len(found) // 2] if found else None


def _record(run: Callable[[], None]) -> dict[str, Any] | None:
    """Of one run, after one more; both have run when it raises."""
    try:
        trace, kernels = record(run)
        passes = [asdict(found) for found in layer_passes(trace)]
    except TraceError:
        return None
    return {"summary": summarize(trace), "breakdown": breakdown(trace, kernels), "passes": passes}


def draw_pictures(cell: dict[str, Any], folder: str | Path) -> list[Path]:
    """Draw the timelines of a slice under each other.

    They can be drawn later, from the JSON: `fluid-hf bench table --json FILE --pictures FOLDER`.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    passes = []
    for name, timeline in cell["timeline"].items():
        for found in timeline["passes"]:
            heading = f"{name}: {'backward' if found['backward'] else 'forward'}"
            passes.append((heading, _timeline(found)))
    shared = f"_sp{cell['sp']}" if cell["sp"] > 1 else ""
    over = "_" + cell["over"].replace(", ", "_").replace(" ", "_").lower() if "over" in cell else ""
    out = Path(folder) / f"{cell['model']}_{cell['layers']}x{cell['batch']}{shared}{over}"
    title = f"{slice_name(cell)} x {cell['sequence']} tokens: one layer"
    return draw_timeline(passes, out, title=title) if passes else []


def join_reports(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report of several runs, whose slices tell their link if the runs have more than one."""
    links = [_link(report) for report in reports]
    several = len(set(links)) > 1
    cells = []
    for link, report in zip(links, reports, strict=True):
        cells += [{**cell, "over": link} if several else cell for cell in report["cells"]]
    return {**reports[0], "cells": cells}


def _link(report: dict[str, Any]) -> str:
    """What ranks exchanged over, as NCCL was told."""
    name = str(report.get("link", "nccl"))
    return f"{name}, P2P off" if report.get("nccl_p2p_disabled") else name


def model_table(report: dict[str, Any]) -> str:
    """One line per slice: milliseconds of the main variants in each mode, and how much faster ours is than each."""
    names, cells = ["row per expert", "serial", "fluid_hf", "AutoEP", "AllToAllEP"], report["cells"]
    others = sorted({name for cell in cells for name in cell["variants"]} - set(names))
    modes = [mode for mode in MODES if any(mode in times for cell in cells for times in cell["variants"].values())]
    heads = [f"slice: {' / '.join(modes)}", *names[:2], "fluid_hf (waves)", *names[3:], *others]
    heads += ["over row per expert", "over serial", "over AutoEP"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for cell in cells:
        variants = cell["variants"]
        times = {name: [found.get(mode, {}).get("median") for mode in modes] for name, found in variants.items()}
        if not any(map(any, times.values())):
            continue
        shown = {name: _joined([ms and f"{ms:.1f}" for ms in found]) for name, found in times.items()}
        if "fluid_hf" in shown and cell["waves"].get("fluid_hf"):
            shown["fluid_hf"] += f" ({cell['waves']['fluid_hf']})"
        columns = [slice_name(cell), *(shown.get(name, "-") for name in [*names, *others])]
        columns += [_ratios(times.get(name), times.get("fluid_hf")) for name in (names[0], names[1], names[3])]
        lines.append("| " + " | ".join(columns) + " |")
    reports = []
    for cell in cells:
        for name, timeline in cell["timeline"].items():
            reports.append((slice_name(cell), name, "forward and backward", timeline["breakdown"]))
    return "\n".join([*lines, *breakdown_table("slice", reports)])


def slice_name(cell: dict[str, Any]) -> str:
    """A slice as the table and the pictures name it."""
    shared = f", SP{cell['sp']}" if cell.get("sp", 1) > 1 else ""
    over = f", {cell['over']}" if "over" in cell else ""
    return f"{cell['model']}, {cell['layers']} layers, batch {cell['batch']}{shared}{over}"


def _ratios(theirs: Sequence[float | None] | None, ours: Sequence[float | None] | None) -> str:
    if not theirs or not ours:
        return "-"
    return _joined([f"{other / own:.2f}x" if other and own else None for other, own in zip(theirs, ours, strict=True)])


def _joined(values: Sequence[str | None]) -> str:
    return " / ".join(value or "-" for value in values) if any(values) else "-"


def _timeline(found: dict[str, Any]) -> PassTimeline:
    lanes = {name: [Work(**work) for work in found[name]] for name in ("compute", "communication")}
    return PassTimeline(found["layer"], found["backward"], found["duration"], exposed=found["exposed"], **lanes)
