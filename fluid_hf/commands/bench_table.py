"""`fluid-hf bench table`: results of `fluid-hf bench layer`, `attention`, `model` or `train` as a table in Markdown."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fluid_hf.bench.attention_report import attention_table
from fluid_hf.bench.model_report import draw_pictures, join_reports, model_table
from fluid_hf.bench.report import markdown_table
from fluid_hf.bench.sequence_memory import memory_table
from fluid_hf.bench.train_report import train_table
from fluid_hf.errors import ConfigError

TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "layer": markdown_table,
    "attention": attention_table,
    "memory": memory_table,
    "model": model_table,
    "train": train_table,
}


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser("table", help="print results of a benchmark as a table")
    text = "files with the results to print; of `bench model` several, as of several links, in one table"
    parser.add_argument("--json", required=True, nargs="+", metavar="FILE", help=text)
    parser.add_argument("--pictures", help="folder for the timelines in results of `bench model --trace`")
    return parser


def run(options: argparse.Namespace) -> int:
    """Print the table.

    Raises:
        ConfigError: a file holds no results, or others; there is nothing to draw.
        MissingPackageError: pictures are asked for, and matplotlib is not installed; the table is printed before.
    """
    names = ", ".join(options.json)
    reports = [_read(name) for name in options.json]
    kinds = [str(report.get("what", "layer")) for report in reports]  # `bench layer` writes no name
    kind = kinds[0]
    if kind not in TABLES:
        raise ConfigError(f"--json ({names}) must hold results of {', '.join(TABLES)}, holds those of {kind!r}.")
    if len(reports) > 1 and set(kinds) != {"model"}:
        raise ConfigError(f"--json ({names}) must be one file, or several of `bench model`; holds those of {kinds}.")
    report = join_reports(reports) if kind == "model" else reports[0]
    try:
        text = TABLES[kind](report)
        drawn = [cell for cell in report["cells"] if kind == "model" and cell["timeline"]]
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # cut, changed, or another tool's
        raise ConfigError(
            f"--json ({names}) must hold whole results of `bench {kind}`: no table can be made of them "
            f"({type(error).__name__}: {error})."
        ) from error
    if options.pictures and not drawn:
        raise ConfigError(
            f"--pictures must come with results of `bench model --trace`: --json ({names}) holds those of "
            f"`bench {kind}`, without timelines."
        )
    print(text)
    for cell in drawn if options.pictures else ():
        draw_pictures(cell, options.pictures)
    return 0


def _read(path: str) -> dict[str, Any]:
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        assert isinstance(report["cells"], list)
    except (OSError, ValueError, LookupError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"--json ({path}) must be a file that `fluid-hf bench` (layer, attention, model or train) wrote with its "
            f"--json ({type(error).__name__}: {error})."
        ) from error
    found: dict[str, Any] = report
    return found
