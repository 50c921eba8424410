"""Supervised fine-tuning with TRL's SFTTrainer, the experts split over the ranks. Needs `pip install fluid-hf[trl]`.

deepspeed --num_gpus 2 examples/sft_trl.py
DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 --no_local_rank examples/sft_trl.py
"""

import argparse
from pathlib import Path

import common
from datasets import Dataset
from tiny_models import FAMILIES, build_model
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from fluid_hf import FluidCallback

HERE = Path(__file__).resolve().parent


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Supervised fine-tuning of an expert-parallel model with TRL.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher; LOCAL_RANK says the same
    add("--model", default="qwen3_moe", help=f"a family ({', '.join(FAMILIES)}), built tiny, or a Hugging Face model")
    add("--data", help="a text file, folder or Hugging Face dataset; Python's standard library if not given")
    add("--max-mb", type=float, default=1.0, help="megabytes of text to use at most")
    add("--deepspeed", default=str(HERE / "ds_config_zero2.json"), help="DeepSpeed configuration with a `fluid` block")
    add("--steps", type=int, default=60, help="optimizer steps")
    add("--seq-len", type=int, default=128, help="tokens in a sequence")
    add("--batch-size", type=int, default=4, help="sequences per rank and step")
    add("--lr", type=float, default=3e-3, help="peak learning rate; 1e-5 suits pretrained models")
    add("--output", default=str(HERE / "output_sft"), help="folder for the text and the model, seen by all ranks")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    use_cpu = common.start_deepspeed()
    training_args = SFTConfig(
        output_dir=args.output,
        deepspeed=args.deepspeed,
        use_cpu=use_cpu,
        bf16=not use_cpu,
        max_steps=args.steps,
        max_length=args.seq_len,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=not use_cpu,
    )
    tokenizer, blocks = common.prepare_text(args, training_args)
    set_seed(training_args.seed)  # every rank builds the same weights
    trainer = SFTTrainer(
        build_model(args.model, tokenizer, seq_len=args.seq_len, bf16=training_args.bf16),
        training_args,
        train_dataset=Dataset.from_dict({"input_ids": blocks.train.tolist()}),  # tokens already; "text" works, too
        processing_class=tokenizer,
        callbacks=[FluidCallback()],  # patches the model with the `fluid` block of the DeepSpeed configuration
    )
    trainer.train()
    trainer.save_model(f"{args.output}/model")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
