"""The table of `fluid-hf bench train`, and how far the losses of the variants differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["largest_difference", "train_table"]


def largest_difference(values: Sequence[float], reference: Sequence[float]) -> float | None:
    """Largest relative difference of two curves, step by step; `None` of curves that do not fit."""
    if len(values) != len(reference) or not values:
        return None
    pairs = zip(values, reference, strict=True)
    return max(abs(value - other) / max(abs(other), 1e-12) for value, other in pairs)


def train_table(report: dict[str, Any]) -> str:
    """One line per variant; below, what failed and why."""
    heads = ["variant", "ms per step", "tokens/s", "MFU", "peak MiB, worst rank", "exposed ms", "waves"]
    heads += ["a layer: predicted ms", "measured ms", "last loss", "losses differ"]
    lines = [_about(report), "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    failed = []
    for cell in report["cells"]:
        found = cell.get("result")
        if found is None:
            failed.append(f"- {cell['variant']} {cell['status']}: {cell['cause']}")
            continue
        times = found["seconds_per_step"]
        columns = [
            cell["variant"],
            f"{times['median'] * 1e3:.1f} (+-{times['spread'] * 1e3:.1f})",
            f"{found['tokens_per_second']:.0f}",
            "-" if found["mfu"] is None else f"{found['mfu']:.1%}",
            f"{max(found['peak_mib']):.0f}",
            _shown(_exposed(found), ".1f"),
            _shown(found["waves"], "d"),
            *_layer(found),
            f"{found['losses'][-1]:.4f}",
            _shown(cell.get("differs"), ".1e"),
        ]
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join([*lines, *([""] if failed else []), *failed])


def _about(report: dict[str, Any]) -> str:
    command = report["command"]
    engine = f"ZeRO {command['zero']}, EP{command['ep']}" + (f", SP{command['sp']}" if command["sp"] > 1 else "")
    size = f"{command['model']}, {command['layers']} layers, {command['batch']} x {command['sequence']} tokens a rank"
    return f"{size}, {report['ranks']} ranks of {report['device']}, {command['dtype']}, {engine}"


def _exposed(found: dict[str, Any]) -> float | None:
    """Of the traced step, which counts alike in all variants, or of a sampled one."""
    traced: float | None = found.get("trace", {}).get("exposed_ms")
    sampled: float | None = found["exposed_ms"]
    return sampled if traced is None else traced


def _layer(found: dict[str, Any]) -> list[str]:
    """Forward and backward of one layer's experts: predicted for the waves that were run, and as the trace has it."""
    predicted = found["predicted_ms"].get(str(found["waves"]))
    measured = found.get("trace", {}).get("layer_ms")
    return [_shown(predicted, ".2f"), _shown(sum(measured.values()) if measured else None, ".2f")]


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
