"""`fluid-hf bench table`: results of `fluid-hf bench layer` or `bench attention` as a table in Markdown."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fluid_hf.bench.attention_report import attention_table
from fluid_hf.bench.report import markdown_table


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser("table", help="print results of `bench layer` as a table")
    parser.add_argument("--json", required=True, help="file with the results to print")
    return parser


def run(options: argparse.Namespace) -> int:
    """Print the table."""
    report = json.loads(Path(options.json).read_text(encoding="utf-8"))
    print(attention_table(report) if report.get("what") == "attention" else markdown_table(report))
    return 0
