"""Trainer runs that save while they train, for what they leave on disk. Started by test_trainer_files.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate.state import AcceleratorState, PartialState
from families import batch, tiny_model
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from trainer_script import deepspeed_json
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, default_data_collator

import fluid_hf
from fluid_hf import FluidCallback, FluidConfig


def run(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    args = TrainingArguments(
        output_dir=str(folder / options["name"]),
        deepspeed=deepspeed_json(options),
        use_cpu=True,
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=3e-2,  # unseen data gets worse: the best checkpoint is not the last
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        report_to="none",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=7,
    )
    model: Any = tiny_model("qwen2_moe")
    callbacks = []
    if options.get("fluid") is not None and options.get("lora") == "experts":  # only PEFT can come first
        callbacks.append(FluidCallback(FluidConfig(**options["fluid"])))
    elif options.get("fluid") is not None:
        fluid_hf.patch_model(model, FluidConfig(**options["fluid"]))
        callbacks.append(FluidCallback())
    if options.get("lora"):
        experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if options["lora"] == "experts" else None
        lora = LoraConfig(target_modules=["q_proj", "v_proj"], target_parameters=experts, r=4, lora_alpha=8)
        model = get_peft_model(model, lora)
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    words = Tokenizer(WordLevel({f"w{index}": index for index in range(96)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w1")
    data, unseen = (
        [{"input_ids": ids, "labels": ids} for ids in batch(rank, rows)] for rank, rows in ((0, 24), (5, 4))
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=unseen,
        callbacks=callbacks,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    trainer.train()
    return {
        "best": trainer.state.best_model_checkpoint,
        "metric": trainer.state.best_metric,
        "losses": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
        "after": trainer.evaluate()["eval_loss"],
    }


def run_all(rank: int, world: int, runs: list[dict[str, Any]], folder: str) -> None:
    """Runs such as `{"name": "a", "stage": 1, "fluid": {"ep_size": 2}, "lora": "attention"}` in this rank."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # saves a minute of compilation
    deepspeed.init_distributed("gloo")
    for options in runs:
        result = run(options, Path(folder))
        if rank == 0:
            (Path(folder) / f"{options['name']}.json").write_text(json.dumps(result), encoding="utf-8")
        AcceleratorState._reset_state()
        PartialState._reset_state()
