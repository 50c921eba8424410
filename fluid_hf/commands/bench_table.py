"""`fluid-hf bench table`: results of `fluid-hf bench layer`, `attention`, `model` or `train` as a table in Markdown."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fluid_hf.bench.attention_report import attention_table
from fluid_hf.bench.model_report import draw_pictures, model_table
from fluid_hf.bench.report import markdown_table
from fluid_hf.bench.sequence_memory import memory_table
from fluid_hf.bench.train_report import train_table
from fluid_hf.errors import ConfigError

TABLES = {"attention": attention_table, "memory": memory_table, "model": model_table, "train": train_table}


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser("table", help="print results of a benchmark as a table")
    parser.add_argument("--json", required=True, metavar="FILE", help="file with the results to print")
    parser.add_argument("--pictures", help="folder for the timelines in results of `bench model --trace`")
    return parser


def run(options: argparse.Namespace) -> int:
    """Print the table.

    Raises:
        ConfigError: the file holds no results.
    """
    report = _read(options.json)
    print(TABLES.get(str(report.get("what")), markdown_table)(report))
    if options.pictures:
        for cell in report["cells"]:
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
