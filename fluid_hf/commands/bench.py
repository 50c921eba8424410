"""`fluid-hf bench WHAT`: benchmarks, one module `bench_<what>.py` each."""

from __future__ import annotations

import argparse
from typing import Any

from fluid_hf.commands import bench_attention, bench_layer, bench_metrics, bench_model, bench_table

BENCHMARKS: dict[str, Any] = {
    "layer": bench_layer,
    "attention": bench_attention,
    "model": bench_model,
    "metrics": bench_metrics,
    "table": bench_table,
}


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command and its benchmarks."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench", help="time a layer or a slice of a model beside DeepSpeed AutoEP and transformers"
    )
    benchmarks = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for benchmark in BENCHMARKS.values():
        benchmark.add_parser(benchmarks)
    return parser


def run(options: argparse.Namespace) -> int:
    """Run the chosen benchmark."""
    status: int = BENCHMARKS[options.what].run(options)
    return status
