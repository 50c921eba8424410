"""`fluid-hf doctor`: what is installed, set and connected here, what is wrong with it, and the fix."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from fluid_hf.commands import doctor_parity, doctor_ranks
from fluid_hf.commands.arguments import add_json, not_negative, positive_number, write_whole
from fluid_hf.commands.doctor_checks import CHECKS, Finding

SIGNS = {"ok": " ", "warning": "!", "error": "X"}


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "doctor",
        help="check this machine: versions, GPUs, links, settings",
        description="Checks this machine and says what is wrong and how to fix it. Exit status: 0 if training can run "
        "(there may be warnings, marked !), 1 if something will not work (marked X). Under torchrun, on all its "
        "ranks: also whether they agree, the speed of the link between every two, and the layer split over them.",
    )
    add_json(parser, "findings")
    parser.add_argument(
        "--parity",
        action="store_true",
        help="instead, train tiny models in every pair of settings and compare with one process; under torchrun for "
        "several ranks (minutes)",
    )
    parser.add_argument(
        "--fixed", nargs="*", default=[], metavar="NAME=VALUE", help="--parity with these settings only"
    )
    parser.add_argument("--quick", action="store_true", help="--parity with every value of every setting once")
    parser.add_argument("--seconds", type=not_negative, help="--parity starts no more cells after so long")
    parser.add_argument(
        "--timeout", type=positive_number, default=120.0, help="seconds a rank waits for others (default: 120)"
    )
    parser.add_argument("--skip", nargs="+", default=[], choices=list(CHECKS), help="checks to leave out")
    return parser


def run(options: argparse.Namespace) -> int:
    """Run the checks and report."""
    if options.parity:
        return doctor_parity.run(options)
    if doctor_ranks.runs_on_ranks():
        report = doctor_ranks.examine(options.skip, options.timeout)
    else:
        report = {}
        for name in tqdm([name for name in CHECKS if name not in options.skip], leave=False, disable=None):
            report[name] = CHECKS[name]()
    if int(os.environ.get("RANK", "0")) == 0:
        _write(report, options.json)
    return int(any(finding.level == "error" for found in report.values() for finding in found))


def _write(report: dict[str, list[Finding]], target: str | None) -> None:
    text = json.dumps({name: [asdict(finding) for finding in found] for name, found in report.items()}, indent=1)
    if target and target != "-":
        write_whole(target, text)
    if target == "-":
        print(text)
    else:
        _print(report)


def _print(report: dict[str, list[Finding]]) -> None:
    for name, findings in report.items():
        if findings:
            print(name)
        for finding in findings:
            print(f" {SIGNS[finding.level]} {finding.name:<28} {finding.value}")
            if finding.problem:
                print(f"   {'':<28} {finding.problem}" + (f"; fix: {finding.fix}" if finding.fix else ""))
    counts = [sum(f.level == level for found in report.values() for f in found) for level in ("error", "warning")]
    print(f"\n{counts[0]} errors, {counts[1]} warnings")
