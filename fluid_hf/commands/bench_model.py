"""`fluid-hf bench model`: a slice of a model in every variant, on real ranks or on the mirror link."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fluid_hf.bench.mirror import init_mirror
from fluid_hf.bench.model import MODELS, ModelBench


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "model",
        help="time a slice of a model, under torchrun for several ranks",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--models", nargs="+", default=["qwen3-30b-a3b"], choices=sorted(MODELS), help="models by name")
    add("--link", choices=["nccl", "gloo", "mirror"], default="nccl", help="mirror: one process plays rank 0 of --ep")
    add("--ep", type=int, default=2, help="expert parallel size on the mirror link; else the number of ranks")
    add("--layers", nargs="+", type=int, default=[2], help="decoder layers of the slice")
    add("--batch", nargs="+", type=int, default=[2], help="sequences per rank")
    add("--sequence", type=int, default=4096, help="tokens of a sequence")
    add("--repeats", type=int, default=20, help="timed runs of each variant and mode")
    add("--variants", nargs="+", help="only variants whose name contains one of these")
    add("--step", action="store_true", help="also time a training step with DeepSpeed ZeRO 1 (not the peers)")
    add("--trace", help="folder for a torch.profiler trace of one pass of the serial and the overlapped variant")
    add("--json", help="file for the results")
    return parser


def run(options: argparse.Namespace) -> int:
    """Time every slice; rank 0 prints, and writes after each, so that a run that is cut leaves what it has."""
    device = _start(options)
    cells: list[dict[str, Any]] = []
    for name in options.models:
        for layers in options.layers:
            for batch in options.batch:
                cells.append(_cell(options, name, layers, batch, device))
                _write(options, device, cells)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def _write(options: argparse.Namespace, device: torch.device, cells: list[dict[str, Any]]) -> None:
    if not _first() or not options.json:
        return
    about = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "ranks": dist.get_world_size() if dist.is_initialized() else 1,
        "torch": torch.__version__,
        "nccl": list(torch.cuda.nccl.version()) if options.link == "nccl" else None,
        "nccl_p2p_disabled": os.environ.get("NCCL_P2P_DISABLE") == "1",  # recorded, as NCCL reads it
        "date": datetime.date.today().isoformat(),
    }
    report = {**about, "command": vars(options), "link": options.link, "cells": cells}
    Path(options.json).write_text(json.dumps(report, indent=1), encoding="utf-8")


def _start(options: argparse.Namespace) -> torch.device:
    if options.link == "mirror":
        if options.ep > 1:
            init_mirror(options.ep)
    elif "RANK" in os.environ and not dist.is_initialized():
        if options.link == "nccl":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        dist.init_process_group(options.link)
    cuda = torch.cuda.is_available() and options.link != "gloo"
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def _cell(options: argparse.Namespace, name: str, layers: int, batch: int, device: torch.device) -> dict[str, Any]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bench = ModelBench(name, layers, batch, options.sequence, device, dtype)
    cell: dict[str, Any] = {"model": name, "layers": layers, "batch": batch, "sequence": options.sequence}
    cell.update(variants={}, errors={}, waves={})
    _say(f"\n{name}: {layers} layers, batch {batch} x {options.sequence}, {bench.size} ranks")
    reference: list[torch.Tensor] = []
    for variant, build in bench.variants().items():
        if options.variants and not any(part in variant for part in options.variants):
            continue
        try:
            model = build()
            found = bench.results(model)
            reference = reference or found
            cell["errors"][variant] = _worst(found, reference)
            times = {mode: asdict(bench.time(go, options.repeats)) for mode, go in bench.modes(model).items()}
            if options.trace and variant in ("serial", "fluid_hf"):
                _trace(Path(options.trace) / f"{name}_{variant}.json", bench.modes(model)["backward"])
            _clear_memory(device)
            if options.step and hasattr(model, "fluid"):
                step, end = bench.training_step(model)
                times["step"] = asdict(bench.time(step, options.repeats))
                end()
            cell["variants"][variant] = times
            cell["waves"][variant] = _waves(model)
            shown = "  ".join(
                f"{mode} {value['median']:8.2f} (+-{value['spread']:.2f})" for mode, value in times.items()
            )
            _say(f"  {variant:<16} {shown}  differs {cell['errors'][variant]:.1e}  {cell['waves'][variant] or ''}")
            del model, found
        except Exception as error:  # a peer that fails is a result too; ours must not
            cell["errors"][variant] = f"{type(error).__name__}: {error}"[:300]
            _say(f"  {variant:<16} {cell['errors'][variant]}")
            if variant not in ("AutoEP", "AllToAllEP"):
                raise
        _clear_memory(device)
    return cell


def _waves(model: Any) -> dict[str, int]:
    """What the planner chose."""
    state = getattr(model, "fluid", None)
    return {name: layer.context.waves for name, layer in list(state.layers.items())[:1]} if state is not None else {}


def _worst(found: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    """Largest relative difference, over all ranks."""
    errors = [
        (ours.float() - theirs.float()).norm() / theirs.float().norm()
        for ours, theirs in zip(found, reference, strict=True)
    ]
    worst = torch.stack(errors).max()
    if dist.is_initialized():
        dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst)


def _trace(path: Path, go: Callable[[], None]) -> None:
    """One pass under the profiler."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    go()
    with profile(activities=activities) as recorded:
        go()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    if _first():
        path.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(path))


def _clear_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _say(text: str) -> None:
    if _first():
        print(text, flush=True)
