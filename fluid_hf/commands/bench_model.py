"""`fluid-hf bench model`: a slice of a model in every variant, on real ranks or on the mirror link."""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import os
from typing import Any

import torch
import torch.distributed as dist

from fluid_hf.bench.links import LINKS, is_first, link_world
from fluid_hf.bench.model import MODELS, ModelSlice
from fluid_hf.bench.model_run import RunSettings, SliceRun
from fluid_hf.bench.stages import Stages
from fluid_hf.commands.arguments import (
    DefaultsFormatter,
    add_json,
    engine_settings,
    not_negative,
    positive,
    positive_number,
    write_whole,
)
from fluid_hf.errors import ConfigError

MODES = ["inference", "forward", "backward", "step"]


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "model",
        help="time a slice of a model, under torchrun for several ranks",
        formatter_class=DefaultsFormatter,
    )
    add = parser.add_argument
    add("--models", nargs="+", default=["qwen3-30b-a3b"], choices=sorted(MODELS), help="models by name")
    add("--link", choices=LINKS, default="nccl", help="mirror: one process plays rank 0 of --ep")
    add("--ep", type=positive, default=2, help="expert parallel size on the mirror link; else the number of ranks")
    add(
        "--sp",
        nargs="+",
        type=positive,
        default=[1],
        help="ranks that share a sequence; they have --batch of them",
    )
    add("--layers", nargs="+", type=positive, default=[2], help="decoder layers of the slice")
    add("--batch", nargs="+", type=positive, default=[2], help="sequences per rank")
    add("--sequence", type=positive, default=4096, help="tokens of a sequence")
    add("--modes", nargs="+", choices=MODES, default=MODES[:3], help="step: with DeepSpeed ZeRO 1 and AdamW")
    add(
        "--deepspeed",
        type=engine_settings,
        default={},
        metavar="JSON",
        help="DeepSpeed settings for steps: text or file",
    )
    add("--repeats", type=positive, default=20, help="timed runs of each variant and mode")
    add("--variants", nargs="+", help="only variants whose name contains one of these")
    add(
        "--waves",
        nargs="+",
        type=positive,
        default=[],
        help="numbers of waves, in the smallest slice of each model",
    )
    add("--ctas", nargs="+", type=positive, default=[], help="nccl_max_ctas, in the smallest slice of each model")
    policies = ["off", "cross_layer"]
    add("--wgrad", nargs="+", choices=policies, default=[], help="policies, in the smallest slice likewise")
    add("--trace", help="folder for a picture of one pass of the smallest slices; the JSON gets its numbers")
    add("--budget", type=not_negative, help="seconds after which no slice or fixed setting is started")
    add(
        "--timeout",
        type=positive_number,
        default=300.0,
        help="seconds after which a collective that hangs ends the run",
    )
    add(
        "--stack-after",
        type=not_negative,
        default=60.0,
        help="seconds of one stage after which every rank shows its stacks, 0 for never",
    )
    add_json(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    """Time every slice, small ones first; rank 0 prints, and writes after each result. 1 if variants disagree."""
    if options.link == "mirror" and ("step" in options.modes or max(options.sp) > 1):
        raise ConfigError(
            f"link (mirror) must have no step among modes ({', '.join(options.modes)}), and sp ({max(options.sp)}) 1: "
            "one process plays all ranks; start real ones with torchrun and use nccl or gloo."
        )
    cells: list[dict[str, Any]] = []
    timed: list[SliceRun] = []
    with link_world(options.link, options.ep, options.timeout) as device:
        stages = Stages(device, options.budget, options.stack_after)
        for layers, sp, name in itertools.product(sorted(options.layers), options.sp, options.models):
            parts = [ModelSlice(name, layers, batch, options.sequence, sp) for batch in sorted(options.batch)]
            first = layers == min(options.layers)
            settings = RunSettings(
                options.modes,
                options.repeats,
                variants=options.variants or (),
                waves=options.waves if first else (),
                max_ctas=options.ctas if first else (),
                wgrad=options.wgrad if first else (),
                pictures=options.trace if first else None,
                timeout=options.timeout,
                deepspeed=options.deepspeed,
            )
            slices = SliceRun(parts, settings, stages, device, functools.partial(_write, options, device, cells))
            cells.extend(slices.cells)
            slices.run()
            timed.append(slices)
            _write(options, device, cells)
        for slices in timed:
            slices.trace()
            _write(options, device, cells)
    return int(any(str(error).startswith("differs") for cell in cells for error in cell["errors"].values()))


def _write(options: argparse.Namespace, device: torch.device, cells: list[dict[str, Any]]) -> None:
    if not options.json or not is_first():
        return
    about = {
        "what": "model",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "ranks": dist.get_world_size() if dist.is_initialized() else 1,
        "torch": torch.__version__,
        "nccl": list(torch.cuda.nccl.version()) if options.link == "nccl" else None,
        "nccl_p2p_disabled": os.environ.get("NCCL_P2P_DISABLE") == "1",  # recorded, as NCCL reads it
        "date": datetime.date.today().isoformat(),
    }
    report = {**about, "command": vars(options), "link": options.link, "cells": cells}
    write_whole(options.json, json.dumps(report, indent=1))
