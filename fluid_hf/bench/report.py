"""Tables from the JSON that `fluid-hf bench` writes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["breakdown_table", "limits_text", "markdown_table"]

# Where the second is missing (files of up to 2026-11-29) the first was timed with its setting, `gate_up_impl: fused`.
AUTOEP = ("AutoEP", "AutoEP fused")


def markdown_table(report: dict[str, Any]) -> str:
    """One line per shape and group size: milliseconds of forward / forward and backward of the main variants.

    AutoEP's are those of its faster setting of `gate_up_impl`, for each pass by itself, where both were timed.
    """
    heads = ["layer", "limit", "row per expert", "serial", "fluid_hf (waves)", "AutoEP", "transformers"]
    heads += ["over AutoEP", "over limit", "transformers with FluidEP", "over transformers"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for cell in report["cells"]:
        variants, limits = cell["variants"], cell["limits"]
        alone = cell["ep_size"] == 1
        name = "fluid_hf" if alone else f"overlap {cell['planned_waves']}"
        ours, autoep = variants.get(name), _fastest(variants, AUTOEP)
        theirs = variants.get("transformers" if alone else "AllToAllEP")
        faster = _ratio(autoep or theirs, ours) + (" (transformers)" if alone else "")
        share = {"forward": limits["limit"], "both": limits["limit_both"]}
        columns = [
            _cell_name(cell),
            _times(share),
            _times(variants.get("row per expert")),
            _times(variants.get("serial")),
            _times(ours) + ("" if alone else f" ({cell['planned_waves']})"),
            _times(autoep),
            _times(theirs),
            faster,
            _ratio(ours, share),
            _times(variants.get("FluidEP")),
            _ratio(theirs, variants.get("FluidEP")),
        ]
        lines.append("| " + " | ".join(columns) + " |")
    reports = [
        (_cell_name(cell), variant, name, found)
        for cell in report["cells"]
        for variant, passes in cell.get("report", {}).items()
        for name, found in passes.items()
    ]
    return "\n".join([*lines, *breakdown_table("layer", reports)])


def breakdown_table(what: str, reports: list[tuple[str, str, str, dict[str, Any]]]) -> list[str]:
    """Lines of a second table, where the time goes: from (cell, variant, pass, its breakdown); none without any."""
    if not reports:
        return []
    heads = [what, "variant", "pass", "ms", "compute", "of it beside messages", "messages alone", "neither"]
    heads += ["waited for"]
    lines = ["", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for cell, variant, name, found in reports:
        waits = ", ".join(f"{cause} {ms:.2f}" for cause, ms in list(found["waits"].items())[:4])
        times = (found[key] for key in ("ms", "compute_ms", "beside_ms", "exposed_ms", "idle_ms"))
        lines.append("| " + " | ".join([cell, variant, name, *(f"{ms:.2f}" for ms in times), waits or "-"]) + " |")
    return lines


def _cell_name(cell: dict[str, Any]) -> str:
    routing = f", Zipf {cell['skew']:g}" if cell.get("skew") else ""
    return f"{cell['shape']} EP{cell['ep_size']}{routing}"


def _fastest(variants: dict[str, dict[str, float]], names: Iterable[str]) -> dict[str, float] | None:
    """The shortest time of each pass among variants; None if none of them is there."""
    found = [variants[name] for name in names if name in variants]
    return {name: min(times[name] for times in found) for name in ("forward", "both")} if found else None


def _times(variant: dict[str, float] | None) -> str:
    if variant is None or not variant["both"]:  # not there, or not timed: without a GPU
        return "-"
    return f"{variant['forward']:.1f} / {variant['both']:.1f}"


def _ratio(over: dict[str, float] | None, under: dict[str, float] | None) -> str:
    if over is None or under is None or not under["forward"] or not under["both"]:
        return "-"
    return f"{over['forward'] / under['forward']:.2f}x / {over['both'] / under['both']:.2f}x"


def limits_text(limits: dict[str, float]) -> str:
    """A cell's limits, forward / forward and backward; `limits` holds milliseconds, zeros where nothing was timed."""
    if not limits["limit"]:
        return "(no GPU: no times)"
    pairs = [f"{name} {limits[name]:.3f} / {limits[name + '_both']:.3f}" for name in limits if name + "_both" in limits]
    return "ms alone: " + ", ".join(pairs)
