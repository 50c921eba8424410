"""Train on sequences too long for one GPU: `--sp` ranks share each sequence (HF Trainer, DeepSpeed, fluid_hf).

    deepspeed --num_gpus 8 examples/long_context.py --sp 8 --seq-len 131072 --model Qwen/Qwen3-30B-A3B --data FILE
    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 --no_local_rank examples/long_context.py --sp 2 --seq-len 1024

What differs from a run on short sequences: `ParallelismConfig` in the `TrainingArguments`, and `position_ids` in the
data. `--sp 1` trains on whole sequences, one per rank, to compare memory.
"""

import argparse
import os
import sys
from pathlib import Path

import deepspeed
import text_data
import torch
from accelerate import ParallelismConfig
from deepspeed.accelerator import get_accelerator
from tiny_models import FAMILIES, build_model
from transformers import Trainer, TrainingArguments, set_seed

from fluid_hf import FluidCallback

HERE = Path(__file__).resolve().parent


class LongBlocks(text_data.BlockDataset):
    """Samples with the positions of their tokens, which each piece of a sequence keeps."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(index)
        return {**sample, "position_ids": torch.arange(len(sample["input_ids"]))}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Sequence-parallel training with Trainer, DeepSpeed and fluid_hf.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher; LOCAL_RANK says the same
    add("--sp", type=int, default=2, help="ranks that share one sequence")
    add("--seq-len", type=int, default=1024, help="tokens in a sequence, divisible by --sp")
    add("--steps", type=int, default=20, help="optimizer steps")
    add("--model", default="qwen3_moe", help=f"a family ({', '.join(FAMILIES)}), or a Hugging Face model or folder")
    add("--data", help="text to train on, as for pretrain.py")
    add("--max-mb", type=float, default=2.0, help="megabytes of text to use at most")
    add("--deepspeed", default=str(HERE / "ds_config_long_context.json"), help="DeepSpeed configuration")
    add("--lr", type=float, default=1e-3, help="learning rate")
    add("--output", default=str(HERE / "output_long"), help="folder for tokenizer and data, seen by all ranks")
    return parser.parse_args()


def training_arguments(args: argparse.Namespace) -> TrainingArguments:
    use_cpu = get_accelerator().device_name() == "cpu"
    if use_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled at the start
        deepspeed.init_distributed()  # on a CPU, accelerate starts torch.distributed alone, not deepspeed.comm
    parallelism = None
    if args.sp > 1:
        groups = max(int(os.environ.get("WORLD_SIZE", "1")) // args.sp, 1)  # that each train on sequences of their own
        parallelism = ParallelismConfig(sp_size=args.sp, dp_shard_size=groups, sp_backend="deepspeed")
    return TrainingArguments(
        output_dir=args.output,
        deepspeed=args.deepspeed,
        parallelism_config=parallelism,
        gradient_checkpointing=True,
        use_cpu=use_cpu,
        bf16=not use_cpu,
        max_steps=args.steps,
        per_device_train_batch_size=1,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=not use_cpu,
    )


def main() -> None:
    args = parse_args()
    if args.seq_len % args.sp:
        sys.exit(f"--seq-len ({args.seq_len}) must be divisible by --sp ({args.sp})")
    training_args = training_arguments(args)
    with training_args.main_process_first(local=False):
        if training_args.process_index == 0:
            pretrained = None if args.model in FAMILIES else args.model
            sizes = {"seq_len": args.seq_len, "max_bytes": int(args.max_mb * 1e6), "multiple": 1}
            text_data.prepare(args.data, pretrained, Path(args.output), **sizes)
    tokenizer, blocks = text_data.load(Path(args.output))
    set_seed(training_args.seed)  # every rank builds the same weights
    model = build_model(args.model, tokenizer, seq_len=args.seq_len, bf16=training_args.bf16)
    trainer = Trainer(model, training_args, train_dataset=LongBlocks(blocks.train), callbacks=[FluidCallback()])
    trainer.train()
    if training_args.process_index == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(
            f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, sequences of {args.seq_len} tokens, sp_size {args.sp}",
            flush=True,
        )
        if torch.cuda.is_available() and not training_args.use_cpu:
            print(f"peak memory of rank 0: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB", flush=True)
        if not losses[-1] < losses[0]:
            sys.exit("the loss did not fall")


if __name__ == "__main__":
    main()
