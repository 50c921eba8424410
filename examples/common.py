"""What the examples share: starting DeepSpeed on a CPU, text for all ranks, a summary, the reload with transformers."""

import argparse
import gc
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import text_data
import torch
from deepspeed.accelerator import get_accelerator
from tiny_models import FAMILIES
from transformers import TrainingArguments

HERE = Path(__file__).resolve().parent
LAUNCHER_PREFIXES = ("RANK", "LOCAL_", "CROSS_", "WORLD_SIZE", "MASTER_", "ACCELERATE_", "DEEPSPEED_", "DS_", "NCCL_")


def start_deepspeed() -> bool:
    """Whether this runs on CPUs, where DeepSpeed needs help to start."""
    use_cpu = get_accelerator().device_name() == "cpu"
    if use_cpu:
        # DeepSpeed compiles an all-reduce for CPUs when it starts: a minute, and an error without a C++ compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed()  # on a CPU, accelerate starts torch.distributed alone, not deepspeed.comm
    return use_cpu


@dataclass(frozen=True)
class RunResult:
    """What the summary shows of a training run."""

    num_parameters: int
    first_loss: float
    last_loss: float
    first_held_out_loss: float
    last_held_out_loss: float
    train_seconds: float
    tokens: int


def prepare_text(args: argparse.Namespace, training_args: TrainingArguments) -> text_data.TokenizerAndBlocks:
    """Rank 0 writes tokenizer and token ids; every rank waits for them, and stops if rank 0 could not."""
    problem: list[str | None] = [None]
    if training_args.process_index == 0:
        multiple = args.batch_size * training_args.world_size  # full batches only, so that losses can be compared
        sizes = {"seq_len": args.seq_len, "max_bytes": int(args.max_mb * 1e6), "multiple": multiple}
        try:
            text_data.prepare(args.data, None if args.model in FAMILIES else args.model, Path(args.output), **sizes)
        except (ImportError, OSError, ValueError) as error:
            problem = [str(error)]
            print(error, file=sys.stderr, flush=True)
    torch.distributed.broadcast_object_list(problem)
    if problem[0] is not None:
        sys.exit(1)
    return text_data.load(Path(args.output))


def reload_checkpoint(args: argparse.Namespace, checkpoint: Path, expected_loss: float) -> bool:
    """Start a fresh Python process that knows nothing of this run but the checkpoint."""
    prompt = args.prompt
    if prompt is None and args.data is None:
        prompt = "def main("
    elif prompt is None:
        tokenizer, blocks = text_data.load(Path(args.output))
        prompt = tokenizer.decode(blocks.held_out[0][:12], skip_special_tokens=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_PREFIXES)}
    command = [sys.executable, str(HERE / "check_checkpoint.py"), str(checkpoint), "--prompt", prompt]
    command += ["--blocks", str(Path(args.output) / "blocks.pt"), "--expect-loss", str(expected_loss)]
    command += ["--batch-size", str(args.batch_size)]
    return subprocess.run(command, env=environment).returncode == 0


def print_summary(args: argparse.Namespace, result: RunResult, rows: dict[str, str]) -> None:
    table = {
        "model": f"{args.model}, {result.num_parameters / 1e6:.1f} M parameters",
        "fluid_hf": "off" if args.no_fluid else "on",
        **rows,
        "steps": str(args.steps),
        "loss, first to last": f"{result.first_loss:.4f} -> {result.last_loss:.4f}",
        "loss, held-out text": f"{result.first_held_out_loss:.4f} -> {result.last_held_out_loss:.4f}",
        "tokens/s": f"{result.tokens / result.train_seconds:,.0f}",
    }
    print("\n" + "\n".join(f"{name:<22}{value}" for name, value in table.items()), flush=True)


def finish(
    args: argparse.Namespace, training_args: TrainingArguments, result: RunResult, checkpoint: Path, start: float
) -> None:
    """On rank 0: reload the checkpoint in a process of its own, print the summary, fail if anything is wrong."""
    torch.distributed.destroy_process_group()
    if training_args.process_index != 0:
        return
    gc.collect()
    get_accelerator().empty_cache()  # the fresh process may want the same device
    reloaded = reload_checkpoint(args, checkpoint, result.last_held_out_loss)
    device = "CPU, gloo" if training_args.use_cpu else torch.cuda.get_device_name()
    rows = {"ranks": f"{training_args.world_size} ({device})", "checkpoint": str(checkpoint)}
    rows |= {"reloaded": "yes" if reloaded else "NO", "seconds": f"{time.monotonic() - start:.0f}"}
    print_summary(args, result, rows)
    if not result.last_held_out_loss < result.first_held_out_loss:  # on the same text, unlike the training loss
        sys.exit("the loss on held-out text did not fall")
    if not reloaded:
        sys.exit(f"transformers alone could not reload {checkpoint} with the same loss")
