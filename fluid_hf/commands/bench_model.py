"""`fluid-hf bench model`: a slice of a model in every variant, on real ranks or on the mirror link."""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fluid_hf.bench.links import LINKS, is_first, link_world
from fluid_hf.bench.model import ALLOWED, MODELS, ModelBench, ModelSlice
from fluid_hf.bench.model_report import draw_pictures, trace_pass
from fluid_hf.bench.model_variants import PEERS, Way, patched, peer_model, release, select, ways
from fluid_hf.bench.stages import Stages

MODES = ["inference", "forward", "backward", "step"]
TRACED = ("serial", "fluid_hf")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "model",
        help="time a slice of a model, under torchrun for several ranks",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--models", nargs="+", default=["qwen3-30b-a3b"], choices=sorted(MODELS), help="models by name")
    add("--link", choices=LINKS, default="nccl", help="mirror: one process plays rank 0 of --ep")
    add("--ep", type=int, default=2, help="expert parallel size on the mirror link; else the number of ranks")
    add("--sp", nargs="+", type=int, default=[1], help="ranks that share a sequence, which then has --batch of them")
    add("--layers", nargs="+", type=int, default=[2], help="decoder layers of the slice")
    add("--batch", nargs="+", type=int, default=[2], help="sequences per rank")
    add("--sequence", type=int, default=4096, help="tokens of a sequence")
    add("--modes", nargs="+", choices=MODES, default=MODES[:3], help="step: with DeepSpeed ZeRO 1 and AdamW")
    add("--repeats", type=int, default=20, help="timed runs of each variant and mode")
    add("--variants", nargs="+", help="only variants whose name contains one of these")
    add("--waves", nargs="+", type=int, default=[], help="fixed numbers of waves, in the smallest slice of each model")
    add("--ctas", nargs="+", type=int, default=[], help="nccl_max_ctas, in the smallest slice of each model")
    add("--trace", help="folder for a picture of one pass of each slice; the JSON gets its numbers")
    add("--budget", type=float, help="seconds after which nothing more is started")
    add("--timeout", type=float, default=300.0, help="seconds after which a collective that hangs ends the run")
    add("--stack-after", type=float, default=60.0, help="seconds of one stage after which every rank shows its stacks")
    add("--json", help="file for the results")
    return parser


def run(options: argparse.Namespace) -> int:
    """Time every slice, small ones first; rank 0 prints, and writes after each variant. 1 if variants disagree."""
    cells: list[dict[str, Any]] = []
    with link_world(options.link, options.ep, options.timeout) as device:
        stages = Stages(device, options.budget, options.stack_after)
        parts = itertools.product(options.layers, options.batch, options.sp, options.models)
        for layers, batch, sp, name in sorted(parts, key=lambda part: part[0] * part[1]):
            part = ModelSlice(name, layers, batch, options.sequence, sp)
            smallest = (layers, batch) == (min(options.layers), min(options.batch))
            run_of = _SliceRun(options, part, stages, device, smallest)
            cells.append(run_of.cell)
            run_of.run(lambda: _write(options, device, cells))
    return int(any(isinstance(error, str) for cell in cells for error in cell["errors"].values()))


class _SliceRun:
    """One slice in all variants; fills `cell`."""

    def __init__(
        self, options: argparse.Namespace, part: ModelSlice, stages: Stages, device: torch.device, smallest: bool
    ) -> None:
        self.options, self.part, self.stages = options, part, stages
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.bench = ModelBench(part, device, dtype)
        self.cell: dict[str, Any] = {**asdict(part), "model": part.name, "variants": {}, "errors": {}, "waves": {}}
        self.cell |= {"skipped": [], "timeline": {}}
        every = ways(options.waves if smallest else (), options.ctas if smallest else ())
        self.ways = [way for way in every if self._wanted(way.name)]
        self.save: Any = None

    def run(self, save: Any) -> None:
        """Ours on one patched model, fewer thread blocks on others, then the peers."""
        self.save = save
        if not self._time_left("all"):
            return
        self.stages.say(f"\n{self.part}, {self.bench.size} ranks")
        with self.stages.stage("unpatched reference"):
            self.bench.make_reference()
            _free(self.bench.device)
        for max_ctas in dict.fromkeys(way.max_ctas for way in self.ways):
            self._ours([way for way in self.ways if way.max_ctas == max_ctas], max_ctas)
        for name in filter(self._wanted, PEERS):
            if self._time_left(name):
                self._peer(name)
        if self.options.trace and self.stages.is_first and self.cell["timeline"]:
            with self.stages.stage("picture"):
                draw_pictures(self.cell, self.options.trace)

    def _ours(self, group: list[Way], max_ctas: int | None) -> None:
        if not self._time_left(group[0].name):
            return
        with self.stages.stage("build and patch"):
            limits = {"nccl_max_ctas": max_ctas, "timeout_seconds": self.options.timeout}
            model: Any = patched(self.bench, **limits)
        for way in group:
            if self._time_left(way.name):
                select(model, way)
                self._modes(model, way.name)
                layer = next(iter(model.fluid.layers.values()))
                self.cell["waves"][way.name] = layer.context.waves if way.overlap else 0
                if self.options.trace and way.name in TRACED:
                    self._trace(model, way.name)
        if "step" in self.options.modes:
            self._steps(model, {way.name: way for way in group if way.name in self.cell["variants"]})
        release(model)
        del model
        _free(self.bench.device)

    def _peer(self, name: str) -> None:
        try:
            with self.stages.stage(f"{name}: build"):
                model = peer_model(self.bench, name)
            self._modes(model, name)
            if "step" in self.options.modes and name == "AutoEP":
                self._steps(model, {name: None})
            release(model)
            del model
        except Exception as error:  # a peer that fails is a result too; ours must not
            self.cell["errors"][name] = f"{type(error).__name__}: {error}"[:300]
            self.stages.say(f"           {name}: {self.cell['errors'][name]}")
        _free(self.bench.device)

    def _modes(self, model: nn.Module, name: str) -> None:
        with self.stages.stage(f"{name}: first pass and comparison") as found:
            error = self.bench.error(model)
            found.append(f"differs {error:.1e}")
        if error > ALLOWED[self.bench.dtype]:
            self.cell["errors"][name] = f"differs from the unpatched model by {error:.1e}"
            return
        self.cell["errors"][name] = error
        self.cell["variants"][name] = {}
        for mode in self.options.modes:
            if mode != "step" and self._time_left(f"{name}, {mode}"):
                with self.stages.stage(f"{name}: {mode}") as found:
                    self._note(name, mode, self.bench.time_mode(model, mode, self.options.repeats), found)

    def _steps(self, model: nn.Module, variants: dict[str, Way | None]) -> None:
        if not variants:
            return
        lacking = self.bench.missing_bytes(model)
        if lacking > 0:
            self._skip(f"{', '.join(variants)}, step: {lacking / 1e9:.1f} GB of memory missing")
            return
        with self.stages.stage("DeepSpeed engine"):
            step, end = self.bench.training_step(model)
        for name, way in variants.items():
            if self._time_left(f"{name}, step"):
                if way is not None:
                    select(model, way)
                with self.stages.stage(f"{name}: step") as found:
                    self._note(name, "step", self.bench.time(step, self.options.repeats), found)
        end()

    def _note(self, name: str, mode: str, timing: Any, found: list[str]) -> None:
        self.cell["variants"][name][mode] = asdict(timing)
        found.append(f"{timing.median:8.2f} ms (+-{timing.spread:.2f})")
        self.save()

    def _trace(self, model: nn.Module, name: str) -> None:
        with self.stages.stage(f"{name}: trace"):
            timeline = trace_pass(self.bench.modes(model)["backward"], self.stages.is_first)
            if timeline is not None:
                self.cell["timeline"][name] = timeline

    def _wanted(self, name: str) -> bool:
        return not self.options.variants or any(part in name for part in self.options.variants)

    def _time_left(self, what: str) -> bool:
        left = self.stages.time_left()
        if not left:
            self._skip(f"{what}: no time left")
        return left

    def _skip(self, why: str) -> None:
        self.cell["skipped"].append(why)
        self.stages.say(f"           skipped {self.part if why.startswith('all') else ''} {why}")


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
    Path(options.json).write_text(json.dumps(report, indent=1), encoding="utf-8")


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
