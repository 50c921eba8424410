"""`fluid-hf doctor --parity`: do patched models train on this cluster as plain ones do in one process?"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import importlib.util
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from fluid_hf.bench.parity import CellResult
from fluid_hf.bench.parity import run as run_cells
from fluid_hf.bench.parity_cells import FACTORS, Cell, covering_cells
from fluid_hf.commands.arguments import write_whole
from fluid_hf.errors import ConfigError


def run(options: argparse.Namespace) -> int:
    """Train and compare every cell; 1 if one is wrong or fails."""
    fixed = read_settings(options.fixed)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_float32_matmul_precision("highest")  # an environment may ask for TF32, which is no float32
    first = int(os.environ.get("RANK", "0")) == 0
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if "RANK" in os.environ and not dist.is_initialized():
        timeout = datetime.timedelta(seconds=options.timeout)
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timeout)
    world = dist.get_world_size() if dist.is_initialized() else 1
    cells = covering_cells(world, strength=1 if options.quick else 2, fixed=fixed)
    if first and (missing := missing_peft(cells)):
        print(missing, file=sys.stderr, flush=True)

    done: list[CellResult] = []

    def report(result: CellResult) -> None:  # called on rank 0
        done.append(result)
        if options.json and options.json != "-":  # now: a run that is cut keeps what is finished
            write_whole(options.json, _as_json(done))
        if options.json != "-":
            print(f"{result.status:<12} {result.seconds:5.1f} s  {result.cell.name}  {result.detail}", flush=True)

    results = run_cells(cells, seconds=options.seconds, report=report)
    if first:
        counts = collections.Counter(result.status for result in results)
        text = _as_json(results)
        if options.json and options.json != "-":
            write_whole(options.json, text)
        summary = ", ".join(f"{count} {status}" for status, count in counts.items())
        print(text if options.json == "-" else f"\n{len(results)} of {len(cells)} cells on {world} ranks: {summary}")
    return int(not all(result.good for result in results))


def missing_peft(cells: Sequence[Cell]) -> str:
    """What to tell where cells need PEFT and it is not installed: they count as unavailable."""
    with_lora = sum(cell.trained.startswith("lora") for cell in cells)
    if not with_lora or importlib.util.find_spec("peft") is not None:
        return ""
    return f"{with_lora} of {len(cells)} cells train LoRA and will be unavailable: peft is missing; pip install peft"


def _as_json(results: list[CellResult]) -> str:
    return json.dumps([dataclasses.asdict(result) for result in results], indent=1)


def read_settings(pairs: list[str]) -> dict[str, Any]:
    """`NAME=VALUE` settings of the parity matrix.

    Raises:
        ConfigError: a name or a value is unknown; says which there are.
    """
    fixed = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in FACTORS:
            raise ConfigError(f"setting ({name!r}) must be one of {', '.join(FACTORS)}.")
        known = {str(value): value for value in FACTORS[name]}
        if text not in known:
            raise ConfigError(f"{name} ({text!r}) must be one of {', '.join(known)}.")
        fixed[name] = known[text]
    return fixed
