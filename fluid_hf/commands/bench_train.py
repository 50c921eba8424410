"""`fluid-hf bench train`: trains a whole model with ours and the alternatives, each in processes of its own."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch

from fluid_hf.bench.links import free_port
from fluid_hf.bench.model import MODELS
from fluid_hf.bench.shapes import SHAPES
from fluid_hf.bench.train_plan import AUTOEP, DEPTHS, PROGRESS, TRANSFORMERS, WARM_UP, TrainPlan
from fluid_hf.bench.train_report import largest_difference, train_table
from fluid_hf.commands.arguments import add_json, positive, write_whole
from fluid_hf.errors import ConfigError

DESCRIPTION = """Trains a model with random weights on real text with the Hugging Face Trainer, one variant after the
other, each on --ranks processes that this command starts itself (do not start it with a launcher): fluid_hf and AutoEP
with the deepspeed launcher, transformers' expert parallelism and FSDP2 with torchrun. All start from the same weights
and see the same sequences in the same order, so their losses must agree. Uses NCCL on GPUs, gloo without any."""

VARIANTS = ("fluid_hf", "serial", AUTOEP, TRANSFORMERS)
LAST_LINES, LINE_LENGTH = 60, 300
ERROR = re.compile(r"(\[rank\d+\]: )?[\w.]+(Error|Exception)\b")
LAUNCHERS = ("ChildFailedError", "CalledProcessError")
POLL_SECONDS, LOOK_SECONDS, GONE_SECONDS = 0.2, 1.0, 30.0
DTYPES = ("auto", "bfloat16", "float32")
ALLOWED = 1e-4  # relative difference of float32 losses


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "train", help="train a whole model in every variant, with Trainer and DeepSpeed", description=DESCRIPTION
    )
    add = parser.add_argument
    add("--model", default="qwen3-30b-a3b", choices=sorted(MODELS), help="model by name (default: %(default)s)")
    add("--layers", type=positive, help="decoder layers (default: all that the model has)")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="what to run (default: all); `serial`"
        " is fluid_hf without overlap")  # fmt: skip
    add("--waves", nargs="+", type=positive, default=[], help="also run fluid_hf with these numbers of waves")
    add("--ranks", type=positive, help="processes (default: one for each GPU, or 2)")
    add("--ep", type=positive, help="ranks that share the experts (default: all)")
    add("--sp", type=positive, default=1, help="ranks that share a sequence; fluid_hf only (default: 1)")
    add("--zero", type=int, choices=(1, 2), default=1, help="ZeRO stage (default: %(default)s)")
    add("--steps", type=positive, default=30, help=f"optimizer steps, {WARM_UP} of them to warm up (default: 30)")
    add("--batch", type=positive, default=1, help="sequences per rank and step (default: %(default)s)")
    add("--sequence", type=positive, default=4096, help="tokens of a sequence (default: %(default)s)")
    add("--lr", type=float, default=1e-4, help="learning rate, constant (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="auto", help="to compute in; optimizer state is float32 (default: bfloat16"
        " on GPUs, float32 without)")  # fmt: skip
    add("--checkpointing", action="store_true", help="activation checkpointing in every variant")
    add("--trace", action="store_true", help="trace one more step of each variant: exposed communication of all,"
        " pictures of fluid_hf's timelines in --work")  # fmt: skip
    add("--work", default="fluid_bench_train", help="folder for weights, text, logs, traces; equal weights are used"
        " again (default: %(default)s)")  # fmt: skip
    add("--timeout", type=float, default=1800.0, help="seconds after which a variant is ended (default: %(default)s)")
    add_json(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    """Run every variant; 1 if one of fluid_hf's did not run, or float32 losses differ.

    Raises:
        ConfigError: options that do not fit the model, the machine or each other.
    """
    plans = _plans(options)
    from fluid_hf.bench.train_work import state_bytes, write_blocks, write_checkpoint

    write_blocks(plans[0])
    write_checkpoint(plans[0])
    print(f"{plans[0].model}: about {state_bytes(plans[0]) / 2**30:.1f} GiB of weights, gradients and optimizer state "
          "for each rank, activations not counted")  # fmt: skip
    cells: list[dict[str, Any]] = []
    for plan in plans:
        print(f"{plan.variant}, {plan.ranks} ranks", flush=True)
        cell: dict[str, Any] = {
            "variant": plan.variant,
            "model": plan.model,
            "layers": plan.layers,
            "batch": plan.batch,
        }
        cells.append({**cell, "sp": plan.sp, "sequence": plan.sequence, "timeline": {}, **_run(plan, options.timeout)})
        _compare(cells)
        if options.json:
            write_whole(options.json, json.dumps(_report(options, plans[0], cells), indent=1))
    print("\n" + train_table(_report(options, plans[0], cells)))
    failed = any(cell["status"] != "ran" and cell["variant"].startswith("fluid_hf") for cell in cells)
    exact = plans[0].dtype == "float32"
    return int(failed or (exact and any((cell.get("differs") or 0.0) > ALLOWED for cell in cells)))


def _plans(options: argparse.Namespace) -> list[TrainPlan]:
    """The run of each variant, checked; their folders are made.

    Raises:
        ConfigError: options that do not fit the model, the machine or each other.
    """
    if "RANK" in os.environ:
        raise ConfigError(f"RANK ({os.environ['RANK']}) must not be set: this command starts the ranks itself.")
    gpus = torch.cuda.device_count()
    ranks = options.ranks or gpus or 2
    sizes = {"ranks": ranks, "ep": options.ep or ranks, "sp": options.sp}
    _check(options, gpus=gpus, **sizes)
    work = Path(options.work).resolve()
    names: list[tuple[str, dict[str, Any]]] = [
        ("fluid_hf serial" if name == "serial" else name, {"overlap": name != "serial"})
        for name in dict.fromkeys(options.variants)
    ]
    names += [(f"fluid_hf waves {count}", {"waves": count}) for count in dict.fromkeys(options.waves)]
    same = {name: getattr(options, name) for name in ("model", "zero", "steps", "batch", "sequence", "checkpointing")}
    best = "bfloat16" if gpus else "float32"
    plans = []
    for name, settings in names:
        out = work / name.replace(" ", "_")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--work ({options.work}) must be a folder that can be written: {error}.") from error
        plan = TrainPlan(
            variant=name,
            layers=options.layers or DEPTHS[options.model][0],
            trace=options.trace,
            dtype=best if options.dtype == "auto" else options.dtype,
            learning_rate=options.lr,
            timeout=min(600.0, options.timeout),
            shared=str(work),
            out=str(out),
            **same,
            **sizes,
            **settings,
        )
        plans.append(plan)
    return plans


def _check(options: argparse.Namespace, *, gpus: int, ranks: int, ep: int, sp: int) -> None:
    """Before anything starts."""
    shape, (heads, _, _) = SHAPES[options.model], MODELS[options.model]
    if gpus and ranks > gpus:
        raise ConfigError(f"--ranks ({ranks}) must be at most the number of GPUs ({gpus}).")
    if ranks % ep or shape.experts % ep:
        raise ConfigError(
            f"--ep ({ep}) must divide the number of ranks ({ranks}) and the experts of {options.model} "
            f"({shape.experts})."
        )
    if ranks % sp or options.sequence % sp or heads % sp:
        raise ConfigError(
            f"--sp ({sp}) must divide the number of ranks ({ranks}), --sequence ({options.sequence}) and the attention "
            f"heads of {options.model} ({heads})."
        )
    if options.steps <= WARM_UP:
        raise ConfigError(f"--steps ({options.steps}) must be more than the {WARM_UP} that warm up.")
    if options.sequence < 2:
        raise ConfigError(f"--sequence ({options.sequence}) must be at least 2: a token is predicted from another one.")
    for name in ("timeout", "lr"):
        if not 0 < getattr(options, name) < float("inf"):
            raise ConfigError(f"--{name} ({getattr(options, name)}) must be a positive number.")


def _run(plan: TrainPlan, timeout: float) -> dict[str, Any]:
    """Status, seconds, result and last lines of one variant, in processes of its own; all have ended afterwards."""
    refusal = plan.refusal()
    if refusal is not None:
        print(f"  refused: {refusal}", flush=True)
        return {"status": "refused", "seconds": 0.0, "cause": refusal, "lines": []}
    out = Path(plan.out)
    out.joinpath("result.json").unlink(missing_ok=True)
    out.joinpath("plan.json").write_text(json.dumps(asdict(plan), indent=1), encoding="utf-8")
    log, begin = out / "log.txt", time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            _command(plan), env=_environment(plan), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    ranks: set[psutil.Process] = set()
    try:
        with _stopped_by_a_signal():
            ended = _follow(process, log, begin + timeout, ranks)
    finally:
        _kill(process, ranks)
    seconds = time.monotonic() - begin
    lines = [line.rstrip()[:LINE_LENGTH] for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    try:
        result = json.loads(out.joinpath("result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        result = None
    if ended and process.returncode == 0 and result is not None:
        return {"status": "ran", "seconds": seconds, "result": result}
    status = f"failed ({process.returncode})" if ended else f"ended after {timeout:.0f} s"
    print(f"  {status}; see {log}: {_cause(lines)}", flush=True)
    return {"status": status, "seconds": seconds, "cause": _cause(lines), "lines": lines[-LAST_LINES:]}


def _command(plan: TrainPlan) -> list[str]:
    """The launcher with its options; `none` is no hostfile, so nothing is started on other machines."""
    port = str(free_port())
    what = ["fluid_hf.bench.train", str(Path(plan.out) / "plan.json")]
    if plan.variant == TRANSFORMERS:
        options = ["--nproc_per_node", str(plan.ranks), "--master_port", port, "-m"]
        return [sys.executable, "-m", "torch.distributed.run", *options, *what]
    # With GPUs the launcher takes those of CUDA_VISIBLE_DEVICES.
    number = [] if torch.cuda.is_available() else ["--num_accelerators", str(plan.ranks)]
    options = ["--hostfile", "none", *number, "--master_port", port, "--no_local_rank", "--module"]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *options, *what]


def _environment(plan: TrainPlan) -> dict[str, str]:
    found = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        found["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[: plan.ranks])
    else:
        found["DS_ACCELERATOR"] = "cpu"
        found.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // plan.ranks)))
    return found


@contextlib.contextmanager
def _stopped_by_a_signal() -> Iterator[None]:
    """A request to end is an exception, so that the ranks, in a session of their own, end with this process."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _follow(process: subprocess.Popen[bytes], log: Path, until: float, ranks: set[psutil.Process]) -> bool:
    """Show the ranks' progress until the launcher ends, and note its processes; False if it did not end in time."""
    look = time.monotonic()
    with log.open(encoding="utf-8", errors="replace") as lines:
        while True:
            ended = process.poll() is not None
            for line in lines:
                if line.startswith(PROGRESS):
                    print("  " + line.removeprefix(PROGRESS).rstrip(), flush=True)
            if ended or time.monotonic() > until:
                return ended
            if time.monotonic() >= look:
                ranks |= _below(process)
                look += LOOK_SECONDS
            time.sleep(POLL_SECONDS)


def _below(process: subprocess.Popen[bytes]) -> set[psutil.Process]:
    """What a launcher has started; torchrun puts each rank in a session of its own, out of a group's reach."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return set(psutil.Process(process.pid).children(recursive=True))
    return set()


def _kill(process: subprocess.Popen[bytes], ranks: set[psutil.Process]) -> None:
    """End a launcher and its processes, also those that outlived it, and wait for them: the next ones need the GPUs."""
    left = ranks | _below(process)
    for found in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.kill()
    process.kill()
    process.wait()
    until = time.monotonic() + GONE_SECONDS
    while any(map(_alive, left)) and time.monotonic() < until:
        time.sleep(POLL_SECONDS)


def _alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _cause(lines: list[str]) -> str:
    """The line that names the error; launchers say much more after it."""
    named = [line for line in lines if ERROR.match(line) and not any(name in line for name in LAUNCHERS)]
    return named[-1] if named else next((line for line in reversed(lines) if line), "no output")


def _compare(cells: list[dict[str, Any]]) -> None:
    """Largest relative difference of the newest variant's losses from those of the first that ran."""
    ran = [cell for cell in cells if "result" in cell]
    if len(ran) > 1 and ran[-1] is cells[-1]:
        cells[-1]["differs"] = largest_difference(ran[-1]["result"]["losses"], ran[0]["result"]["losses"])


def _report(options: argparse.Namespace, plan: TrainPlan, cells: list[dict[str, Any]]) -> dict[str, Any]:
    import transformers

    devices = [cell["result"]["device"] for cell in cells if "result" in cell]
    return {
        "what": "train",
        "device": devices[0] if devices else "unknown device",  # asked here it would take memory of the first GPU
        "ranks": plan.ranks,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "nccl": list(torch.cuda.nccl.version()) if torch.cuda.is_available() else None,
        "date": datetime.date.today().isoformat(),
        "command": {**vars(options), "dtype": plan.dtype, "layers": plan.layers, "ep": plan.ep, "ranks": plan.ranks},
        "cells": cells,
    }
