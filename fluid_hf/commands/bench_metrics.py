"""`fluid-hf bench metrics`: what the metrics cost, on one GPU's mirror link (on a CPU it only shows that they work)."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from fluid_hf.bench.mirror import init_mirror
from fluid_hf.bench.shapes import SHAPES
from fluid_hf.integrations.step_metrics import SAMPLE_EVERY
from fluid_hf.metrics import read_loads
from fluid_hf.moe.layer import ExpertParallelExperts
from fluid_hf.overlap.sampler import OverlapSampler


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "metrics", help="time what the metrics cost", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--shape", default="qwen3-30b-a3b", choices=sorted(SHAPES), help="sizes of the layers")
    add("--ep", type=int, default=8, help="expert parallel size of the mirror link")
    add("--layers", type=int, default=8, help="layers of a step")
    add("--tokens", type=int, default=8192, help="tokens per rank")
    add("--waves", type=int, default=4, help="waves of each exchange")
    add("--repeats", type=int, default=20, help="timed steps of each kind, in turn")
    add("--logging-steps", type=int, default=10, help="steps between logs, at which loads are read")
    add("--json", help="file for the results")
    return parser


def run(options: argparse.Namespace) -> int:
    """Time steps with and without sampling, and the reading of the loads."""
    init_mirror(options.ep)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stack, step = _build(options, device)
    times: dict[str, list[float]] = {"plain": [], "sampled": [], "read": []}
    for repeat in tqdm(range(options.repeats + 3), leave=False, disable=None):
        found = _one_repeat(stack, step, device)
        if repeat >= 3:  # the first ones warm up
            for name, seconds in found.items():
                times[name].append(seconds * 1e3)
    plain, sampled, read = (statistics.median(times[name]) for name in ("plain", "sampled", "read"))
    cost = (sampled - plain) / SAMPLE_EVERY + read / options.logging_steps
    report = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "command": vars(options),
        "step_ms": plain,
        "sampled_step_ms": sampled,
        "read_loads_ms": read,
        "cost_of_a_step": cost / plain,
    }
    print(
        f"{options.layers} layers, a step {plain:.2f} ms, sampled {sampled:.2f} ms (one in {SAMPLE_EVERY}), loads read "
        f"in {read:.2f} ms (one step in {options.logging_steps}): {cost / plain:+.2%} of a step"
    )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    dist.destroy_process_group()
    return 0


def _one_repeat(stack: list[ExpertParallelExperts], step: Any, device: torch.device) -> dict[str, float]:
    found = {}
    for name in ("plain", "sampled"):
        sampler = OverlapSampler(device) if name == "sampled" else None
        for layer in stack:
            layer.context.exchange.sampler = sampler
        found[name] = _seconds(step, device)
        if sampler is not None:
            found[name] += _seconds(sampler.result, device)
    found["read"] = _seconds(lambda: read_loads({str(index): layer for index, layer in enumerate(stack)}), device)
    for layer in stack:
        layer.context.stats.reset()
    return found


def _build(options: argparse.Namespace, device: torch.device) -> tuple[list[ExpertParallelExperts], Any]:
    shape = SHAPES[options.shape]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    sizes = (shape.experts, shape.hidden, shape.inner)
    stack = [
        ExpertParallelExperts(*sizes, group=dist.group.WORLD, waves=options.waves, device=device, dtype=dtype)
        for _ in range(options.layers)
    ]
    hidden = torch.randn(options.tokens, shape.hidden, device=device, dtype=dtype)
    weights, index = torch.rand(options.tokens, shape.experts, device=device).topk(shape.top_k)
    weights = (weights / weights.sum(1, keepdim=True)).to(dtype)

    def step() -> None:
        value = hidden.detach().requires_grad_()
        for layer in stack:
            value = layer(value, index, weights)
        value.backward(hidden)
        for layer in stack:
            layer.zero_grad(set_to_none=True)

    return stack, step


def _seconds(function: Any, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin
