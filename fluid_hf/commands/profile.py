"""`fluid-hf profile`: what is hidden and what is exposed, as a picture and as numbers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fluid_hf.bench.shapes import SHAPES
from fluid_hf.profiling.layer_run import LayerRun
from fluid_hf.profiling.session import draw_traces
from fluid_hf.profiling.timeline import summarize
from fluid_hf.profiling.trace import read_trace

DESCRIPTION = """Traces one layer's forward and backward pass, serial and overlapped, and draws both under each other,
of five passes the one of median length; or, with --from, draws a trace made anywhere by FluidCallback or
torch.profiler.

Writes OUT.png, OUT.svg and OUT.json; without --from also the two traces, for https://ui.perfetto.dev."""


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
    add("--json", metavar="FILE", help="also write the summary here; `-` prints it instead of the short text")
    add("--shape", default="small", choices=sorted(SHAPES), help="sizes of the layer to run (default: %(default)s)")
    add("--ep", type=int, default=2, help="ranks: CPU or GPU processes, or one GPU's mirror link (default: 2)")
    add("--tokens", type=int, default=2048, help="tokens per rank (default: %(default)s)")
    add("--waves", type=int, help="waves of the overlapped layer (default: the planner's choice)")
    return parser


def run(options: argparse.Namespace) -> int:
    """Trace if there is no trace yet, draw, and write the summary."""
    title = options.title
    if options.trace:
        paths = ([("before", options.before), ("after", options.trace)]) if options.before else [("", options.trace)]
    else:
        layer_run = LayerRun(options.shape, options.ep, options.tokens, options.waves, Path(options.out).parent)
        title = title or f"{options.shape}, EP{options.ep}, {options.tokens} tokens per rank, {layer_run.link}"
        with tqdm(total=1, desc="tracing", leave=False, disable=None) as bar:
            found = layer_run.run()
            bar.update()
        paths = [("overlapped" if overlap else "serial", path) for overlap, path in found.items()]
    traces = [(name, read_trace(path)) for name, path in tqdm(paths, desc="reading", leave=False, disable=None)]
    summaries = {name or "trace": summarize(trace) for name, trace in traces}
    text = json.dumps(summaries if len(summaries) > 1 else summaries["trace"], indent=1)
    numbers = Path(f"{options.out}.json")
    numbers.parent.mkdir(parents=True, exist_ok=True)
    numbers.write_text(text, encoding="utf-8")
    if options.json and options.json != "-":
        Path(options.json).write_text(text, encoding="utf-8")
    pictures = draw_traces(traces, options.out, layer=options.layer, title=title)
    if options.json == "-":
        print(text)
        return 0
    for name, summary in summaries.items():
        print(
            f"{name:<11} communication {summary['communication_ms']:.2f} ms, exposed {summary['exposed_ms']:.2f} ms, "
            f"{summary['overlap_ratio']:.0%} hidden; weight gradients {summary['wgrad_in_windows']:.0%} in windows; "
            f"{summary['bytes_sent'] / 1e6:.2f} MB sent"
        )
    print("wrote " + ", ".join(str(path) for path in [*pictures, numbers]))
    return 0
