"""`fluid-hf bench WHAT`: benchmarks, one module `bench_<what>.py` each."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fluid_hf.commands import bench_attention, bench_layer, bench_metrics, bench_model, bench_table, bench_train

BENCHMARKS: dict[str, Any] = {
    "layer": bench_layer,
    "attention": bench_attention,
    "model": bench_model,
    "train": bench_train,
    "metrics": bench_metrics,
    "table": bench_table,
}


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command and its benchmarks."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench", help="time a layer, a slice of a model or its training beside DeepSpeed AutoEP and transformers"
    )
    benchmarks = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for benchmark in BENCHMARKS.values():
        benchmark.add_parser(benchmarks)
    return parser


def run(options: argparse.Namespace) -> int:
    """Run the chosen benchmark."""
    command: Callable[[argparse.Namespace], int] = BENCHMARKS[options.what].run
    if options.json != "-" or options.what == "table":
        return command(options)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        options.json = str(Path(folder) / "results.json")
        status = command(options)
        text = Path(options.json).read_text(encoding="utf-8") if Path(options.json).exists() else ""
    if text:  # only the first rank has one
        print(text)
    return status
