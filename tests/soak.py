"""Leaks: memory, threads, file descriptors and process groups over many steps and many patches.

python tests/soak.py                            2,000 steps, 100 times patch and unpatch, on two CPU ranks
python tests/soak.py --json FILE                the same, with what was measured
torchrun --nproc_per_node 2 tests/soak.py       the same on ranks that are started already (GPUs over NCCL)
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from families import batch, tiny_model

import fluid_hf
from fluid_hf import FluidConfig


def place() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def usage(model: Any = None) -> dict[str, int]:
    """What must stay constant, of this rank."""
    gc.collect()
    process = psutil.Process()
    groups = len(dist.distributed_c10d._world.pg_map) if dist.is_initialized() else 0
    found = {"rss": process.memory_info().rss, "threads": process.num_threads(), "groups": groups}
    found["descriptors"] = process.num_fds()
    found["gpu"] = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    found["in flight"] = len(model.fluid.exchange._in_flight) if model is not None else 0
    return found


def run_steps(rank: int, world: int, steps: int, warm_up: int) -> list[dict[str, int]]:
    """Usage after the warm-up and at the end of training steps with batches of many lengths."""
    device = place()
    model = fluid_hf.patch_model(tiny_model("qwen2_moe").to(device), FluidConfig(ep_size=world))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    seen = []
    for step in range(steps):
        ids = batch(rank, 1 + step % 3, length=6 + step % 5, step=step).to(device)
        model(input_ids=ids, labels=ids).loss.backward()
        model.fluid.finish_batch()
        model.fluid.reduce_gradients(model)
        model.fluid.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            model.fluid.metrics()
        if step + 1 in (warm_up, steps):
            seen.append(usage(model))
    fluid_hf.unpatch_model(model)
    return seen


def run_two_models(rank: int, world: int, steps: int, warm_up: int) -> list[dict[str, int]]:
    """Usage over steps of two patched models that take turns, with other settings and optimizers each."""
    settings: tuple[dict[str, Any], ...] = ({"ep_size": world}, {"ep_size": 1, "wgrad": "off"})
    models = [
        fluid_hf.patch_model(tiny_model(family).to(place()), FluidConfig(**options))
        for family, options in zip(("qwen3_moe", "mixtral"), settings, strict=True)
    ]
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in models]
    seen = []
    for step in range(steps):
        ids = batch(rank, 1 + step % 2, length=6 + step % 3, step=step).to(place())
        losses = [model(input_ids=ids, labels=ids).loss for model in models]  # both graphs are alive at once
        for loss, model, optimizer in zip(losses, models, optimizers, strict=True):
            loss.backward()
            model.fluid.finish_batch()
            model.fluid.reduce_gradients(model)
            optimizer.step()
            optimizer.zero_grad()
        if step + 1 in (warm_up, steps):
            seen.append(usage(models[0]))
    for model in models:
        fluid_hf.unpatch_model(model)
    return seen


def run_patches(rank: int, world: int, times: int, warm_up: int) -> list[dict[str, int]]:
    """Usage after the warm-up and at the end of patching, a step, and unpatching."""
    model = tiny_model("mixtral").to(place())
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ids = batch(rank, 2).to(place())
    seen = []
    for index in range(times):
        fluid_hf.patch_model(model, FluidConfig(ep_size=world))
        model(input_ids=ids, labels=ids).loss.backward()
        fluid_hf.unpatch_model(model)
        model.zero_grad()
        if index + 1 in (warm_up, times):
            seen.append(usage())
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    return seen


def growth(seen: list[dict[str, int]]) -> dict[str, int]:
    """How much each grew between the two measurements."""
    first, last = seen
    return {name: last[name] - first[name] for name in first}


def leaks(grown: dict[str, int], megabytes: float) -> list[str]:
    """What grew although it must not; resident memory may grow by `megabytes` (caches of allocators)."""
    allowed = {"rss": int(megabytes * 2**20)}
    return [f"{name} grew by {value}" for name, value in grown.items() if value > allowed.get(name, 0)]


def write(options: argparse.Namespace, figures: dict[str, Any], seconds: float) -> None:
    """What all ranks measured, as JSON."""
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, figures)
    if options.json is not None and dist.get_rank() == 0:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        about = {"command": f"python tests/soak.py --steps {options.steps} --patches {options.patches}"}
        about |= {"date": str(datetime.date.today()), "torch": torch.__version__, "device": device}
        report = {**about, "seconds": round(seconds), "ranks": ranks}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def work(options: argparse.Namespace) -> int:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    bad, figures, start = [], {}, time.monotonic()
    for name, function, times in (
        ("steps", run_steps, options.steps),
        ("patches", run_patches, options.patches),
        ("steps of two models", run_two_models, options.steps // 10),
    ):
        seen = function(rank, world, times, times // 5)
        bad += leaks(growth(seen), 24)
        figures[f"{times} {name}"] = {"after the first fifth": seen[0], "at the end": seen[1]}
        print(f"rank {rank}, {times} {name}, growth after the first fifth: {growth(seen)}", flush=True)
    write(options, figures, time.monotonic() - start)
    dist.destroy_process_group()
    print("\n".join(bad) or f"OK rank {rank}: nothing leaks", flush=True)
    return 1 if bad else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="training steps")
    parser.add_argument("--patches", type=int, default=100, help="times the model is patched and unpatched")
    parser.add_argument("--json", type=Path, help="file for what was measured")
    options = parser.parse_args()
    if "RANK" in os.environ:
        return work(options)
    from distributed import launch

    return launch(__file__, *sys.argv[1:], launcher="torchrun", timeout=3600, capture=False).returncode


if __name__ == "__main__":
    sys.exit(main())
