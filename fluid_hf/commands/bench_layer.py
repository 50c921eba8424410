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
from fluid_hf.bench.shapes import SHAPES, shape_of
from fluid_hf.comm.calibration import measure_launch
from fluid_hf.overlap.cost_model import backward_seconds, forward_seconds, hardware_of
from fluid_hf.overlap.planner import choose_waves, possible_waves


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "layer", help="time one layer's experts", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    names = ", ".join(sorted(SHAPES))
    add("--shapes", nargs="+", default=["qwen3-30b-a3b"], help=f"models: {names}, or folders or config.json of others")
    add("--ep", nargs="+", type=int, default=[2], help="expert parallel sizes; 1 for no communication")
    add("--tokens", type=int, default=8192, help="tokens per rank")
    add("--waves", nargs="+", type=int, help="waves to time beside the planner's choice")
    add("--skew", type=float, default=0.0, help="Zipf exponent of expert popularity")
    add("--layers", type=int, default=4, help="calls timed in a row, as layers run in a model; times are per call")
    add("--repeats", type=int, default=20, help="timed runs of each variant")
    add("--variants", nargs="+", help="only variants whose name contains one of these")
    add("--json", help="file for the results")
    return parser


def run(options: argparse.Namespace) -> int:
    """Time every shape on every group size; print as they come, and write the file."""
    for name in options.shapes:
        shape_of(name)  # an unknown one is named before anything is timed
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
        shape = shape_of(name)
        if shape.experts % ep_size:
            continue
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        bench = LayerBench(
            shape, ep_size, options.tokens, device, skew=options.skew, dtype=dtype, layers=options.layers
        )
        cell: dict[str, Any] = {"shape": name, "ep_size": ep_size, "tokens": options.tokens, "layers": options.layers}
        cell["limits"] = bench.limits(options.repeats)
        waves = _plan(bench, cell, options.waves or [])
        cell["variants"] = {}
        cell["errors"] = {}
        _say(f"\n{name} EP{ep_size} T={options.tokens} limits {_rounded(cell['limits'])}")
        if "predicted_ms" in cell:
            _say(f"  planned waves {cell['planned_waves']}, predicted ms (forward, both) {cell['predicted_ms']}")
        reference: dict[str, torch.Tensor] = {}
        for variant, build in tqdm(bench.variants(waves).items(), leave=False, disable=None):
            if options.variants and not any(part in variant for part in options.variants):
                continue
            try:
                stack = [build() for _ in range(options.layers)]
                found = bench.gradients(*stack[0])
                reference = reference or found
                cell["errors"][variant] = _worst(found, reference)
                timing = bench.time(stack, options.repeats)
                cell["variants"][variant] = asdict(timing)
                _print(variant, timing, cell)
                del stack
            except Exception as error:
                cell["errors"][variant] = f"{type(error).__name__}: {error}"[:300]
                _say(f"  {variant:<24} {cell['errors'][variant]}")
            if device.type == "cuda":
                torch.cuda.empty_cache()
        cells.append(cell)
    if ep_size > 1:
        dist.destroy_process_group()
    return cells


def _plan(bench: LayerBench, cell: dict[str, Any], waves: list[int]) -> list[int]:
    """The planner's choice with the link as just measured, what it predicts, and all waves to time."""
    if bench.ep_size == 1:
        cell["planned_waves"] = 1
        return [1]
    sizes = bench.shape.sizes(bench.tokens, bench.ep_size, bench.hidden.element_size())
    moved = 2 * sizes.rows * sizes.hidden * sizes.element_bytes  # there and back
    launch = measure_launch(None, bench.device) if bench.device.type == "cuda" else 0.0
    hardware = hardware_of(bench.device, moved / max(cell["limits"]["link"], 1e-9) * 1e3, launch)
    planned = choose_waves(sizes, hardware, training=True)
    timed = sorted({*waves, planned} & set(possible_waves(bench.ep_size)))
    cell["planned_waves"] = planned
    cell["predicted_ms"] = {
        count: (
            forward_seconds(sizes, hardware, count) * 1e3,
            (forward_seconds(sizes, hardware, count) + backward_seconds(sizes, hardware, count)) * 1e3,
        )
        for count in timed
    }
    return timed


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
