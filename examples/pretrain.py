"""Train a mixture-of-experts model with Trainer, DeepSpeed and fluid_hf, then reload it with transformers.

    bash examples/quickstart.sh                       # installs what is missing and starts this file on 2 ranks
    deepspeed --num_gpus 2 examples/pretrain.py --model Qwen/Qwen3-30B-A3B --data Salesforce/wikitext:wikitext-2-raw-v1

Without fluid_hf this file would be the same, less the line that makes the callback.
"""

import argparse
import os
import time
from pathlib import Path

import common
import text_data
from tiny_models import FAMILIES, build_model
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

HERE = Path(__file__).resolve().parent


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a mixture-of-experts model with Trainer, DeepSpeed, fluid_hf; reload it with transformers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher; LOCAL_RANK says the same
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
    add("--profile-steps", type=int, nargs=2, help="first and last step to trace; see OUTPUT/fluid_profile")
    add("--expert-load", action="store_true", help="write a heat map of the experts' load to OUTPUT/fluid_profile")
    add("--no-fluid", action="store_true", help="train the unpatched model, to compare")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start this with a launcher: `bash examples/quickstart.sh` or `deepspeed --num_gpus 2`")
    if args.lr is None:
        args.lr = 3e-3 if args.model in FAMILIES else 1e-5
    return args


def training_arguments(args: argparse.Namespace) -> TrainingArguments:
    use_cpu = common.start_deepspeed()
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


def train(args: argparse.Namespace, training_args: TrainingArguments, checkpoint: Path) -> common.RunResult:
    tokenizer, blocks = common.prepare_text(args, training_args)
    set_seed(training_args.seed)  # every rank builds the same weights
    model = build_model(args.model, tokenizer, seq_len=args.seq_len, bf16=training_args.bf16)
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())  # ds_numel: ZeRO 3's full size
    callbacks: list[TrainerCallback] = []
    if not args.no_fluid:
        from fluid_hf import FluidCallback

        # Patches the model, with the `fluid` block of the DeepSpeed configuration.
        callbacks.append(FluidCallback(profile_steps=args.profile_steps, expert_load=args.expert_load))
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
    seconds = metrics["train_runtime"]
    return common.RunResult(num_parameters, losses[0], losses[-1], held_out[0], held_out[-1], seconds, tokens)


def main() -> None:
    start = time.monotonic()
    args = parse_args()
    training_args = training_arguments(args)
    checkpoint = Path(args.output) / "checkpoint"
    result = train(args, training_args, checkpoint)
    common.finish(args, training_args, result, checkpoint, start)


if __name__ == "__main__":
    main()
