"""`fluid-hf bench metrics`: what the metrics cost: training steps with and without them, in turn."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from fluid_hf.bench.links import is_first, link_world
from fluid_hf.bench.model import MODELS, ModelBench, ModelSlice
from fluid_hf.commands.arguments import add_json, positive, write_whole
from fluid_hf.config import FluidConfig
from fluid_hf.integrations.step_metrics import StepMetrics
from fluid_hf.patching import patch_model

WARM_UP = 2


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "metrics",
        help="time what the metrics cost",
        description="Times training steps (forward and backward) of a slice of a model with and without the metrics, "
        "in turn. On one GPU's mirror link; under torchrun on its ranks, where the loads are also gathered.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="qwen3-30b-a3b", choices=sorted(MODELS), help="sizes of the layers")
    add("--ep", type=positive, default=8, help="expert parallel size of the mirror link")
    add("--layers", type=positive, default=4, help="decoder layers")
    add("--batch", type=positive, default=2, help="sequences per rank")
    add("--sequence", type=positive, default=4096, help="tokens of a sequence")
    add("--waves", type=positive, help="waves of each exchange (the planner's choice if not given)")
    add("--logging-steps", type=positive, default=10, help="steps between two logs")
    add("--repeats", type=positive, default=12, help="stretches of that many steps to time of each kind")
    add_json(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    """Time both kinds of steps; rank 0 prints and writes."""
    link = "mirror" if "RANK" not in os.environ else "nccl" if torch.cuda.is_available() else "gloo"
    with link_world(link, options.ep) as device:
        if device.type == "cpu" and is_first():
            print("no GPU: times say nothing; --model tiny --sequence 128 tries it at once", file=sys.stderr)
        model, step = _build(options, device)
        metrics = StepMetrics(model, model.fluid, None)  # type: ignore[arg-type]
        times: dict[str, list[float]] = {"plain": [], "measured": [], "collect": []}
        rounds = range(options.repeats + WARM_UP)
        for index in tqdm(rounds, leave=False, disable=None if is_first() else True):
            found = _one_round(options.logging_steps, step, metrics, device, plain_first=index % 2 == 0)
            if index >= WARM_UP:
                for name, seconds in found.items():
                    times[name].append(seconds * 1e3)
        metrics.close()
        if is_first():
            _report(options, link, times, device)
    return 0


def _build(options: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Callable[[], None]]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bench = ModelBench(ModelSlice(options.model, options.layers, options.batch, options.sequence), device, dtype)
    model = patch_model(bench.build(), FluidConfig(ep_size=bench.size, waves=options.waves))
    model.train()
    return model, bench.modes(model)["backward"]


def _one_round(
    steps: int, step: Callable[[], None], metrics: StepMetrics, device: torch.device, plain_first: bool
) -> dict[str, float]:
    """Seconds of a stretch of steps without the metrics, of one with them, and of the reading at its end.

    Which comes first alternates from round to round: a machine that gets slower or faster favours neither.
    """

    def plain() -> None:
        metrics.fluid.count(False)  # or the next reading would have these steps to read, too
        for _ in range(steps):
            step()
        metrics.fluid.count(True)

    def measured() -> None:
        for _ in range(steps):
            metrics.begin_step()
            step()
            metrics.end_step()

    found = {"plain": _seconds(plain, device)} if plain_first else {}
    found["measured"] = _seconds(measured, device)
    # The Trainer waits for the device at a log anyway, for the loss: what is read then is timed by itself.
    found["collect"] = _seconds(lambda: metrics.collect(), device)
    found["measured"] += found["collect"]
    return found if plain_first else found | {"plain": _seconds(plain, device)}


def _report(options: argparse.Namespace, link: str, times: dict[str, list[float]], device: torch.device) -> None:
    plain, collect = (statistics.median(times[name]) for name in ("plain", "collect"))
    costs = sorted((after - before) / before for before, after in zip(times["plain"], times["measured"], strict=True))
    quarter = len(costs) // 4
    cost, low, high = statistics.median(costs), costs[quarter], costs[-1 - quarter]
    report = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "link": link,
        "ranks": dist.get_world_size() if dist.is_initialized() else 1,
        "command": vars(options),
        "step_ms": plain / options.logging_steps,
        "collect_ms": collect,
        "cost_of_a_step": cost,
        "cost_quartiles": [low, high],
    }
    print(
        f"{options.model}, {options.layers} layers, EP{report['ranks']}: a step {report['step_ms']:.2f} ms; with the "
        f"metrics, read every {options.logging_steps} steps in {collect:.2f} ms, {cost:+.2%} "
        f"(quartiles {low:+.2%} to {high:+.2%})"
    )
    if options.json:
        write_whole(options.json, json.dumps(report, indent=1))


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin
