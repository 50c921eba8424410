"""Runs the slices of one model and number of layers in every variant; what costs time to build serves all of them."""

from __future__ import annotations

import functools
import gc
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from fluid_hf.bench.links import several_processes
from fluid_hf.bench.model import ALLOWED, ModelBench, ModelSlice, StepTime, start_engine
from fluid_hf.bench.model_report import draw_pictures, trace_pass
from fluid_hf.bench.model_variants import PEERS, Switch, Way, patched, peer_model, release, ways
from fluid_hf.bench.stages import Stages
from fluid_hf.comm.calibration import measure_launch, measure_link
from fluid_hf.errors import MissingPackageError
from fluid_hf.overlap.cost_model import SERIAL, hardware_of
from fluid_hf.overlap.planner import predicted_seconds

__all__ = ["RunSettings", "SliceRun"]

TRACED = ("serial", "fluid_hf")
PREDICTED = (SERIAL, 1, 2, 3)
TURNS = 4


@dataclass(frozen=True)
class RunSettings:
    """What is timed of each slice.

    Attributes:
        modes: of "inference", "forward", "backward" (forward and backward) and "step".
        repeats: timed runs of each variant and mode; those of one model in turns.
        variants: only those whose name contains one of these; all if empty.
        waves, max_ctas, wgrad: fixed numbers of waves, limits of NCCL's thread blocks, and policies of the weight
            gradients, timed of the first slice.
        pictures: folder for the timeline of the first slice; `None` for none.
        timeout: seconds that a rank waits for another one.
        deepspeed: settings of DeepSpeed's JSON for steps, beside or instead of the benchmark's.
    """

    modes: Sequence[str]
    repeats: int
    variants: Sequence[str] = ()
    waves: Sequence[int] = ()
    max_ctas: Sequence[int] = ()
    wgrad: Sequence[str] = ()
    pictures: str | None = None
    timeout: float = 300.0
    deepspeed: Mapping[str, Any] = field(default_factory=dict)

    def wants(self, variant: str) -> bool:
        """Whether a variant is timed."""
        return not self.variants or any(part in variant for part in self.variants)


@dataclass
class _Cell:
    part: ModelSlice
    bench: ModelBench
    data: dict[str, Any] = field(default_factory=dict)


class SliceRun:
    """Slices that differ in their batch only.

    Args:
        parts: the slices, small ones first.
        save: called after each result.

    Attributes:
        cells: results of each slice.
    """

    def __init__(
        self,
        parts: Sequence[ModelSlice],
        settings: RunSettings,
        stages: Stages,
        device: torch.device,
        save: Callable[[], None],
    ) -> None:
        self.settings, self.stages, self.device, self.save = settings, stages, device, save
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._cells = [_Cell(part, ModelBench(part, device, self.dtype)) for part in parts]
        for cell in self._cells:
            cell.data = {**asdict(cell.part), "model": cell.part.name, "variants": {}, "errors": {}, "waves": {}}
            cell.data |= {"skipped": [], "timeline": {}}
        self.cells = [cell.data for cell in self._cells]
        self.ways = [way for way in ways(settings.waves, settings.max_ctas, settings.wgrad) if settings.wants(way.name)]

    def run(self) -> None:
        """Ours on one patched model, what it must be patched with on others, then the peers."""
        bench = self._cells[0].bench
        self.stages.say(f"\n{self._cells[0].part}, {bench.size} ranks")
        if not self._time_left("everything"):
            return
        if bench.size == 1 or several_processes():
            with self.stages.stage("unpatched reference"):
                model = bench.build()
                for cell in self._cells:
                    cell.bench.make_reference(model)
                del model
            self._free()
        for _, group in itertools.groupby(self.ways, lambda way: way.settings):
            self._ours(list(group))
        for name in filter(self.settings.wants, PEERS):
            self._peer(name)
        for cell in self._cells:
            cell.bench.forget_reference()

    def trace(self) -> None:
        """Timelines and picture of the first slice, with `pictures`; when nothing is timed any more.

        What traces a GPU stays in the process, and can make every later launch take the host longer.
        """
        cell = self._cells[0]
        traced = [way for way in self.ways if way.name in cell.data["variants"] and way.name in TRACED]
        if self.settings.pictures is None or not traced or not self._time_left("timelines"):
            return
        self.stages.say(f"\ntimelines of {cell.part}")
        with self.stages.stage("build and patch"):
            model: Any = patched(cell.bench, timeout_seconds=self.settings.timeout)
        switch = Switch(model)
        for way in traced:
            switch.to(way)
            self._trace(model, way.name, cell)
        release(model)
        del model
        self._free()
        self.draw()

    def draw(self) -> None:
        """The picture of the first slice's timelines, if there are any."""
        cell, folder = self.cells[0], self.settings.pictures
        if folder is not None and self.stages.is_first and cell["timeline"]:
            with self.stages.stage("picture") as found:
                try:
                    draw_pictures(cell, folder)
                except MissingPackageError as error:  # the times are what was asked for; the JSON has the timelines
                    found.append(f"none: {error}")

    def _ours(self, group: list[Way]) -> None:
        settings = group[0].settings
        if settings.get("wgrad") == "cross_layer" and self._cells[0].part.sp > 1:
            self._skip(f"{group[0].name}: attention has windows of its own where ranks share sequences")
            return
        if settings and not self._time_left(group[0].name):
            return
        with self.stages.stage("build and patch"):
            model: Any = patched(self._cells[0].bench, timeout_seconds=self.settings.timeout, **settings)
        if not settings and self.device.type == "cuda":
            with self.stages.stage("speed of the link") as found:
                found.append(self._predict(model))
        switch = Switch(model)
        for way, cell in self._pairs(group):
            switch.to(way)
            self._compare(model, way.name, cell)
            layer = next(iter(model.fluid.layers.values()))
            cell.data["waves"][way.name] = layer.context.waves if way.overlap else SERIAL
        self._modes(model, group, switch)
        self._steps(model, group, switch)
        release(model)
        del model
        self._free()

    def _peer(self, name: str) -> None:
        try:
            with self.stages.stage(f"{name}: build"):
                model = peer_model(self._cells[0].bench, name)
            group = [Way(name)]
            for _, cell in self._pairs(group):
                self._compare(model, name, cell)
            self._modes(model, group)
            if name == "AutoEP":  # DeepSpeed's engine takes no other peer's split experts
                self._steps(model, group)
            release(model)
            del model
        except Exception as error:  # a peer that fails is a result too; ours must not
            text = f"{type(error).__name__}: {error}"[:300]
            for data in self.cells:
                data["errors"][name] = text
            self.stages.say(f"           {name}: {text}")
        self._free()

    def _pairs(self, group: list[Way]) -> Iterator[tuple[Way, _Cell]]:
        """Every variant on every slice; those with fixed settings on the smallest one only, while time is left."""
        for way in group:
            fixed = way.waves is not None or bool(way.settings) or not way.fused
            if not fixed:
                yield from ((way, cell) for cell in self._cells)
            elif self._time_left(way.name):
                yield way, self._cells[0]

    def _compare(self, model: nn.Module, name: str, cell: _Cell) -> None:
        with self.stages.stage(f"{self._what(name, cell)}: first pass and comparison") as found:
            error = cell.bench.error(model)
            found.append(f"differs {error:.1e}")
        if error > ALLOWED[self.dtype]:
            cell.data["errors"][name] = f"differs from the unpatched model by {error:.1e}"
            return
        cell.data["errors"][name] = error
        cell.data["variants"][name] = {}

    def _modes(self, model: nn.Module, group: list[Way], switch: Switch | None = None) -> None:
        for cell in self._cells:
            for mode in self.settings.modes:
                if mode != "step":
                    model.train(mode != "inference")
                    self._time(cell, mode, group, cell.bench.modes(model)[mode], switch)
                    model.train()

    def _time(self, cell: _Cell, mode: str, group: list[Way], run: Callable[[], None], switch: Switch | None) -> None:
        """Time the group's variants in turns: a host or a GPU that gets slower must not count against the last one."""
        group = [way for way in group if way.name in cell.data["variants"]]
        repeats = self.settings.repeats
        turns = min(TURNS, repeats) if len(group) > 1 else 1
        times: dict[str, list[float]] = {way.name: [] for way in group}
        medians: dict[str, list[float]] = {way.name: [] for way in group}
        allocated: dict[str, list[int]] = {way.name: [] for way in group}
        for turn, way in itertools.product(range(turns), group):
            again = f", again ({turn + 1} of {turns})" if turn else ""
            with self.stages.stage(f"{self._what(way.name, cell)}: {mode}{again}") as found:
                if switch is not None:
                    switch.to(way)
                allocations = self._allocations()
                latest = cell.bench.times(run, repeats // turns + (turn < repeats % turns))
                times[way.name] += latest
                self._note(cell, way.name, mode, cell.bench.summary(times[way.name]), found)
                # Of rank 0: whether turns differ, and whether memory was asked from the driver in them.
                medians[way.name].append(round(statistics.median(latest), 2))
                allocated[way.name].append(self._allocations() - allocations)
                notes = {"turns": medians[way.name], "allocated": allocated[way.name]}
                cell.data["variants"][way.name][mode] |= notes

    def _allocations(self) -> int:
        """Times that memory was asked from the driver, which makes the host wait."""
        on_gpu = self.device.type == "cuda"
        return int(torch.cuda.memory_stats(self.device)["num_device_alloc"]) if on_gpu else 0

    def _steps(self, model: nn.Module, group: list[Way], switch: Switch | None = None) -> None:
        if "step" not in self.settings.modes:
            return
        names = ", ".join(way.name for way in group)
        lacking = self._cells[-1].bench.missing_bytes(model)
        if lacking > 0:
            self._skip(f"{names}, step: {lacking / 1e9:.1f} GB of memory missing")
            return
        with self.stages.stage("DeepSpeed engine"):
            engine = start_engine(model, self._cells[0].bench, self.settings.deepspeed)
        for cell in self._cells:
            self._time(cell, "step", group, functools.partial(cell.bench.step, engine), switch)
        engine.destroy()

    def _predict(self, model: Any) -> str:
        """Measure the link as the planner does, and note what it predicts of one layer."""
        exchange = model.fluid.exchange
        if exchange.size == 1:
            return "no exchange"
        link, launch = measure_link(exchange, self.device), measure_launch(exchange, self.device)
        hardware = hardware_of(self.device, link, launch)
        for cell in self._cells:
            tokens = cell.part.batch * cell.part.sequence // cell.part.sp
            sizes = cell.bench.shape.sizes(tokens, exchange.size, torch.finfo(self.dtype).bits // 8)
            cell.data["link"] = {"bytes_per_second": float(link), **vars(link), "launch": launch}
            cell.data["link"]["spared"] = exchange.spared
            cell.data["predicted_ms"] = {
                waves: [predicted_seconds(sizes, hardware, waves, training=which) * 1e3 for which in (False, True)]
                for waves in PREDICTED
            }
        costs = f"latency {link.latency * 1e6:.0f} us, post {link.post * 1e6:.0f} us, taken {link.taken:.0%}"
        costs += f", {exchange.spared} multiprocessors left to it"
        return f"{link / 1e9:.0f} GB/s each way, {costs}, launch {launch * 1e6:.1f} us"

    def _note(self, cell: _Cell, name: str, mode: str, timing: StepTime, found: list[str]) -> None:
        cell.data["variants"][name][mode] = asdict(timing)
        found.append(f"{timing.median:8.2f} ms (+-{timing.spread:.2f})")
        self.save()

    def _trace(self, model: nn.Module, name: str, cell: _Cell) -> None:
        with self.stages.stage(f"{name}: trace"):
            timeline = trace_pass(cell.bench.modes(model)["backward"], self.stages.is_first)
            if timeline is not None:
                cell.data["timeline"][name] = timeline

    def _what(self, name: str, cell: _Cell) -> str:
        return name if len(self._cells) == 1 else f"batch {cell.part.batch}, {name}"

    def _time_left(self, what: str) -> bool:
        left = self.stages.time_left()
        if not left:
            self._skip(f"{what}: no time left")
        return left

    def _skip(self, why: str) -> None:
        for data in self.cells:
            data["skipped"].append(why)
        self.stages.say(f"           skipped {why}")

    def _free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
