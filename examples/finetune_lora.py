"""Fine-tune a mixture-of-experts model with LoRA on its attention; its experts are split over the ranks, and frozen.

    deepspeed --num_gpus 2 examples/finetune_lora.py --model mistralai/Mixtral-8x7B-v0.1 --data my_texts/
    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 --no_local_rank examples/finetune_lora.py     # a tiny Mixtral

The adapter is saved in PEFT's own format: PeftModel.from_pretrained(base, OUTPUT/adapter). ZeRO 0, 1 or 2.
"""

import argparse
from pathlib import Path

import common
import text_data
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES, build_model
from transformers import Trainer, TrainingArguments, set_seed

import fluid_hf
from fluid_hf import FluidCallback

HERE = Path(__file__).resolve().parent


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="LoRA fine-tuning of an expert-parallel model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher; LOCAL_RANK says the same
    add("--model", default="mixtral", help=f"a family ({', '.join(FAMILIES)}), built tiny, or a Hugging Face model")
    add("--data", help="a text file, folder or Hugging Face dataset; Python's standard library if not given")
    add("--max-mb", type=float, default=1.0, help="megabytes of text to use at most")
    add("--deepspeed", default=str(HERE / "ds_config_lora.json"), help="DeepSpeed configuration with a `fluid` block")
    add("--rank", type=int, default=8, help="rank of the adapters")
    add("--steps", type=int, default=60, help="optimizer steps")
    add("--seq-len", type=int, default=128, help="tokens in a sequence")
    add("--batch-size", type=int, default=4, help="sequences per rank and step")
    add("--lr", type=float, default=1e-2, help="peak learning rate; 1e-4 suits pretrained models")
    add("--output", default=str(HERE / "output_lora"), help="folder for the text and the adapter, seen by all ranks")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    use_cpu = common.start_deepspeed()
    training_args = TrainingArguments(
        output_dir=args.output,
        deepspeed=args.deepspeed,
        use_cpu=use_cpu,
        bf16=not use_cpu,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.lr,
        logging_steps=10,
        eval_on_start=True,  # the held-out loss before training
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=not use_cpu,
    )
    tokenizer, blocks = common.prepare_text(args, training_args)
    set_seed(training_args.seed)  # every rank builds the same weights
    model = build_model(args.model, tokenizer, seq_len=args.seq_len, bf16=training_args.bf16)
    model.requires_grad_(False)  # before patching: frozen experts need no optimizer group of their own
    fluid_hf.patch_model(model)  # with the `fluid` block of the DeepSpeed configuration
    lora = LoraConfig(r=args.rank, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    trainer = Trainer(
        get_peft_model(model, lora),
        training_args,
        train_dataset=text_data.BlockDataset(blocks.train),
        eval_dataset=text_data.BlockDataset(blocks.held_out),
        callbacks=[FluidCallback()],  # the metrics; the model is patched already
    )
    trainer.train()
    trainer.evaluate()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    before, after = losses[0], losses[-1]
    if trainer.is_world_process_zero():  # the adapter is whole on every rank
        trainer.model.save_pretrained(f"{args.output}/adapter")
        tokenizer.save_pretrained(f"{args.output}/adapter")
        trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        print(f"held-out loss {before:.4f} -> {after:.4f}, {trained:,} weights trained", flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    if not after < before:
        raise SystemExit("the loss on held-out text did not fall")


if __name__ == "__main__":
    main()
