"""Runs one layer's forward and backward pass under the profiler: on CPU ranks, GPU ranks, or one GPU's mirror link."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from fluid_hf.bench.links import free_port
from fluid_hf.bench.mirror import init_mirror
from fluid_hf.bench.shapes import SHAPES
from fluid_hf.moe.layer import ExpertParallelExperts
from fluid_hf.overlap.wgrad import WgradScheduler
from fluid_hf.profiling.session import StepTrace

__all__ = ["LayerRun"]

WARM_UP, TRACED = 3, 5


@dataclass(frozen=True)
class LayerRun:
    """What is run.

    Attributes:
        shape: name of the layer's sizes in `fluid_hf.bench.shapes.SHAPES`.
        ep_size: ranks.
        tokens: tokens per rank.
        waves: of the overlapped variant; `None` for the planner's choice.
        out: path without ending; `_serial.json.gz` and `_overlapped.json.gz` are added.
        overlaps: variants to trace: `False` is the serial reference, weight gradients included.
    """

    shape: str
    ep_size: int
    tokens: int
    waves: int | None
    out: Path
    overlaps: tuple[bool, ...] = (False, True)

    @property
    def link(self) -> str:
        """What the rows travel on."""
        gpus = torch.cuda.device_count()
        return "gloo" if not gpus else "nccl" if gpus >= self.ep_size else "mirror link"

    def trace_path(self, overlap: bool) -> Path:
        """Trace of a variant."""
        return self.out.with_name(f"{self.out.name}_{'overlapped' if overlap else 'serial'}.json.gz")

    def run(self) -> dict[bool, Path]:
        """Trace every variant on rank 0; the traces by variant."""
        if self.link == "mirror link":
            init_mirror(self.ep_size)
            self._trace(torch.device("cuda"))
            dist.destroy_process_group()
        else:
            torch.multiprocessing.spawn(_rank, (self, free_port()), self.ep_size)  # type: ignore[no-untyped-call]
        return {overlap: self.trace_path(overlap) for overlap in self.overlaps}

    def _trace(self, device: torch.device) -> None:
        shape = SHAPES[self.shape]
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(dist.get_rank())
        hidden = torch.randn(self.tokens, shape.hidden, device=device, dtype=dtype, requires_grad=True)
        scores = torch.rand(self.tokens, shape.experts, device=device)
        weights, index = scores.topk(shape.top_k)
        weights = (weights / weights.sum(1, keepdim=True)).to(dtype).requires_grad_()
        grad = torch.randn_like(hidden)
        first = dist.get_rank() == 0
        steps = len(self.overlaps) * (WARM_UP + TRACED)
        with tqdm(total=steps, desc="running", leave=False, disable=None if first else True) as bar:
            for overlap in self.overlaps:
                layer = self._layer(overlap, device, dtype)
                trace = StepTrace(self.trace_path(overlap))
                for step in range(WARM_UP + TRACED):
                    if step == WARM_UP:
                        self._meet(device)
                        if first:
                            trace.start()
                    layer(hidden, index, weights).backward(grad)
                    for tensor in (hidden, weights, *layer.parameters()):
                        tensor.grad = None
                    bar.update()
                if first:
                    trace.stop()
                self._meet(device)

    def _layer(self, overlap: bool, device: torch.device, dtype: torch.dtype) -> ExpertParallelExperts:
        shape = SHAPES[self.shape]
        layer = ExpertParallelExperts(
            shape.experts,
            shape.hidden,
            shape.inner,
            group=dist.group.WORLD,
            scheduler=WgradScheduler("layer" if overlap else "off"),
            overlap=overlap,
            waves=self.waves if overlap else None,
            device=device,
            dtype=dtype,
        )
        layer.context.name = self.shape
        return layer

    def _meet(self, device: torch.device) -> None:
        """All ranks are here, and their devices idle."""
        if device.type == "cuda":
            torch.cuda.synchronize()
        if self.link != "mirror link":  # one process
            dist.barrier()


def _rank(rank: int, run: LayerRun, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = torch.device("cuda", rank) if run.link == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // run.ep_size))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=run.ep_size)
    run._trace(device)
    dist.destroy_process_group()
