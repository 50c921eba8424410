"""One variant of `fluid-hf bench train` in one rank: `python -m fluid_hf.bench.train PLAN.json` under a launcher.

Every variant is trained by the Hugging Face Trainer with AdamW, the same weights and the same sequences in the same
order. fluid_hf and AutoEP run on DeepSpeed; AutoEP's layers stand in the place of the experts, since DeepSpeed 0.19.8's
own switch for them does not run with these versions. transformers' expert parallelism runs with FSDP2, which the
Trainer takes as it is from transformers 5.20 on.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainingArguments

from fluid_hf.bench.shapes import SHAPES
from fluid_hf.bench.train_models import load_model
from fluid_hf.bench.train_plan import AUTOEP, PROGRESS, TRANSFORMERS, WARM_UP, TrainPlan
from fluid_hf.bench.train_work import flops_per_token, read_blocks
from fluid_hf.comm.calibration import measure_launch, measure_link
from fluid_hf.metrics import peak_tflops
from fluid_hf.overlap.cost_model import SERIAL, hardware_of
from fluid_hf.overlap.intervals import length, subtract
from fluid_hf.overlap.planner import predicted_seconds
from fluid_hf.profiling.session import StepTrace, write_report
from fluid_hf.profiling.trace import DEVICE_WORK

__all__ = ["run_rank"]
LOG_EVERY = 10
MIB = 2**20


class _Sequences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class _Recorder(Trainer):
    """Keeps the loss and the gradient norm of every step without waiting for the device."""

    def __init__(self, *args: Any, split_experts: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.split_experts = split_experts
        self.losses: list[torch.Tensor] = []
        self.norms: list[Any] = []

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self.losses.append(loss.detach().clone())
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        self.norms.append(super()._get_grad_norm(*args, **kwargs))
        return self.norms[-1]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.split_experts:  # as ZeRO asks for; fluid_hf's own models are seen to by its backend
            from fluid_hf.integrations.optimizer_groups import split_expert_groups

            split_expert_groups(optimizer.param_groups)
        return optimizer


class _Clock(TrainerCallback):
    """Seconds of every step, from end to end; the peak of memory; a trace of the step after the last that counts."""

    def __init__(self, plan: TrainPlan, device: torch.device) -> None:
        self.plan, self.device = plan, device
        self.seconds: list[float] = []
        self.trace: StepTrace | None = None
        self._last = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._wait()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            self._last = time.perf_counter()
        if state.global_step == self.plan.steps and state.is_world_process_zero:
            self.trace = StepTrace(Path(self.plan.out) / "trace.json.gz")
            self.trace.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > self.plan.steps:
            if self.trace is not None:
                self.trace.stop()
            return
        self._wait()
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        if state.is_world_process_zero:
            print(f"{PROGRESS}step {state.global_step}/{self.plan.steps} {self.seconds[-1]:.3f} s", flush=True)

    def peak_mib(self) -> float:
        """Of this rank: what tensors took of the GPU's memory during training, or the process of the host's."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / MIB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def run_rank(plan: TrainPlan) -> None:
    """Train, and write `result.json` to the plan's folder on rank 0. Collective over all ranks."""
    import fluid_hf.integrations.deepspeed as backend

    cuda = torch.cuda.is_available()
    on_deepspeed = plan.variant != TRANSFORMERS
    if on_deepspeed:
        if not dist.is_initialized():
            _init_ranks(cuda)
        backend.init_communication()
    args = _arguments(plan, cuda, on_deepspeed)
    device = args.device
    with _said("loading the model"):
        model: Any = load_model(plan, device)
    ids = read_blocks(plan.text)
    clock = _Clock(plan, device)
    callbacks: list[TrainerCallback] = [clock]
    if plan.ours:
        from fluid_hf import FluidCallback

        callbacks.insert(0, FluidCallback())
    if plan.checkpointing:
        model.config.use_cache = False
    trainer = _Recorder(
        model, args, train_dataset=_Sequences(ids), callbacks=callbacks, split_experts=plan.variant == AUTOEP
    )
    trainer.train()
    result = _result(plan, trainer, clock, device)
    if dist.get_rank() == 0:
        _write(plan, result)
        if clock.trace is not None:
            with _said("reading the trace"):
                result["trace"] = _read_trace(plan, clock.trace.path)
            _write(plan, result)
    dist.barrier()
    dist.destroy_process_group()


def _init_ranks(cuda: bool) -> None:
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if cuda else "gloo")


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"{PROGRESS}{what} took {time.perf_counter() - begin:.1f} s", flush=True)


def _arguments(plan: TrainPlan, cuda: bool, on_deepspeed: bool) -> TrainingArguments:
    """The Trainer's settings; DeepSpeed's JSON for the variants that run on it."""
    parallelism = None
    if plan.sp > 1:
        from accelerate import ParallelismConfig
        from accelerate.utils import DeepSpeedSequenceParallelConfig

        handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation="sdpa")
        parallelism = ParallelismConfig(sp_size=plan.sp, sp_backend="deepspeed", sp_handler=handler)
    return TrainingArguments(
        output_dir=plan.out,
        deepspeed=_engine_settings(plan) if on_deepspeed else None,
        parallelism_config=parallelism,
        use_cpu=not cuda,
        bf16=plan.dtype == "bfloat16" and on_deepspeed,  # FSDP2 has a policy of its own
        max_steps=plan.all_steps,
        per_device_train_batch_size=plan.batch,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        gradient_checkpointing=plan.checkpointing,
        train_sampling_strategy="sequential",
        logging_steps=min(LOG_EVERY, plan.steps),
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=cuda,
        disable_tqdm=True,
        seed=0,
    )


def _engine_settings(plan: TrainPlan) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": plan.zero},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": plan.dtype == "bfloat16"},
    }


def _result(plan: TrainPlan, trainer: _Recorder, clock: _Clock, device: torch.device) -> dict[str, Any]:
    """What was found out; losses are means over the ranks, times those of the slowest. Collective over all ranks."""
    losses = torch.stack(trainer.losses).to(device, torch.float64)
    dist.all_reduce(losses)
    seconds = torch.tensor(clock.seconds, device=device, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    peaks: list[Any] = [None] * plan.ranks
    dist.all_gather_object(peaks, clock.peak_mib())
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    metrics = {name: value for name, value in (logged[-1] if logged else {}).items() if name.startswith("fluid/")}
    counted = seconds.tolist()[WARM_UP:]
    median = statistics.median(counted)
    deciles = statistics.quantiles(counted, n=10) if len(counted) > 1 else [median, median]
    tflops = plan.tokens * flops_per_token(plan) / median / plan.ranks / 1e12
    peak = peak_tflops()
    result = {
        "losses": (losses / plan.ranks).tolist()[: plan.steps],
        "grad_norms": [_number(norm) for norm in trainer.norms[: plan.steps]],
        "seconds": seconds.tolist(),
        "seconds_per_step": {"median": median, "spread": deciles[-1] - deciles[0]},
        "tokens_per_second": plan.tokens / median,
        "model_tflops": tflops,
        "mfu": tflops / peak if peak else None,
        "peak_mib": peaks,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "memory_of": "GPU" if device.type == "cuda" else "process",
        "exposed_ms": metrics.get("fluid/exposed_ms"),
        "metrics": metrics,
        "waves": None,
        "predicted_ms": {},
    }
    if plan.ours:
        result |= _planned(plan, trainer.model, device)
    return result


def _planned(plan: TrainPlan, model: Any, device: torch.device) -> dict[str, Any]:
    """Waves that were run, and what the planner predicts of one layer's forward and backward pass by waves.

    Collective over all ranks: on a GPU the link is measured as the planner does it.
    """
    layer = next(iter(model.fluid.layers.values()))
    exchange = model.fluid.exchange
    if exchange.size == 1:
        return {"waves": 1}
    link = launch = 0.0
    if device.type == "cuda":
        link, launch = measure_link(exchange, device), measure_launch(exchange, device)
    hardware = hardware_of(device, link, launch)
    bits = torch.finfo(layer.expert_parameters()["down"].dtype).bits
    sizes = SHAPES[plan.model].sizes(plan.batch * plan.sequence // plan.sp, exchange.size, bits // 8)
    waves = layer.context.waves if plan.overlap else SERIAL
    predicted = {
        count: predicted_seconds(sizes, hardware, count, training=True) * 1e3 for count in sorted({waves, SERIAL, 1, 2})
    }
    return {"waves": waves, "predicted_ms": predicted, "link_bytes_per_second": float(link) or None}


def _number(norm: Any) -> float | None:
    """A gradient norm as it came: a number, a tensor, a distributed tensor; `None` where the engine gave none."""
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return None if norm is None else float(norm)


def _read_trace(plan: TrainPlan, path: Path) -> dict[str, Any]:
    """Where the time of the traced step went, in milliseconds; of ours also each layer's, and a timeline's picture.

    Messages of all variants count alike: kernels of NCCL, with their waits for other ranks, and copies between GPUs. On
    a CPU only ours are known.
    """
    found = _device_time(path)
    if not plan.ours:
        return found
    try:
        summary, files = write_report(path, Path(plan.out) / "timeline")
        layers = list(summary["layers"].values())
        middle = layers[len(layers) // 2]
    except Exception as error:  # times and losses stand without it
        return {**found, "error": f"{type(error).__name__}: {error}"}
    times = {name: middle[name]["ms"] for name in ("forward", "backward")}
    return {**found, "layer_ms": times, "summary": summary, "files": [str(file) for file in files]}


def _device_time(path: Path) -> dict[str, Any]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in events:
        if event.get("cat") in DEVICE_WORK and "dur" in event:
            message = any(part in event["name"].lower() for part in ("nccl", "memcpy ptop"))
            spans[message].append((event["ts"], event["ts"] + event["dur"]))
    if not spans[False]:
        return {}
    every = [*spans[True], *spans[False]]
    total = max(end for _, end in every) - min(start for start, _ in every)
    busy, messages = length(spans[False]), length(spans[True])
    alone = length(subtract(spans[True], spans[False]))
    times = {"step_ms": total, "compute_ms": busy, "messages_ms": messages, "exposed_ms": alone}
    times["idle_ms"] = total - busy - alone
    return {name: round(value / 1e3, 3) for name, value in times.items()}


def _write(plan: TrainPlan, result: dict[str, Any]) -> None:
    (Path(plan.out) / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run_rank(TrainPlan(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
