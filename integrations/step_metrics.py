"""What `FluidCallback` measures beside the counts: speed, exposed communication, load over training, profiles."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fluid_hf.errors import ConfigError, FluidError, MissingPackageError
from fluid_hf.metrics import model_flops_per_token, peak_tflops
from fluid_hf.overlap.sampler import OverlapSampler
from fluid_hf.profiling.picture import draw_expert_load
from fluid_hf.profiling.session import StepTrace, write_report
from fluid_hf.state import FluidState

__all__ = ["SAMPLE_EVERY", "LoadHistory", "ProfiledSteps", "StepMetrics"]

SAMPLE_EVERY = 20
logger = logging.getLogger(__name__)


class StepMetrics:
    """Tokens per second, model TFLOP/s, MFU, and exposed communication of a sampled step.

    Nothing waits for the device but the step that logs. At most one step in twenty is sampled with events, and none
    after it until that sample has been logged. The first step, in which kernels are compiled and the link is measured,
    is not sampled, and counts in no rate that another step is in.

    Args:
        model: the patched model.
        fluid: its state.
        peak: TFLOP/s of one device for MFU; `None` looks it up by the device's name.

    Attributes:
        steps: optimizer steps since the last `collect`.
    """

    def __init__(self, model: nn.Module, fluid: FluidState, peak: float | None) -> None:
        self.fluid = fluid
        self.model = model
        self.peak = peak if peak is not None else peak_tflops()
        self._tokens, self._seq_len, self.steps = 0, 0, 0
        self._begin: float | None = None
        self._last_end = 0.0  # of a step, or of what came after it and does not count
        self._sampler: OverlapSampler | None = None
        self._unread: OverlapSampler | None = None
        self._read: OverlapSampler | None = None
        self._since_sample = SAMPLE_EVERY - 1
        self._first_seconds: float | None = None  # until its rates have been collected
        self._first_tokens = 0
        self._overlap: dict[str, float] = {}
        self._flops: dict[int, float] = {}
        self._counting = True
        fluid.stop_measuring()  # for a training before this one, which raised
        fluid.stop_measuring = self.close
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def begin_step(self) -> None:
        """An optimizer step begins."""
        if self._begin is None:
            self._begin = time.perf_counter()
        self._since_sample += 1
        due = self._since_sample > SAMPLE_EVERY and self._unread is None
        if due and self.fluid.groups.ep_size * self.fluid.groups.sp_size > 1:
            device = next(self.model.parameters()).device
            self._sampler, self._since_sample = self.fluid.start_sampling(device, self._read), 1
            self._read = None

    def sample_next(self, wanted: bool) -> None:
        """Sample the next step, or do not, whenever the last sample was: for what times both."""
        if wanted and self._unread is not None:
            self._read, self._unread = self._unread, None
        self._since_sample = SAMPLE_EVERY if wanted else 0

    def end_step(self) -> None:
        """An optimizer step ended; its samples are read when the next log waits for the device anyway."""
        self.steps += 1
        self._last_end = time.perf_counter()
        if self._first_seconds is None and self._begin is not None:
            self._first_seconds, self._first_tokens = self._last_end - self._begin, self._tokens
        if self._sampler is not None:
            self.fluid.stop_sampling()
            self._unread, self._sampler = self._sampler, None

    def interrupt(self) -> None:
        """Evaluation or saving has ended, between two steps or before a log: their time does not count."""
        now = time.perf_counter()
        if self._begin is not None:
            self._begin += now - self._last_end
        self._last_end = now

    def collect(self) -> dict[str, float]:
        """The metrics since the last call. Collective over all ranks, waits for the device."""
        metrics = self.fluid.metrics(self._tokens)
        if self._unread is not None:
            in_flight, exposed = self._unread.result()
            self._overlap = {"fluid/exposed_ms": exposed}
            if in_flight:
                self._overlap["fluid/overlap_ratio"] = 1.0 - exposed / in_flight
            self._read, self._unread = self._unread, None
        metrics.update(self._overlap)
        now = time.perf_counter()
        seconds = now - (self._begin or now)
        tokens = metrics["fluid/tokens"]
        if self._first_seconds and self.steps > 1:  # of all ranks' tokens what this rank's are of its own
            seconds -= self._first_seconds
            tokens *= 1 - self._first_tokens / max(1, self._tokens)
        if self.steps:
            self._first_seconds = 0.0
        metrics["fluid/bytes_per_step"] = metrics["fluid/bytes_sent"] / max(1, self.steps)
        if seconds > 0 and tokens:
            metrics["fluid/tokens_per_second"] = tokens / seconds
            ranks = self.fluid.groups.world_size
            tflops = tokens * self._flops_per_token() / seconds / ranks / 1e12
            metrics["fluid/model_tflops"] = tflops
            if self.peak:
                metrics["fluid/mfu"] = tflops / self.peak
        # From here on, not from the next step's begin: what the loader takes for its batch counts, in every log alike.
        self._tokens, self.steps, self._begin, self._last_end = 0, 0, now, now
        return metrics

    def close(self) -> None:
        """Measure no more."""
        if self.fluid.stop_measuring != self.close:  # somebody else measures now
            return
        self.fluid.stop_measuring = contextlib.nullcontext
        self.fluid.stop_sampling()
        self.fluid.count(True)
        self._hook.remove()

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training != self._counting:  # what evaluation sends and routes is no part of the steps
            self._counting = module.training
            self.fluid.count(module.training)
        inputs = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1])  # either may be given as None
        given = next((each for each in inputs if each is not None), None)
        trained = module.training and torch.is_grad_enabled()  # TRL asks the policy without adapters for a reference
        if isinstance(given, torch.Tensor) and given.dim() >= 2 and trained:
            self._tokens += given.shape[0] * given.shape[1]  # sizes only: nothing is read from the device
            self._seq_len = given.shape[1] * self.fluid.groups.sp_size

    def _flops_per_token(self) -> float:
        if self._seq_len not in self._flops:
            self._flops[self._seq_len] = model_flops_per_token(self.model, self.fluid.layers, self._seq_len)
        return self._flops[self._seq_len]


class ProfiledSteps:
    """Traces optimizer steps `first` to `last` (counted from 1, both included) on rank 0 and writes a report.

    What cannot be written is warned of: an error here, on one rank only, would end a training that is sound.

    Raises:
        ConfigError: the steps are not two positive numbers in order.
    """

    def __init__(self, steps: tuple[int, int]) -> None:
        if not (isinstance(steps, (tuple, list)) and len(steps) == 2 and 1 <= steps[0] <= steps[1]):
            raise ConfigError(f"profile_steps ({steps!r}) must be (first, last) with 1 <= first <= last.")
        self.first, self.last = steps
        self._trace: StepTrace | None = None
        self._start: int | None = None
        self._step = 0

    def begin_step(self, step: int, folder: Path) -> None:
        """Optimizer step `step` begins, counted from 1."""
        if self._start is None or step <= self._step:
            if self._trace is not None:  # a training that raised left it running
                self._finish(folder)
            self._start = step
        self._step = step
        if step == self.first:
            self._trace = StepTrace(folder / "trace.json.gz")
            self._trace.start()

    def end_step(self, step: int, folder: Path) -> None:
        """Optimizer step `step` ended."""
        if self._trace is not None and step >= self.last:
            self._finish(folder)

    def close(self, folder: Path) -> None:
        """Training ended: write what is traced, and warn if it is not all that was asked for."""
        asked = f"profile_steps ({self.first}, {self.last})"
        if self._trace is not None:
            logger.warning("%s: training ended; the trace has steps %d to %d", asked, self.first, self._step)
            self._finish(folder)
        elif self._start is None:
            logger.warning("%s: nothing was traced, this training had no step", asked)
        elif not self._start <= self.first <= self._step:
            ran = (self._start, self._step)
            logger.warning("%s: nothing was traced, this training had steps %d to %d", asked, *ran)
        self._start, self._step = None, 0

    def _finish(self, folder: Path) -> None:
        assert self._trace is not None
        trace, self._trace = self._trace, None
        try:
            path = trace.stop()
            summary, files = write_report(path, folder / "timeline")
        except (FluidError, OSError) as error:
            logger.warning("no report of the profiled steps in %s: %s: %s", folder, type(error).__name__, error)
            return
        named = ", ".join(str(file) for file in [path, *files])
        logger.warning("%.0f%% of the communication was hidden; wrote %s", 100 * summary["overlap_ratio"], named)


class LoadHistory:
    """Load of every expert at each log, for `expert_load.json` and its heat map."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.loads: list[dict[str, list[float]]] = []

    def add(self, step: int, load: dict[str, list[int]]) -> None:
        """Remember the pairs of every expert by layer, relative to the layer's mean."""
        self.steps.append(step)
        self.loads.append({name: _relative(pairs) for name, pairs in load.items()})

    def write(self, folder: Path) -> list[Path]:
        """`expert_load.json` with every layer, and the heat map of the layer that was least balanced in the end.

        Nothing where there is no load: no step has run, or the model has no layer with experts.
        """
        if not any(self.loads):
            logger.warning("expert_load: nothing to write, no load of a layer with experts was read")
            return []
        folder.mkdir(parents=True, exist_ok=True)
        numbers = folder / "expert_load.json"
        layers = {name: [load[name] for load in self.loads] for name in self.loads[-1]}
        numbers.write_text(json.dumps({"steps": self.steps, "load_over_mean": layers}), encoding="utf-8")
        worst = max(layers, key=lambda name: max(layers[name][-1]))
        try:
            pictures = draw_expert_load(self.steps, layers[worst], folder / "expert_load", title=worst)
        except MissingPackageError as error:
            logger.warning("%s", error)
            pictures = []
        return [numbers, *pictures]


def _relative(pairs: list[int]) -> list[float]:
    mean = sum(pairs) / len(pairs)
    return [round(count / mean, 4) if mean else 0.0 for count in pairs]
