"""Train a mixture-of-experts model with Trainer, DeepSpeed and fluid_hf, then reload it with transformers.

    bash examples/quickstart.sh                       # installs what is missing and starts this file on 2 ranks
    deepspeed --num_gpus 2 examples/pretrain.py --model Qwen/Qwen3-30B-A3B --data wikitext:wikitext-103-raw-v1

Without fluid_hf this file would be the same, less the line that makes the callback.
"""

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
from tiny_models import FAMILIES, build_model
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

HERE = Path(__file__).resolve().parent
LAUNCHER_PREFIXES = ("RANK", "LOCAL_", "CROSS_", "WORLD_SIZE", "MASTER_", "ACCELERATE_", "DEEPSPEED_", "DS_", "NCCL_")


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


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a mixture-of-experts model with Trainer, DeepSpeed, fluid_hf; reload it with transformers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", help="a text file, a folder of text files, or a Hugging Face dataset (NAME or NAME:CONFIG, its split"
        " `train`); without it, the sources of Python's own standard library on this machine")  # fmt: skip
    add("--max-mb", type=float, default=4.0, help="megabytes of text to use at most")
    add("--model", default="qwen3_moe", help=f"a family ({', '.join(FAMILIES)}), built tiny and with random weights, or"
        " a Hugging Face model or folder to train further")  # fmt: skip
    add("--deepspeed", default=str(HERE / "ds_config_zero1.json"), help="DeepSpeed configuration; its block `fluid` is"
        " fluid_hf's")  # fmt: skip
    add("--steps", type=int, default=240, help="optimizer steps")
    add("--seq-len", type=int, default=256, help="tokens in a sequence")
    add("--batch-size", type=int, default=4, help="sequences per rank and step")
    add("--lr", type=float, help="peak learning rate; 3e-3 for a tiny model, 1e-5 for a pretrained one if not given")
    add("--output", default=str(HERE / "output"), help="folder for tokenizer, data and checkpoint, seen by all ranks")
    add("--prompt", help="text that the reloaded model continues; `def main(` or the start of the held-out text if not"
        " given")  # fmt: skip
    add("--no-fluid", action="store_true", help="train the unpatched model, to compare")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error(
            "start this with a distributed launcher: `bash examples/quickstart.sh` or `deepspeed --num_gpus 2`"
        )
    if args.lr is None:
        args.lr = 3e-3 if args.model in FAMILIES else 1e-5
    return args


def training_arguments(args: argparse.Namespace) -> TrainingArguments:
    use_cpu = get_accelerator().device_name() == "cpu"
    if use_cpu:
        # DeepSpeed compiles an all-reduce for CPUs when it starts: a minute, and an error without a C++ compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed()  # on a CPU, accelerate starts torch.distributed alone, not deepspeed.comm
    return TrainingArguments(
        output_dir=args.output,
        deepspeed=args.deepspeed,
        use_cpu=use_cpu,
        bf16=not use_cpu,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, args.steps // 20),
        weight_decay=0.01,
        logging_steps=10,
        logging_first_step=True,
        eval_on_start=True,  # the held-out loss before training
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=not use_cpu,
    )


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


def train(args: argparse.Namespace, training_args: TrainingArguments, checkpoint: Path) -> RunResult:
    tokenizer, blocks = prepare_text(args, training_args)
    set_seed(training_args.seed)  # every rank builds the same weights
    model = build_model(args.model, tokenizer, seq_len=args.seq_len, bf16=training_args.bf16)
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())  # ds_numel: ZeRO 3's full size
    callbacks: list[TrainerCallback] = []
    if not args.no_fluid:
        from fluid_hf import FluidCallback

        callbacks.append(FluidCallback())  # patches the model, with the `fluid` block of the DeepSpeed configuration
    trainer = Trainer(
        model,
        training_args,
        train_dataset=text_data.BlockDataset(blocks.train),
        eval_dataset=text_data.BlockDataset(blocks.held_out),
        callbacks=callbacks,
    )
    metrics = trainer.train().metrics
    # From here on the plain language-model loss, which does not depend on how batches fall on ranks.
    model.config.output_router_logits = False
    trainer.evaluate()
    trainer.save_model(str(checkpoint))
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(checkpoint)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    tokens = args.steps * args.batch_size * training_args.world_size * args.seq_len
    return RunResult(num_parameters, losses[0], losses[-1], held_out[0], held_out[-1], metrics["train_runtime"], tokens)


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


def main() -> None:
    start = time.monotonic()
    args = parse_args()
    training_args = training_arguments(args)
    checkpoint = Path(args.output) / "checkpoint"
    result = train(args, training_args, checkpoint)
    ranks, rank = training_args.world_size, training_args.process_index
    torch.distributed.destroy_process_group()
    if rank != 0:
        return
    gc.collect()
    get_accelerator().empty_cache()  # the fresh process may want the same device
    reloaded = reload_checkpoint(args, checkpoint, result.last_held_out_loss)
    device = "CPU, gloo" if training_args.use_cpu else torch.cuda.get_device_name()
    rows = {"ranks": f"{ranks} ({device})", "checkpoint": str(checkpoint), "reloaded": "yes" if reloaded else "NO"}
    print_summary(args, result, rows | {"seconds": f"{time.monotonic() - start:.0f}"})
    if not result.last_held_out_loss < result.first_held_out_loss:  # on the same text, unlike the training loss
        sys.exit("the loss on held-out text did not fall")
    if not reloaded:
        sys.exit(f"transformers alone could not reload {checkpoint} with the same loss")


if __name__ == "__main__":
    main()
