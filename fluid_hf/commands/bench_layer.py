"""`fluid-hf bench layer`: one MoE layer beside DeepSpeed AutoEP and transformers."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import sys
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from fluid_hf.bench.layer import LayerBench, Timing
from fluid_hf.bench.links import LINKS, is_first, link_world, several_processes, world_sizes
from fluid_hf.bench.report import limits_text
from fluid_hf.bench.shapes import SHAPES, shape_of
from fluid_hf.comm.calibration import measure_launch, measure_link
from fluid_hf.commands.arguments import DefaultsFormatter, add_json, not_negative, positive, write_whole
from fluid_hf.errors import ConfigError, TraceError
from fluid_hf.overlap.cost_model import hardware_of
from fluid_hf.overlap.planner import choose_waves, possible_waves, predicted_seconds
from fluid_hf.profiling.breakdown import breakdown, breakdown_text, record

ALLOWED = {torch.bfloat16: 3e-2, torch.float32: 1e-5}  # relative difference between variants


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "layer", help="time one layer's experts", formatter_class=DefaultsFormatter
    )
    add = parser.add_argument
    names = ", ".join(sorted(SHAPES))
    add("--shapes", nargs="+", default=["qwen3-30b-a3b"], help=f"models: {names}, or folders or config.json of others")
    add("--link", choices=LINKS, default="mirror", help="mirror: one process plays a rank of --ep; else under torchrun")
    add(
        "--ep",
        nargs="+",
        type=positive,
        help="expert parallel sizes; 1: no communication (default: 2, or all ranks)",
    )
    add("--tokens", type=positive, default=8192, help="tokens per rank")
    add("--waves", nargs="+", type=positive, help="waves to time beside the planner's choice")
    add(
        "--skew", nargs="+", type=not_negative, default=[0.0], help="Zipf exponents of expert popularity; 0 is balanced"
    )
    add("--layers", type=positive, default=4, help="calls timed in a row, as layers run in a model; times are per call")
    add("--repeats", type=positive, default=20, help="timed runs of each variant")
    add(
        "--pause",
        type=not_negative,
        default=0.0,
        help="seconds the GPU rests before each timed run; without, small experts are timed at its power limit",
    )
    add("--variants", nargs="+", help="only variants whose name contains one of these")
    add("--report", action="store_true", help="also say where the time goes, from a timeline of ours")
    add_json(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    """Time every shape on every group size; print and write results as they come. 1 if variants disagree."""
    sizes = world_sizes(options.link, options.ep)
    experts = {name: shape_of(name).experts for name in options.shapes}
    for size in sizes:
        if all(count % size for count in experts.values()):
            raise ConfigError(f"--ep ({size}) must divide the experts of one of the shapes ({experts}).")
    if not torch.cuda.is_available():
        print("no GPU: times say nothing; --shapes tiny --tokens 256 compares the variants at once", file=sys.stderr)
    with link_world(options.link) if options.link != "mirror" else contextlib.nullcontext():
        cells: list[dict[str, Any]] = []
        for ep_size in sizes:
            _bench(options, ep_size, cells)
        # When all is timed: what traces a GPU stays in the process, and can make later launches take the host longer.
        for ep_size in sizes if options.report else []:
            _report_all(options, ep_size, cells)
    return int(any("differs" in str(error) for cell in cells for error in cell["errors"].values()))


def _write(options: argparse.Namespace, cells: list[dict[str, Any]]) -> None:
    """What is finished so far: a run that is cut keeps it."""
    if options.json and is_first():
        device = torch.cuda.get_device_name() if torch.cuda.is_available() and options.link != "gloo" else "CPU"
        about = {"device": device, "torch": torch.__version__, "date": datetime.date.today().isoformat()}
        report = {**about, "command": vars(options), "link": options.link, "cells": cells}
        write_whole(options.json, json.dumps(report, indent=1))


def _bench(options: Any, ep_size: int, cells: list[dict[str, Any]]) -> None:
    with link_world(options.link, ep_size) as device:
        for name, skew in itertools.product(options.shapes, options.skew):
            if shape_of(name).experts % ep_size == 0:
                cells.append(_cell(options, name, _layer_bench(options, name, skew, ep_size, device)))
                _write(options, cells)


def _layer_bench(options: Any, name: str, skew: float, ep_size: int, device: torch.device) -> LayerBench:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    how = {"skew": skew, "dtype": dtype, "layers": options.layers, "pause": options.pause}
    return LayerBench(shape_of(name), ep_size, options.tokens, device, **how)


def _report_all(options: Any, ep_size: int, cells: list[dict[str, Any]]) -> None:
    """Where the time goes in the main variants of every cell of that size."""
    with link_world(options.link, ep_size) as device:
        for cell in [cell for cell in cells if cell["ep_size"] == ep_size]:
            bench = _layer_bench(options, cell["shape"], cell["skew"], ep_size, device)
            planned = cell.get("planned_waves", 1)
            for variant, build in bench.variants([planned]).items():
                if variant in cell["variants"] and variant in ("serial", "fluid_hf", f"overlap {planned}"):
                    _say(f"\n{cell['shape']} EP{ep_size} T={bench.tokens} {variant}")
                    try:
                        cell["report"][variant] = _report(bench, [build() for _ in range(bench.layers)])
                    except TraceError as error:  # the times are what was asked for
                        _say(f"    no report: {error}")
            _write(options, cells)
            del bench
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _cell(options: Any, name: str, bench: LayerBench) -> dict[str, Any]:
    cell: dict[str, Any] = {"shape": name, "ep_size": bench.ep_size, "tokens": bench.tokens, "layers": bench.layers}
    cell |= {"skew": bench.skew, "limits": bench.limits(options.repeats)}
    waves = _plan(bench, cell, options.waves or [])
    cell |= {"variants": {}, "errors": {}, "report": {}}
    routing = f" Zipf {bench.skew}" if bench.skew else ""
    _say(f"\n{name} EP{bench.ep_size} T={bench.tokens}{routing} {limits_text(cell['limits'])}")
    if "predicted_ms" in cell:
        _say(f"  planned waves {cell['planned_waves']}, predicted ms (forward, both) {cell['predicted_ms']}")
    reference: dict[str, torch.Tensor] = {}
    for variant, build in tqdm(bench.variants(waves).items(), leave=False, disable=None if is_first() else True):
        if options.variants and not any(part in variant for part in options.variants):
            continue
        try:
            stack = [build() for _ in range(bench.layers)]
            found = bench.gradients(*stack[0])
            reference = reference or found
            error = _worst(found, reference, bench.device)
            cell["errors"][variant] = error
            if not error <= ALLOWED[bench.hidden.dtype]:
                raise ValueError(f"differs from the first variant by {error:.1e}")
            timing = bench.time(stack, options.repeats)
            cell["variants"][variant] = asdict(timing)
            _print(variant, timing, cell)
            del stack
        except Exception as error:
            cell["errors"][variant] = f"{type(error).__name__}: {error}"[:300]
            _say(f"  {variant:<24} {cell['errors'][variant]}")
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    return cell


def _report(bench: LayerBench, stack: list[Any]) -> dict[str, Any]:
    """Where the time of each pass goes, by this rank's timeline of one run."""
    found = {}
    for name, go in bench.passes(stack).items():
        found[name] = breakdown(*record(go), calls=len(stack))
        _say(f"    {name:<8} {breakdown_text(found[name])}")
    return found


def _plan(bench: LayerBench, cell: dict[str, Any], waves: list[int]) -> list[int]:
    """The planner's choice from what a patched model would measure, what it predicts, and all waves to time."""
    if bench.ep_size == 1:
        cell["planned_waves"] = 1
        return [1]
    sizes = bench.shape.sizes(bench.tokens, bench.ep_size, bench.hidden.element_size())
    link, launch = 0.0, 0.0
    if bench.device.type == "cuda":
        link, launch = measure_link(bench.exchange, bench.device), measure_launch(bench.exchange, bench.device)
        cell["link"] = {"bytes_per_second": float(link), **vars(link), "launch": launch}
    hardware = hardware_of(bench.device, link, launch)
    planned = choose_waves(sizes, hardware, training=True)
    timed = sorted({*waves, planned} & set(possible_waves(bench.ep_size)))
    cell["planned_waves"] = planned
    cell["predicted_ms"] = {
        count: (
            predicted_seconds(sizes, hardware, count, training=False) * 1e3,
            predicted_seconds(sizes, hardware, count, training=True) * 1e3,
        )
        for count in timed
    }
    return timed


def _worst(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], device: torch.device) -> float:
    """Largest relative difference, over all ranks, of what both variants name (their weights' layouts differ)."""
    errors = [
        (found[name].float() - reference[name].float()).norm() / reference[name].float().norm()
        for name in reference
        if name in found and found[name].shape == reference[name].shape
    ]
    worst = torch.nan_to_num(torch.stack(errors), nan=float("inf")).max().to(device)
    if several_processes():
        dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst)


def _print(variant: str, timing: Timing, cell: dict[str, Any]) -> None:
    limits, differs = cell["limits"], f"differs {cell['errors'][variant]:.1e}"
    if not limits["limit"]:
        _say(f"  {variant:<24} {differs}")  # without a GPU nothing is timed
        return
    share = (timing.forward / max(limits["limit"], 1e-9), timing.both / max(limits["limit_both"], 1e-9))
    _say(
        f"  {variant:<24} fwd {timing.forward:7.2f} (+-{timing.forward_spread:.2f}) {share[0]:5.2f}x limit   "
        f"fwd+bwd {timing.both:7.2f} (+-{timing.both_spread:.2f}) {share[1]:5.2f}x limit   "
        f"{differs}",
    )


def _say(text: str) -> None:
    """Print beside the progress bar, at once."""
    if is_first():
        tqdm.write(text)
        sys.stdout.flush()
