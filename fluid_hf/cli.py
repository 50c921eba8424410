"""The `fluid-hf` command."""

from __future__ import annotations

import argparse
import datetime
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fluid_hf.bench.layer import LayerBench, Timing
from fluid_hf.bench.mirror import init_mirror
from fluid_hf.bench.report import markdown_table
from fluid_hf.bench.shapes import SHAPES
from fluid_hf.overlap.planner import choose_waves

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="fluid-hf", description="Expert-parallel Hugging Face models: benchmarks.")
    commands = parser.add_subparsers(dest="command", required=True)
    bench = commands.add_parser("bench", help="time one MoE layer beside DeepSpeed AutoEP and transformers")
    bench.add_argument("what", choices=["layer", "table"], help="layer: time one layer; table: print --json as a table")
    bench.add_argument("--shapes", nargs="+", default=["qwen3-30b-a3b"], choices=sorted(SHAPES), help="models by name")
    bench.add_argument("--ep", nargs="+", type=int, default=[2], help="expert parallel sizes; 1 for no communication")
    bench.add_argument("--tokens", type=int, default=8192, help="tokens per rank (default: 8192)")
    bench.add_argument("--waves", nargs="+", type=int, help="waves to time beside the planner's choice")
    bench.add_argument("--skew", type=float, default=0.0, help="Zipf exponent of expert popularity (default: 0)")
    bench.add_argument("--repeats", type=int, default=20, help="timed runs of each variant (default: 20)")
    bench.add_argument("--variants", nargs="+", help="only variants whose name contains one of these")
    bench.add_argument("--json", help="file for the results, or with the results to print")
    options = parser.parse_args(arguments)
    if options.what == "table":
        if not options.json:
            parser.error("table needs --json FILE")
        print(markdown_table(json.loads(Path(options.json).read_text(encoding="utf-8"))))
        return
    cells = [cell for ep_size in options.ep for cell in _bench(options, ep_size)]
    if options.json:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        about = {"device": device, "torch": torch.__version__, "date": datetime.date.today().isoformat()}
        report = {**about, "command": vars(options), "link": "mirror", "cells": cells}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)


def _bench(options: Any, ep_size: int) -> list[dict[str, Any]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if ep_size > 1:
        init_mirror(ep_size)
    cells = []
    for name in options.shapes:
        shape = SHAPES[name]
        if shape.experts % ep_size:
            continue
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        bench = LayerBench(shape, ep_size, options.tokens, device, skew=options.skew, dtype=dtype)
        planned = choose_waves(
            expected_tokens=options.tokens, top_k=shape.top_k, num_experts=shape.experts, ep_size=ep_size
        )
        waves = sorted({*(options.waves or []), planned})
        cell: dict[str, Any] = {"shape": name, "ep_size": ep_size, "tokens": options.tokens, "planned_waves": planned}
        cell["limits"] = bench.limits(options.repeats)
        cell["variants"] = {}
        cell["errors"] = {}
        print(f"\n{name} EP{ep_size} T={options.tokens} limits {_rounded(cell['limits'])}", flush=True)
        reference: dict[str, torch.Tensor] = {}
        for variant, build in bench.variants(waves).items():
            if options.variants and not any(part in variant for part in options.variants):
                continue
            try:
                layer, module = build()
                found = bench.gradients(layer, module)
                reference = reference or found
                cell["errors"][variant] = _worst(found, reference)
                timing = bench.time(layer, module, options.repeats)
                cell["variants"][variant] = asdict(timing)
                _print(variant, timing, cell)
                del layer, module
            except Exception as error:
                cell["errors"][variant] = f"{type(error).__name__}: {error}"[:300]
                print(f"  {variant:<24} {cell['errors'][variant]}", flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        cells.append(cell)
    if ep_size > 1:
        dist.destroy_process_group()
    return cells


def _worst(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """Largest relative difference of what both variants name (their weights' layouts differ)."""
    errors = [
        float((found[name].float() - reference[name].float()).norm() / reference[name].float().norm())
        for name in reference
        if name in found and found[name].shape == reference[name].shape
    ]
    return max(errors)


def _print(variant: str, timing: Timing, cell: dict[str, Any]) -> None:
    limits = cell["limits"]
    share = (timing.forward / max(limits["limit"], 1e-9), timing.both / max(limits["limit_both"], 1e-9))
    print(
        f"  {variant:<24} fwd {timing.forward:7.2f} (+-{timing.forward_spread:.2f}) {share[0]:5.2f}x limit   "
        f"fwd+bwd {timing.both:7.2f} (+-{timing.both_spread:.2f}) {share[1]:5.2f}x limit   "
        f"differs {cell['errors'][variant]:.1e}",
        flush=True,
    )


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in values.items()}


if __name__ == "__main__":
    main()
