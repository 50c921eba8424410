"""Tables from the JSON that `fluid-hf bench attention` writes."""

from __future__ import annotations

from typing import Any

from fluid_hf.bench.report import breakdown_table

__all__ = ["attention_table"]


def attention_table(report: dict[str, Any]) -> str:
    """One line per shape, length and group size: milliseconds of forward / forward and backward."""
    heads = ["layer", "tokens", "compute", "link", "limit", "serial", "fluid_hf (chunks)", "UlyssesSPAttentionHF"]
    heads += ["over DeepSpeed", "over limit", "host", "peak MiB, ours / DeepSpeed"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for cell in report["cells"]:
        variants, limits = cell["variants"], cell["limits"]
        chosen = f"overlap {cell['planned_chunks']}" if cell["planned_chunks"] else "serial"
        ours = variants.get(chosen) or variants.get("transformers")
        theirs = variants.get("UlyssesSPAttentionHF")
        share = {"forward": limits["limit"], "both": limits["limit_both"]}
        columns = [
            f"{cell['shape']} SP{cell['sp_size']}",
            str(cell["tokens"]),
            *(_pair(limits[name], limits[name + "_both"]) for name in ("compute", "link", "limit")),
            _times(variants.get("serial")),
            _times(ours) + f" ({cell['planned_chunks']})",
            _times(theirs),
            _ratio(theirs, ours),
            _ratio(ours, share),
            "-" if ours is None else _pair(ours["host_forward"], ours["host_both"]),
            " / ".join(f"{found['peak_mib']:.0f}" if found and found["peak_mib"] else "-" for found in (ours, theirs)),
        ]
        lines.append("| " + " | ".join(columns) + " |")
    reports = [
        (f"{cell['shape']} SP{cell['sp_size']}, {cell['tokens']} tokens", variant, name, found)
        for cell in report["cells"]
        for variant, passes in cell.get("report", {}).items()
        for name, found in passes.items()
    ]
    return "\n".join([*lines, *breakdown_table("layer", reports)])


def _times(variant: dict[str, float] | None) -> str:
    return "-" if variant is None else _pair(variant["forward"], variant["both"])


def _pair(forward: float, both: float) -> str:
    return f"{forward:.2f} / {both:.2f}" if both else "-"  # zeros where nothing was timed: without a GPU, SP1's link


def _ratio(over: dict[str, float] | None, under: dict[str, float] | None) -> str:
    if over is None or under is None or not under["forward"] or not under["both"]:
        return "-"
    return f"{over['forward'] / under['forward']:.2f}x / {over['both'] / under['both']:.2f}x"
