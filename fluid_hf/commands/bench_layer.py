"""`fluid-hf bench layer`: one MoE layer beside DeepSpeed AutoEP and transformers."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from fluid_hf.bench.layer import LayerBench, Timing
from fluid_hf.bench.mirror import init_mirror
from fluid_hf.bench.shapes import SHAPES
from fluid_hf.overlap.planner import choose_waves


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "layer", help="time one layer's experts", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--shapes", nargs="+", default=["qwen3-30b-a3b"], choices=sorted(SHAPES), help="models by name")
    add("--ep", nargs="+", type=int, default=[2], help="expert parallel sizes; 1 for no communication")
    add("--tokens", type=int, default=8192, help="tokens per rank")
    add("--waves", nargs="+", type=int, help="waves to time beside the planner's choice")
    add("--skew", type=float, default=0.0, help="Zipf exponent of expert popularity")
    add("--repeats", type=int, default=20, help="timed runs of each variant")
    add("--variants", nargs="+", help="only variants whose name contains one of these")
    add("--json", help="file for the results")
    return parser


def run(options: argparse.Namespace) -> int:
    """Time every shape on every group size; print as they come, and write the file."""
    cells = [cell for ep_size in options.ep for cell in _bench(options, ep_size)]
    if options.json:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        about = {"device": device, "torch": torch.__version__, "date": datetime.date.today().isoformat()}
        report = {**about, "command": vars(options), "link": "mirror", "cells": cells}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    return 0


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
        _say(f"\n{name} EP{ep_size} T={options.tokens} limits {_rounded(cell['limits'])}")
        reference: dict[str, torch.Tensor] = {}
        for variant, build in tqdm(bench.variants(waves).items(), leave=False, disable=None):
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
                _say(f"  {variant:<24} {cell['errors'][variant]}")
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
    _say(
        f"  {variant:<24} fwd {timing.forward:7.2f} (+-{timing.forward_spread:.2f}) {share[0]:5.2f}x limit   "
        f"fwd+bwd {timing.both:7.2f} (+-{timing.both_spread:.2f}) {share[1]:5.2f}x limit   "
        f"differs {cell['errors'][variant]:.1e}",
    )


def _say(text: str) -> None:
    """Print beside the progress bar, at once."""
    tqdm.write(text)
    sys.stdout.flush()


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in values.items()}
