"""`fluid-hf profile`: what is hidden and what is exposed, as a picture and as numbers."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fluid_hf.bench.shapes import SHAPES
from fluid_hf.commands.arguments import add_json, positive, write_whole
from fluid_hf.errors import ConfigError, MissingPackageError, TraceError
from fluid_hf.profiling.layer_run import LayerRun
from fluid_hf.profiling.picture import check_pictures
from fluid_hf.profiling.session import draw_traces
from fluid_hf.profiling.timeline import summarize
from fluid_hf.profiling.trace import Trace, read_trace

DESCRIPTION = """Traces one layer's forward and backward pass, serial and overlapped, and draws both under each other,
of five passes the one of median length; or, with --from, draws a trace made anywhere by FluidCallback or
torch.profiler.

Writes OUT.png, OUT.svg and OUT.json; without --from also OUT_overlapped.json.gz, for https://ui.perfetto.dev. Pictures
need matplotlib; with --json it does without."""

KEPT = ("none", "overlapped", "both")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "profile",
        help="draw what is hidden and what is exposed",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--from", dest="trace", metavar="TRACE", help="a Chrome trace of a step with a patched model (.json, .json.gz)")
    add("--before", metavar="TRACE", help="with --from: a second trace to draw above it, for comparison")
    add("--layer", help="with --from: name of the layer to draw (default: the one in the middle)")
    add("--out", default="fluid_profile/timeline", help="files to write, without ending (default: %(default)s)")
    add("--title", default="", help="title of the picture")
    add_json(parser, "numbers of the picture", "the short text")
    add("--shape", default="small", choices=sorted(SHAPES), help="sizes of the layer to run (default: %(default)s)")
    add("--ep", type=positive, default=2, help="ranks: CPU or GPU processes, or one GPU's mirror link (default: 2)")
    add("--tokens", type=positive, help="tokens per rank (default: 8192 on GPUs, 512 on CPUs)")
    add("--waves", type=positive, help="waves of the overlapped layer (default: the planner's choice)")
    add(
        "--traces", default="overlapped", choices=KEPT, help="traces to keep of a layer run here (default: %(default)s)"
    )
    return parser


def run(options: argparse.Namespace) -> int:
    """Trace if there is no trace yet, draw, and write the summary."""
    _check(options)
    draws = _draws(options)
    title = options.title
    paths: list[tuple[str, str | Path]]
    if options.trace:
        paths = ([("before", options.before), ("after", options.trace)]) if options.before else [("", options.trace)]
    else:
        paths, where = _trace_layer(options)
        title = title or where
    traces = [(name, read_trace(path)) for name, path in tqdm(paths, desc="reading", leave=False, disable=None)]
    kept = [] if options.trace else _check_and_clear(options, paths, traces)
    summaries = {name or "trace": summarize(trace) for name, trace in traces}
    text = json.dumps(summaries if len(summaries) > 1 else summaries["trace"], indent=1)
    numbers = Path(f"{options.out}.json")
    numbers.parent.mkdir(parents=True, exist_ok=True)
    numbers.write_text(text, encoding="utf-8")
    if options.json and options.json != "-":
        write_whole(options.json, text)
    pictures = draw_traces(traces, options.out, layer=options.layer, title=title) if draws else []
    if options.json == "-":
        print(text)
        return 0
    for name, summary in summaries.items():
        # The picture shows one of these passes, so its numbers are smaller.
        passes = sum(layer[way]["calls"] for layer in summary["layers"].values() for way in ("forward", "backward"))
        print(
            f"{name:<11} {passes} passes: communication {summary['communication_ms']:.2f} ms, "
            f"exposed {summary['exposed_ms']:.2f} ms, {summary['overlap_ratio']:.0%} hidden; "
            f"weight gradients {summary['wgrad_in_windows']:.0%} in windows; "
            f"{summary['bytes_sent'] / 1e6:.2f} MB sent"
        )
    print("wrote " + ", ".join(str(path) for path in [*pictures, numbers, *kept]))
    return 0


def _check(options: argparse.Namespace) -> None:
    """Before anything runs.

    Raises:
        ConfigError: options that do not fit each other or the layer.
    """
    if not options.trace and (options.before or options.layer):
        raise ConfigError("--before and --layer must come with --from, which names the trace to draw.")
    experts = SHAPES[options.shape].experts
    if options.ep < 2 or experts % options.ep:
        raise ConfigError(
            f"--ep ({options.ep}) must be at least 2 and divide the experts of {options.shape} ({experts})."
        )


def _draws(options: argparse.Namespace) -> bool:
    """Whether there will be pictures; who asks for the numbers by `--json` gets them without.

    Raises:
        MissingPackageError: only pictures are asked for, and matplotlib is not installed.
    """
    try:
        check_pictures()
    except MissingPackageError as error:
        if not options.json:
            raise
        print(f"no picture: {error}", file=sys.stderr)
        return False
    return True


def _trace_layer(options: argparse.Namespace) -> tuple[list[tuple[str, str | Path]], str]:
    """Run the layer; its traces by name, and what was run."""
    tokens = options.tokens or (8192 if torch.cuda.is_available() else 512)
    layer_run = LayerRun(options.shape, options.ep, tokens, options.waves, Path(options.out))
    found = layer_run.run()
    where = f"{options.shape}, EP{options.ep}, {tokens} tokens per rank, {layer_run.link}"
    return [("overlapped" if overlap else "serial", path) for overlap, path in found.items()], where


def _check_and_clear(
    options: argparse.Namespace, paths: list[tuple[str, str | Path]], traces: list[tuple[str, Trace]]
) -> list[Path]:
    """Only the traces asked for stay; which those are.

    Raises:
        TraceError: the profiler saw nothing of the GPU.
    """
    for name, path in paths:
        if options.traces not in (name, "both"):
            Path(path).unlink()
    if torch.cuda.is_available() and not all(trace.on_gpu for _, trace in traces):
        raise TraceError(
            "trace of the layer must hold work of the GPU, has none; another profiler may be running, or this user may "
            "not read the GPU's counters (NVreg_RestrictProfilingToAdminUsers)."
        )
    return [Path(path) for _, path in paths if Path(path).exists()]
