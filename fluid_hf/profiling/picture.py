"""Pictures with matplotlib: PNG on a card of its own, SVG that follows the reader's light or dark theme."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluid_hf.errors import MissingPackageError
from fluid_hf.profiling.timeline import PassTimeline
from fluid_hf.profiling.trace import Work

__all__ = ["check_pictures", "draw_expert_load", "draw_timeline"]

MISSING = "pictures need matplotlib (not installed); run `pip install 'fluid-hf[plot]'`."
TEXT, CARD, LANE = "#1f2937", "#ffffff", "#eef0f3"
EXPOSED, HIDDEN = "#dc2626", "#9fb0c3"  # only what is lost may catch the eye
KINDS = {
    "plan, pack, sum": "#9b8afb",
    "own tokens": "#3b82f6",
    "arrived rows": "#7cb8fb",
    "shared expert": "#22b8cf",
    "attention": "#e879c6",
    "weight gradients": "#34b37a",
    "rest of the model": "#d8c9a3",
}
# Sharp edges leave no seams between blocks. A gap of a twentieth of a pixel would be a whole pixel of red with them, or
# nothing, as it happens to fall: red is smoothed, so that it is as strong as it is wide.
STYLE = """<style>path { shape-rendering: crispEdges }
path[style*="EXPOSED"] { shape-rendering: auto }
@media (prefers-color-scheme: dark) {
text, g[id^="text_"] path, g[id^="text_"] use { fill: #e5e7eb !important }
g[id^="inside"] text, g[id^="inside"] path { fill: #111827 !important }
#card path { fill: #0d1117 !important }
g[id^="lane"] path { fill: #1f2630 !important }
}</style>""".replace("EXPOSED", EXPOSED)


def draw_timeline(passes: Sequence[tuple[str, PassTimeline]], out: str | Path, *, title: str = "") -> list[Path]:
    """Draw passes under each other on one time axis: a compute lane, a communication lane, exposed time in red.

    Args:
        passes: `(heading, pass)` from top to bottom; durations are compared with the first of the same direction.
        out: path without ending; `.png` and `.svg` are added.

    Returns:
        The files written.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    figure_module = _matplotlib()
    height = 1.32 * len(passes) + 1.15
    figure = figure_module.Figure(figsize=(11.5, height), dpi=150)
    figure.patch.set_facecolor(CARD)
    figure.patch.set_gid("card")
    axes = figure.subplots(len(passes), 1, sharex=True, squeeze=False)[:, 0]
    longest = max(timeline.duration for _, timeline in passes) / 1e3
    first: dict[bool, float] = {}
    for number, (axis, (heading, timeline)) in enumerate(zip(axes, passes, strict=True)):
        reference = first.setdefault(timeline.backward, timeline.duration)
        _headline(axis, heading, timeline, longest, reference)
        _draw_pass(axis, timeline, longest, number)
    axes[-1].set_xlabel("milliseconds", color=TEXT, fontsize=9)
    if title:
        figure.suptitle(title, x=0.012, y=1 - 0.1 / height, ha="left", va="top", fontsize=12, weight="bold", color=TEXT)
    _legend(figure, passes)
    top, bottom = 1 - (0.62 if title else 0.38) / height, 0.88 / height
    figure.subplots_adjust(left=0.115, right=0.985, top=top, bottom=bottom, hspace=0.62)
    return _save(figure, out)


def draw_expert_load(
    steps: Sequence[int], load: Sequence[Sequence[float]], out: str | Path, *, title: str = ""
) -> list[Path]:
    """Draw a heat map of expert load over training: white is the mean, red above it, blue below.

    Args:
        steps: optimizer steps at which loads were read [S].
        load: for each step the load of every expert over the mean [S, E].
        out: path without ending; `.png` and `.svg` are added.
        title: which layer it is.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    figure = _matplotlib().Figure(figsize=(9.5, 4.2), dpi=150)
    from matplotlib.colors import TwoSlopeNorm

    figure.patch.set_facecolor(CARD)
    figure.patch.set_gid("card")
    axis = figure.subplots()
    rows = [[float(step[expert]) for step in load] for expert in range(len(load[0]))]
    # What is read at a step came in since the step before; how far the first reaches back is not known.
    edges = [max(0, steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1)), *steps]
    experts = [index - 0.5 for index in range(len(rows) + 1)]
    norm = TwoSlopeNorm(1.0, vmin=0.0, vmax=max(2.0, *(max(row) for row in rows)))
    mesh = axis.pcolormesh(edges, experts, rows, cmap="RdBu_r", norm=norm, rasterized=True)
    bar = figure.colorbar(mesh, ax=axis, pad=0.015)
    bar.set_label("tokens over the mean", color=TEXT, fontsize=9)
    head = f"Load of each expert of {title}" if title else "Load of each expert"
    axis.set_title(f"{head} (1: balanced)", loc="left", color=TEXT, fontsize=11, weight="bold")
    axis.set_xlabel("optimizer step", color=TEXT, fontsize=9)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylabel("expert", color=TEXT, fontsize=9)
    for item in (axis, bar.ax):
        item.tick_params(colors=TEXT, labelsize=8)
    figure.tight_layout()
    return _save(figure, out)


def _headline(axis: Any, heading: str, timeline: PassTimeline, longest: float, reference: float) -> None:
    total, gap = timeline.communication_time / 1e3, sum(end - start for start, end in timeline.exposed) / 1e3
    change = timeline.duration / reference - 1
    against = f" ({abs(change):.0%} {'less' if change < 0 else 'more'})" if change else ""
    hidden = f"{min(1 - gap / total, 0.99 if gap else 1):.0%} hidden" if total else "nothing to hide"
    text = f"{timeline.duration / 1e3:.2f} ms{against}; communication {total:.2f} ms, exposed {gap:.2f} ms ({hidden})"
    axis.text(0, 2.1, heading, fontsize=9.5, weight="bold", color=TEXT, va="bottom")
    axis.text(longest, 2.1, text, fontsize=8.5, color=TEXT, ha="right", va="bottom")


def _draw_pass(axis: Any, timeline: PassTimeline, longest: float, number: int) -> None:
    for lane in (0, 1):
        (bar,) = axis.barh(lane + 0.5, timeline.duration / 1e3, height=0.92, color=LANE, linewidth=0)
        bar.set_gid(f"lane {number} {lane}")
    for work in timeline.compute:
        _block(axis, work, 1, KINDS[_kind(work.label)], longest)
    for work in timeline.communication:
        _block(axis, work, 0, HIDDEN, longest, parts=_overlapping(timeline.communication, work))
    for start, end in timeline.exposed:
        width = (end - start) / 1e3
        look = {"left": start / 1e3, "color": EXPOSED, "linewidth": 0, "snap": False}
        axis.barh(0.5, width, height=0.92, **look)
        axis.barh(1.45, width, height=1.02, alpha=0.25, **look)
    axis.set_xlim(-0.002 * longest, longest * 1.002)
    axis.set_ylim(0, 2.05)
    axis.set_yticks([1.5, 0.5], ["compute", "communication"], fontsize=8.5, color=TEXT)
    axis.tick_params(colors=TEXT, labelsize=8, length=0)
    axis.set_facecolor("none")
    for side in axis.spines.values():
        side.set_visible(False)


def _block(axis: Any, work: Work, lane: int, color: str, longest: float, parts: tuple[int, int] = (0, 1)) -> None:
    """One stretch; communication in flight at the same time shares the lane's height."""
    width, (position, count) = (work.end - work.start) / 1e3, parts
    height = 0.84 / count
    middle = lane + 0.08 + (count - position - 0.5) * height
    axis.barh(middle, width, left=work.start / 1e3, height=height, color=color, linewidth=0)
    if width > 0.0085 * longest * (len(work.label) + 1) and count <= 3:
        x = work.start / 1e3 + width / 2
        label = axis.text(x, middle, work.label, ha="center", va="center", fontsize=7.5 if count < 3 else 6)
        label.set_color("#111827")
        label.set_gid(f"inside {lane} {x}")
        label.set_zorder(5)


def _overlapping(works: Sequence[Work], work: Work) -> tuple[int, int]:
    """Row of a message and number of rows, so that messages in flight together lie under each other."""
    rows: list[float] = []
    placed: dict[int, int] = {}
    for other in works:
        if rows and max(rows) <= other.start:  # nothing is in flight any more: the whole height is free again
            if id(work) in placed:
                break
            rows = []
        row = next((index for index, end in enumerate(rows) if end <= other.start), len(rows))
        rows[row:] = [other.end] if row == len(rows) else [other.end, *rows[row + 1 :]]
        placed[id(other)] = row
    return placed[id(work)], len(rows)


def _kind(label: str) -> str:
    if label.startswith("wave"):
        return "arrived rows"
    return "weight gradients" if label.startswith("wgrad") else label if label in KINDS else "rest of the model"


def _legend(figure: Any, passes: Sequence[tuple[str, PassTimeline]]) -> None:
    from matplotlib.patches import Patch

    used = {_kind(work.label) for _, timeline in passes for work in timeline.compute}
    entries = [(name, color) for name, color in KINDS.items() if name in used]
    entries += [("communication, hidden", HIDDEN), ("communication, exposed", EXPOSED)]
    handles = [Patch(facecolor=color, label=name) for name, color in entries]
    narrow = {"columnspacing": 1.0, "handlelength": 1.5, "handletextpad": 0.5}  # all kinds at once fit, too
    legend = figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=8, **narrow)
    for text in legend.get_texts():
        text.set_color(TEXT)


def _save(figure: Any, out: str | Path) -> list[Path]:
    from matplotlib import rc_context

    base = Path(out)
    if base.suffix in (".png", ".svg"):
        base = base.with_suffix("")
    base.parent.mkdir(parents=True, exist_ok=True)
    png, svg = (base.with_name(base.name + ending) for ending in (".png", ".svg"))
    figure.savefig(png)
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": json.dumps(str(base.name))}):
        figure.savefig(svg, metadata={"Date": None})
    head, found, tail = svg.read_text(encoding="utf-8").partition("<defs>")
    svg.write_text(head + STYLE + found + tail, encoding="utf-8")
    return [png, svg]


def check_pictures() -> None:
    """Find out now, not after what is to be drawn has run, that nothing can be.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    with contextlib.suppress(ImportError):
        if importlib.util.find_spec("matplotlib") is not None:
            return
    raise MissingPackageError(MISSING)


def _matplotlib() -> Any:
    try:
        from matplotlib import figure
    except ImportError as error:
        raise MissingPackageError(MISSING) from error
    return figure
