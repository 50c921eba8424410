"""`fluid-hf bench attention`: one sequence-parallel attention layer beside DeepSpeed's UlyssesSPAttentionHF."""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import sys
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from fluid_hf.attention.planner import choose_head_chunks
from fluid_hf.bench.attention import AttentionBench
from fluid_hf.bench.attention_peers import ATTENTION_SHAPES
from fluid_hf.bench.attention_report import attention_table
from fluid_hf.bench.links import link_world
from fluid_hf.bench.report import limits_text
from fluid_hf.bench.sequence_memory import MEMORY_MODELS, measure_step, memory_table
from fluid_hf.commands.arguments import DefaultsFormatter, add_json, positive, write_whole
from fluid_hf.errors import ConfigError, TraceError
from fluid_hf.profiling.breakdown import breakdown, breakdown_text, record

ALLOWED = {torch.bfloat16: 3e-2, torch.float32: 1e-5}  # relative difference between variants


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "attention",
        help="time one sequence-parallel attention layer beside DeepSpeed's",
        formatter_class=DefaultsFormatter,
    )
    add = parser.add_argument
    shapes = ["mixtral-8x7b", "qwen3-30b-a3b"]
    add("--shapes", nargs="+", default=shapes, choices=sorted(ATTENTION_SHAPES), help="models by name")
    add("--memory", action="store_true", help="measure what a small model's training step holds instead of timing")
    add("--model", default="small", choices=sorted(MEMORY_MODELS), help="with --memory")
    add(
        "--sp",
        nargs="+",
        type=positive,
        help="sizes of the group, 1 for the layer alone: 2 8; with --memory 1 2 4 8",
    )
    add("--tokens", nargs="+", type=positive, default=[8192, 32768], help="tokens of the whole sequence")
    add("--chunks", nargs="+", type=positive, default=[1, 2, 3], help="chunks of heads to time beside the one planned")
    add("--layers", type=positive, default=4, help="calls in a row; times are per call")
    add("--repeats", type=positive, default=20, help="timed runs of each variant")
    add("--variants", nargs="+", help="only variants whose name contains one of these")
    add("--report", action="store_true", help="also say where the time goes, from a timeline of ours")
    add_json(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    """Time every shape on every group size; print and write results as they come. 1 if variants disagree."""
    cells: list[dict[str, Any]] = []
    if options.memory:
        return _memory(options, cells)
    if not torch.cuda.is_available():
        print("no GPU: times say nothing; --shapes tiny --tokens 64 compares the variants at once", file=sys.stderr)
    for sp_size in options.sp or [2, 8]:
        _bench(options, sp_size, cells)
    if not cells:
        heads = {name: ATTENTION_SHAPES[name].heads for name in options.shapes}
        raise ConfigError(f"--sp ({options.sp}) must divide --tokens ({options.tokens}) and the heads ({heads}).")
    # When all is timed: what traces a GPU stays in the process, and can make later launches take the host longer.
    for sp_size in options.sp or [2, 8] if options.report else []:
        _report_all(options, sp_size, cells)
    print("\n" + attention_table(_write(options, "attention", cells)))
    return int(any(isinstance(error, str) for cell in cells for error in cell["errors"].values()))


def _memory(options: argparse.Namespace, cells: list[dict[str, Any]]) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for tokens in options.tokens:
        for sp_size in options.sp or [1, 2, 4, 8]:
            cells.append(asdict(measure_step(options.model, sp_size, tokens, device)))
            print({name: round(n, 1) if isinstance(n, float) else n for name, n in cells[-1].items()}, flush=True)
            _write(options, "memory", cells)
    print("\n" + memory_table({"cells": cells}))
    return 0


def _write(options: argparse.Namespace, what: str, cells: list[dict[str, Any]]) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    report: dict[str, Any] = {"what": what, "device": device, "torch": torch.__version__}
    report |= {"date": datetime.date.today().isoformat(), "command": vars(options), "link": "mirror", "cells": cells}
    if options.json:
        write_whole(options.json, json.dumps(report, indent=1))
    return report


def _bench(options: Any, sp_size: int, cells: list[dict[str, Any]]) -> None:
    with link_world("mirror", sp_size) as device:
        for name, tokens in itertools.product(options.shapes, options.tokens):
            if ATTENTION_SHAPES[name].heads % sp_size == 0 and tokens % sp_size == 0:
                cells.append(_cell(options, _attention_bench(options, name, sp_size, tokens, device), name))
                _write(options, "attention", cells)


def _attention_bench(options: Any, name: str, sp_size: int, tokens: int, device: torch.device) -> AttentionBench:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return AttentionBench(ATTENTION_SHAPES[name], sp_size, tokens, device, dtype=dtype, layers=options.layers)


def _report_all(options: Any, sp_size: int, cells: list[dict[str, Any]]) -> None:
    """Where the time goes in serial and in the planned chunks, of every cell of that size."""
    with link_world("mirror", sp_size) as device:
        for cell in [cell for cell in cells if cell["sp_size"] == sp_size and sp_size > 1]:
            bench = _attention_bench(options, cell["shape"], sp_size, cell["tokens"], device)
            for variant, build in bench.variants([cell["planned_chunks"]]).items():
                if variant in cell["variants"] and not variant.startswith("Ulysses"):
                    _say(f"\n{cell['shape']} SP{sp_size} T={bench.tokens} {variant}")
                    cell["report"][variant] = _report(bench, [build() for _ in range(bench.layers)])
            _write(options, "attention", cells)


def _report(bench: AttentionBench, stack: list[Any]) -> dict[str, Any]:
    """By the timeline of one run of each pass; none of a pass that the trace does not hold whole."""
    found = {}
    for name, go in bench.passes(stack).items():
        try:
            found[name] = breakdown(*record(go), calls=len(stack))
        except TraceError as error:  # the times are what was asked for
            _say(f"    no report: {error}")
        else:
            _say(f"    {name:<8} {breakdown_text(found[name])}")
    return found


def _cell(options: Any, bench: AttentionBench, name: str) -> dict[str, Any]:
    planned = len(bench.layout.chunks(choose_head_chunks(bench.bytes_sent(), bench.sp_size, bench.exchange.speed)))
    chunks = sorted({planned, *(len(bench.layout.chunks(count)) for count in options.chunks)})
    cell: dict[str, Any] = {"shape": name, "sp_size": bench.sp_size, "tokens": bench.tokens, "layers": bench.layers}
    cell |= {"planned_chunks": planned, "bytes_sent": bench.bytes_sent() if bench.sp_size > 1 else 0}
    cell |= {"limits": bench.limits(options.repeats), "variants": {}, "errors": {}, "report": {}}
    _say(f"\n{name} SP{bench.sp_size} T={bench.tokens} planned chunks {planned} {limits_text(cell['limits'])}")
    reference: dict[str, torch.Tensor] = {}
    for variant, build in tqdm(bench.variants(chunks).items(), leave=False, disable=None):
        if options.variants and not any(part in variant for part in options.variants):
            continue
        try:
            stack = [build() for _ in range(bench.layers)]
            found = bench.gradients(*stack[0])
            reference = reference or found
            worst = max((_difference(found[key], reference[key]), key) for key in reference)
            cell["errors"][variant] = worst[0]
            if not worst[0] <= ALLOWED[bench.dtype]:
                cell["errors"][variant] = f"{worst[1]} differs by {worst[0]:.1e}"
                _say(f"  {variant:<24} {cell['errors'][variant]}")
                continue
            timing = asdict(bench.time(stack, options.repeats))
            cell["variants"][variant] = timing
            _print(variant, timing, cell)
            del stack
        except Exception as error:
            cell["errors"][variant] = f"{type(error).__name__}: {error}"[:300]
            _say(f"  {variant:<24} {cell['errors'][variant]}")
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    return cell


def _difference(found: torch.Tensor, reference: torch.Tensor) -> float:
    return float((found.float() - reference.float()).norm() / reference.float().norm().clamp(min=1e-12))


def _print(variant: str, timing: dict[str, float], cell: dict[str, Any]) -> None:
    parts, differs = [], f"differs {cell['errors'][variant]:.1e}"
    if not cell["limits"]["limit"]:
        _say(f"  {variant:<24} {differs}")  # without a GPU nothing is timed
        return
    for label, key, limit in (("fwd", "forward", "limit"), ("fwd+bwd", "both", "limit_both")):
        share = timing[key] / max(cell["limits"][limit], 1e-9)
        spread, host = timing[f"{key}_spread"], timing[f"host_{key}"]
        parts.append(f"{label} {timing[key]:7.3f} (+-{spread:.3f}) {share:5.2f}x limit, host {host:.3f}")
    parts.append(f"peak {timing['peak_mib']:.0f} MiB   {differs}")
    _say(f"  {variant:<24} {'   '.join(parts)}")


def _say(text: str) -> None:
    """Print beside the progress bar, at once."""
    tqdm.write(text)
    sys.stdout.flush()
