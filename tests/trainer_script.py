"""Trainer runs on CPU ranks, one after the other, each writing a JSON file per rank. Started by test_trainer.py."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedSequenceParallelConfig, release_memory
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from families import batch, tiny_model
from moe_families import tiny_model as listed_model
from transformers import (
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fluid_hf import FluidCallback


class DieAfterSave(TrainerCallback):
    """Ends every rank at once after a checkpoint, as a killed job would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.step == state.global_step:
            torch.distributed.barrier()
            os._exit(3)


class Stream(torch.utils.data.IterableDataset):
    """Data without a length, to be read from the start again."""

    def __init__(self, data: list[Any]) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)


class OwnSteps(Seq2SeqTrainer):
    """Takes no settings of `generate`, as Trainer's own method does not."""

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)


def deepspeed_json(options: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": options["stage"], "stage3_gather_16bit_weights_on_model_save": True},
        "zero_allow_untested_optimizer": True,
    }
    if options.get("json_optimizer"):
        params = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
        config["optimizer"] = {"type": "AdamW", "params": params}
    if options.get("fluid") is not None:
        config["fluid"] = options["fluid"]
    config.update(options.get("deepspeed", {}))
    return config


def parallelism(options: dict[str, Any]) -> ParallelismConfig | None:
    if not options.get("parallelism_sp_size"):
        return None
    name = options.get("attention_name")  # the callback says it where this does not
    handler = DeepSpeedSequenceParallelConfig(sp_attn_implementation=name) if name else None
    return ParallelismConfig(sp_size=options["parallelism_sp_size"], sp_backend="deepspeed", sp_handler=handler)


def build(options: dict[str, Any]) -> PreTrainedModel:
    if "folder" in options:
        return listed_model(options["folder"])
    return tiny_model(options.get("family", "qwen3_moe"), **options.get("model", {}))


def launcher_environment(options: dict[str, Any]) -> dict[str, str]:
    """What `accelerate launch --parallelism_config_sp_size` sets."""
    if not options.get("launcher_sp_size"):
        return {}
    values = {"SIZE": options["launcher_sp_size"], "SEQ_LENGTH_IS_VARIABLE": True}
    found = {f"PARALLELISM_CONFIG_SP_{name}": str(value) for name, value in values.items()}
    return {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", **found}


def arguments(options: dict[str, Any]) -> TrainingArguments:
    generate = {"predict_with_generate": True, "generation_max_length": 24} if options.get("generate") else {}
    return (Seq2SeqTrainingArguments if generate else TrainingArguments)(
        **generate,
        parallelism_config=parallelism(options),
        gradient_checkpointing=options.get("checkpointing", False),
        output_dir=options["output"],
        deepspeed=deepspeed_json(options),
        use_cpu=True,
        max_steps=-1 if "epochs" in options else options.get("steps", 10),
        num_train_epochs=options.get("epochs", 3),
        label_smoothing_factor=options.get("label_smoothing", 0.0),
        neftune_noise_alpha=options.get("neftune"),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=options.get("accumulation", 1),
        learning_rate=3e-3,
        weight_decay=options.get("weight_decay", 0.1),
        max_grad_norm=1.0,
        logging_strategy=options.get("logging_strategy", "steps"),
        logging_steps=options.get("logging_steps", 1),
        save_strategy="steps" if options.get("save_steps") else "no",
        save_steps=options.get("save_steps", 500),
        save_on_each_node=options.get("save_on_each_node", False),
        report_to=options.get("report_to", "none"),
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=7,
    )


def noise_bounds(model: Any) -> list[float]:
    """The most that NEFTune adds to a number, but for a factor of the model's, in each forward pass to come."""
    bounds: list[float] = []

    def note(module: Any, given: tuple[torch.Tensor]) -> None:
        if module.training:
            bounds.append(float(module.neftune_noise_alpha) / given[0].shape[1] ** 0.5)

    model.get_input_embeddings().register_forward_pre_hook(note)
    return bounds


def run(options: dict[str, Any]) -> dict[str, Any]:
    model = build(options)  # before the arguments: ZeRO 3 would have it built in parts
    args = arguments(options)
    for name, value in options.get("attributes", {}).items():  # of arguments for other trainers
        setattr(args, name, value)
    data = [
        {"input_ids": ids, "labels": ids}
        for ids in batch(0, options.get("samples", 96), length=options.get("length", 12))
    ]
    if options.get("positions"):
        data = [{**item, "position_ids": torch.arange(len(item["input_ids"]))} for item in data]
    train_data: Any = Stream(data) if options.get("stream") else data
    callbacks: list[TrainerCallback] = (
        [FluidCallback(**options.get("callback", {}))] if options.get("fluid") is not None else []
    )
    if "die_after_save" in options:
        callbacks.append(DieAfterSave(options["die_after_save"]))
    source: dict[str, Any] = (
        {"model_init": functools.partial(build, options)} if "trials" in options else {"model": model}
    )
    kind = OwnSteps if options.get("generate") else Trainer
    trainer = kind(**source, args=args, train_dataset=train_data, eval_dataset=data[:6], callbacks=callbacks)
    if options.get("reference"):  # where TRL's trainers keep it
        trainer.ref_model = build(options)  # type: ignore[attr-defined]
    noise = noise_bounds(trainer.model) if options.get("neftune") else []
    trials, groups = [], []
    for trial in range(options.get("trials", 1)):
        if trial and options.get("forget") and trainer.is_world_process_zero():  # as a search with Optuna does
            trainer.model_wrapped, trainer.model = release_memory(trainer.model_wrapped, trainer.model)
        trainer.train(resume_from_checkpoint=options.get("resume"))
        trials.append(trainer.state.log_history)
        groups.append(len(torch.distributed.distributed_c10d._world.pg_map))
    result: dict[str, Any] = {"history": trainer.state.log_history, "trials": trials, "groups": groups, "noise": noise}
    if options.get("save_model"):
        result["eval_loss"] = trainer.evaluate()["eval_loss"]
        trainer.save_model(options["save_model"])
        trainer.model.save_pretrained(options["save_model"] + "_direct")
    if options.get("predict"):
        found = trainer.predict(data[: options["predict"]])
        result["generated"] = found.predictions.tolist() if options.get("generate") else []
        result["predicted"] = [
            found.metrics["test_loss"],
            *found.predictions[:, -1:].reshape(len(found.predictions), -1)[:, :4].flatten().tolist(),
        ]
    return result


def run_all(rank: int, world: int, runs: list[dict[str, Any]], folder: str) -> None:
    """Runs such as `{"name": "a", "stage": 1, "fluid": {"ep_size": 2}}` in this rank."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # saves a minute of compilation
    deepspeed.init_distributed("gloo")
    for options in runs:
        environment = launcher_environment(options)
        os.environ.update(environment)
        try:
            result = run(options)
        except Exception as error:
            result = {"error": type(error).__name__, "message": str(error)}
        path = Path(folder) / f"{options['name']}-{rank}.json"
        path.write_text(json.dumps(result), encoding="utf-8")
        for name in environment:
            del os.environ[name]
        parallel_state_sp._release_sequence_parallel_groups()
        deepspeed.utils.groups.mpu = None
        ALL_ATTENTION_FUNCTIONS._local_mapping.clear()  # accelerate puts DeepSpeed's Ulysses here
        AcceleratorState._reset_state()
        PartialState._reset_state()
