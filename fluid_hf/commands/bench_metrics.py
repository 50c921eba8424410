"""`fluid-hf bench metrics`: what the metrics cost: training steps without them, with them, and sampled, in turn."""

from __future__ import annotations

import argparse
import datetime
import json
import math
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
from fluid_hf.commands.arguments import DefaultsFormatter, add_json, positive, write_whole
from fluid_hf.config import FluidConfig
from fluid_hf.integrations.step_metrics import SAMPLE_EVERY, StepMetrics
from fluid_hf.patching import patch_model

WARM_UP = 2
KINDS = ("plain", "counted", "sampled")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "metrics",
        help="time what the metrics cost",
        description="Times training steps (forward and backward) of a slice of a model without the metrics, with them, "
        "and with the exchanges sampled, in turn, and the reading at a log; and reckons what a step costs more. On one "
        "GPU's mirror link; under torchrun on its ranks, where the loads are also gathered.",
        formatter_class=DefaultsFormatter,
    )
    add = parser.add_argument
    add("--model", default="qwen3-30b-a3b", choices=sorted(MODELS), help="sizes of the layers")
    add("--ep", type=positive, default=8, help="expert parallel size of the mirror link")
    add("--layers", type=positive, default=4, help="decoder layers")
    add("--batch", type=positive, default=2, help="sequences per rank")
    add("--sequence", type=positive, default=4096, help="tokens of a sequence")
    add("--waves", type=positive, help="waves of each exchange (the planner's choice if not given)")
    add("--logging-steps", type=positive, default=10, help="steps between two logs")
    add("--repeats", type=positive, default=40, help="steps to time of each kind")
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
        times: dict[str, list[float]] = {name: [] for name in (*KINDS, "collect")}
        for index in tqdm(range(options.repeats + WARM_UP), leave=False, disable=None if is_first() else True):
            found = _one_round(index, step, metrics, device)
            if metrics.steps >= options.logging_steps:
                # The Trainer waits for the device at a log anyway, for the loss: what is read then is timed by itself.
                # A sample is read with the counts of all steps, each time; in training not more often than one is made.
                found["collect"] = _seconds(lambda: metrics.collect(), device)
            for name, seconds in found.items() if index >= WARM_UP else ():
                times[name].append(seconds * 1e3)
        if not times["collect"]:
            times["collect"].append(_seconds(lambda: metrics.collect(), device) * 1e3)
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


def _one_round(index: int, step: Callable[[], None], metrics: StepMetrics, device: torch.device) -> dict[str, float]:
    """Seconds of a step of each kind.

    Which comes first changes from round to round: a machine that gets slower or faster favours none.
    """

    def plain() -> None:
        metrics.fluid.count(False)
        step()
        metrics.fluid.count(True)

    def measured() -> None:
        metrics.begin_step()
        step()
        metrics.end_step()

    found = {}
    for turn in range(len(KINDS)):
        name = KINDS[(index + turn) % len(KINDS)]
        metrics.sample_next(name == "sampled")
        found[name] = _seconds(plain if name == "plain" else measured, device)
    return found


def _report(options: argparse.Namespace, link: str, times: dict[str, list[float]], device: torch.device) -> None:
    plain, collect = (statistics.median(times[name]) for name in ("plain", "collect"))
    counted, sampled = ([a - b for a, b in zip(times[name], times["plain"], strict=True)] for name in KINDS[1:])
    shares = {"counting": 1.0, "sampling": 1.0 / max(SAMPLE_EVERY, options.logging_steps)}
    more = {"counting": counted, "sampling": [a - b for a, b in zip(sampled, counted, strict=True)]}
    costs = {name: shares[name] * statistics.median(values) / plain for name, values in more.items()}
    costs["reading"] = collect / options.logging_steps / plain
    error = sum((shares[name] * _error(values) / plain) ** 2 for name, values in more.items()) ** 0.5
    report = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "link": link,
        "ranks": dist.get_world_size() if dist.is_initialized() else 1,
        "command": vars(options),
        "step_ms": {name: statistics.median(times[name]) for name in KINDS},
        "collect_ms": collect,
        "sample_every": round(1 / shares["sampling"]),
        "cost_of_a_step": sum(costs.values()),
        "standard_error": error if math.isfinite(error) else None,
        "costs": costs,
    }
    print(
        f"{options.model}, {options.layers} layers, EP{report['ranks']}: a step {plain:.2f} ms; the metrics cost "
        f"{report['cost_of_a_step']:+.2%} of it (standard error {error:.2%}): reading {collect:.2f} ms every "
        f"{options.logging_steps} steps {costs['reading']:.2%}, one sampled step in {report['sample_every']} "
        f"{costs['sampling']:+.2%}, the rest {costs['counting']:+.2%}"
    )
    if options.json:
        write_whole(options.json, json.dumps(report, indent=1))


def _error(values: list[float]) -> float:
    """Standard error of the median, from the quartiles: 1.25 times that of the mean of a normal distribution."""
    if len(values) < 2:
        return float("inf")
    low, _, high = statistics.quantiles(values, n=4)
    return float(1.25 * (high - low) / 1.349 / len(values) ** 0.5)


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin
