"""`FluidCallback`: a patched model in the Hugging Face Trainer."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_config
from transformers.trainer_callback import CallbackHandler

from fluid_hf.config import FluidConfig
from fluid_hf.errors import ConfigError
from fluid_hf.integrations.accelerate import (
    agree_on_sp_size,
    check_loss,
    check_ranks,
    check_sp_size,
    fill_batches,
    first_epoch,
    give_head_size,
    name_attention,
    parallelism_of,
    scale_noise,
)
from fluid_hf.integrations.shared_folder import check_node_local, check_shared
from fluid_hf.integrations.step_metrics import LoadHistory, ProfiledSteps, StepMetrics
from fluid_hf.integrations.trainer_methods import (
    calling_trainer,
    keep_weight_decay,
    load_checkpoints_whole,
    patch_new_models,
    synchronise_generation,
)
from fluid_hf.models.sharding import refuse_fsdp
from fluid_hf.patching import get_state, patch_model
from fluid_hf.state import FluidState

__all__ = ["FluidCallback"]


class FluidCallback(TrainerCallback):
    """Patches the model when the Trainer is built, checks every step, and adds metrics to the Trainer's logs.

    Args:
        config: settings for `patch_model`; `None` reads the `"fluid"` block of the DeepSpeed JSON.
        profile_steps: `(first, last)` optimizer steps to trace on rank 0, counted from 1, both included. The trace, the
            timeline picture and its numbers go to `fluid_profile` in the Trainer's `output_dir`.
        expert_load: write `expert_load.json` and a heat map there when training ends.
        peak_tflops: dense TFLOP/s of one device, for `fluid/mfu`; `None` knows the usual data-centre GPUs.

    Metrics, in `state.log_history` and for every reporter: those of `FluidState.metrics`, and `fluid/bytes_per_step`,
    `fluid/tokens_per_second` (all ranks), `fluid/model_tflops` (one rank, see
    `fluid_hf.metrics.model_flops_per_token`), `fluid/mfu`, and from one sampled step (between two logs, and at most one
    in twenty) `fluid/overlap_ratio` (share of the time with an exchange in flight
    in which computation went on) and `fluid/exposed_ms` (the rest).
    Gradients need nothing from this callback: they are complete when backward returns.

    Raises:
        ConfigError: `profile_steps` is not two positive numbers in order.
    """

    def __init__(
        self,
        config: FluidConfig | None = None,
        *,
        profile_steps: tuple[int, int] | None = None,
        expert_load: bool = False,
        peak_tflops: float | None = None,
    ) -> None:
        self.config = config
        self._profiled = ProfiledSteps(profile_steps) if profile_steps is not None else None
        self._history = LoadHistory() if expert_load else None
        self._peak = peak_tflops
        self._step_metrics: StepMetrics | None = None
        self._metrics: dict[str, float] = {}

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Patch the model unless it is patched, and those of `model_init`; take a place before the reporters."""
        self._patch(kwargs["model"], args)
        trainer = calling_trainer()
        if trainer is not None:
            keep_weight_decay(trainer)
            load_checkpoints_whole(trainer)
            synchronise_generation(trainer)
            patch_new_models(trainer, lambda model: self._patch(model, trainer.args))
        frame = inspect.currentframe()
        handler = frame.f_back.f_locals.get("self") if frame is not None and frame.f_back is not None else None
        if isinstance(handler, CallbackHandler) and self in handler.callbacks:
            # Reporters (TensorBoard, W&B) are called before a user's callbacks and would not see what `on_log` adds.
            # The first callback is the Trainer's own, which decides whether this step logs.
            handler.callbacks.remove(self)
            handler.callbacks.insert(1, self)

    def _patch(self, model: nn.Module, args: TrainingArguments) -> None:
        trainer = calling_trainer()
        accelerator = getattr(trainer, "accelerator", None)
        parallelism = parallelism_of(args, accelerator)
        if not isinstance(getattr(model, "fluid", None), FluidState) or self.config is not None:
            active = deepspeed_config()
            block = active.get("fluid", {}) if isinstance(active, dict) else {}
            requested = self.config if self.config is not None else FluidConfig.from_dict(block)
            if args.fsdp:
                refuse_fsdp(requested.ep_size)
            patch_model(model, agree_on_sp_size(requested, parallelism))
        groups = get_state(model).groups
        check_sp_size(groups.sp_size, parallelism)
        check_ranks(parallelism, groups.world_size)
        check_loss(groups.sp_size, groups.world_size, args, getattr(trainer, "compute_loss_func", None))
        name_attention(parallelism, accelerator, model)
        if groups.sp_size > 1:
            give_head_size(accelerator, model.config)
        _check_reference(args, groups.ep_size)
        if args.fsdp:
            refuse_fsdp(groups.ep_size)
        get_state(model).staging_folder = args.output_dir

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let weight gradients run in communication windows; begin to measure."""
        fluid = get_state(kwargs["model"])
        if getattr(args, "sync_ref_model", False):
            _check_synced(kwargs["model"], getattr(calling_trainer(), "ref_model", None))
        if not fluid.engine_bound:
            _check_without_engine(kwargs["model"], kwargs.get("optimizer"), fluid)
        if fluid.engine_bound and args.save_strategy != "no":
            _check_output(args, fluid)
        fluid.scheduler.enable()
        fluid.scheduler.reset()  # a training before this one may have ended in the middle of a backward pass
        if self._step_metrics is not None:
            self._step_metrics.close()
        if fluid.groups.sp_size > 1:
            loader: Any = kwargs.get("train_dataloader")
            epoch = first_epoch(loader, state.global_step, args.gradient_accumulation_steps)
            fill_batches(loader, fluid.groups.sp_size, kwargs["model"].config, epoch)
            scale_noise(kwargs["model"], args.neftune_noise_alpha, fluid.groups.sp_size)
        self._step_metrics = StepMetrics(kwargs["model"], fluid, self._peak)
        if self._history is not None and state.global_step == 0:
            self._history = LoadHistory()  # what a training before this one has left

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sample or trace this step, if it is its turn."""
        if self._step_metrics is not None:
            self._step_metrics.begin_step()
        if self._profiled is not None and state.is_world_process_zero:
            self._profiled.begin_step(state.global_step + 1, _folder(args))

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the micro-batch left nothing over."""
        get_state(kwargs["model"]).finish_batch()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check that the step left nothing over; collect metrics when this step logs (on all ranks alike)."""
        get_state(kwargs["model"]).finish_batch()
        if self._profiled is not None and state.is_world_process_zero:
            self._profiled.end_step(state.global_step, _folder(args))
        if self._step_metrics is None:
            return
        self._step_metrics.end_step()
        if control.should_log:
            self._collect(self._step_metrics, state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Collect metrics if the epoch logs, and its last step has not (on all ranks alike)."""
        if control.should_log and self._step_metrics is not None and self._step_metrics.steps:
            self._collect(self._step_metrics, state)

    def _collect(self, step_metrics: StepMetrics, state: TrainerState) -> None:
        self._metrics = step_metrics.collect()
        if self._history is not None:
            self._history.add(state.global_step, step_metrics.fluid.expert_load)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluation is no part of the training speed."""
        if self._step_metrics is not None:
            self._step_metrics.interrupt()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Saving is no part of the training speed."""
        if self._step_metrics is not None:
            self._step_metrics.interrupt()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the metrics to the log entry of this step, for the history and for the reporters that follow."""
        logs = kwargs.get("logs")
        if logs is not None and "loss" in logs and self._metrics:
            logs.update(self._metrics)
            if state.log_history:
                state.log_history[-1].update(self._metrics)
            self._metrics = {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop scheduling weight gradients, measuring and tracing; write the load of the experts, if asked for."""
        get_state(kwargs["model"]).scheduler.disable()
        if self._step_metrics is not None:
            if self._history is not None and self._step_metrics.steps:  # since the last log, on all ranks alike
                self._collect(self._step_metrics, state)
                self._metrics = {}
            self._step_metrics.close()
            self._step_metrics = None
        if self._profiled is not None and state.is_world_process_zero:
            self._profiled.close(_folder(args))
        if self._history is not None and state.is_world_process_zero:
            self._history.write(_folder(args))


def _zero_stage() -> int:
    active = deepspeed_config()
    return int(active.get("zero_optimization", {}).get("stage", 0)) if isinstance(active, dict) else 0


def _check_reference(args: TrainingArguments, ep_size: int) -> None:
    """Refuse a copy of the model that TRL would keep up to date on rank 0 only, with the experts of that rank."""
    if ep_size > 1 and _zero_stage() == 3 and getattr(args, "sync_ref_model", False):
        raise ConfigError(
            f"sync_ref_model (true) must be false with ep_size ({ep_size}) over 1 at ZeRO 3: TRL would mix the policy "
            "into the reference model on rank 0 alone, without the other ranks' experts; use ZeRO 0, 1 or 2 and patch "
            "the reference model too."
        )


def _check_synced(model: nn.Module, reference: Any) -> None:
    """Refuse a copy that is not patched like the model: TRL mixes one's parameters into the other's in their order."""
    if reference is None or [p.shape for p in reference.parameters()] == [p.shape for p in model.parameters()]:
        return
    raise ConfigError(
        "sync_ref_model (true) must be false, or ref_model patched with the settings of the model: its parameters are "
        "others; give the trainer a ref_model for which patch_model was called."
    )


def _check_without_engine(model: nn.Module, optimizer: Any, fluid: FluidState) -> None:
    """Refuse to train without DeepSpeed what only its engine trains, and with an optimizer of weights that are gone."""
    if fluid.groups.ep_size > 1:
        raise ConfigError(
            f"ep_size ({fluid.groups.ep_size}) over 1 needs DeepSpeed in the Trainer, which averages the gradients of "
            "what is not split over all ranks; give TrainingArguments a deepspeed configuration."
        )
    known, held = {id(parameter) for parameter in model.parameters()}, set()
    for group in getattr(optimizer, "param_groups", ()):
        held |= {id(parameter) for parameter in group["params"]}
    experts = [p for layer in fluid.layers.values() for p in layer.split_parameters() if p.requires_grad]
    if held - known and any(id(parameter) not in held for parameter in experts):
        raise ConfigError(
            f"optimizer ({type(optimizer).__name__}) holds {len(held - known)} parameters that are not the model's, "
            "and not its experts; call patch_model before the optimizer is built."
        )


def _check_output(args: TrainingArguments, fluid: FluidState) -> None:
    """Fail now rather than at the first checkpoint, which may be hours away."""
    assert args.output_dir is not None
    if not args.save_on_each_node:
        check_shared(Path(args.output_dir), fluid.control, "FluidCallback.on_train_begin")
        return
    held = [parameter for layer in fluid.layers.values() for parameter in layer.split_parameters()]
    trained = any(parameter.requires_grad for parameter in held)
    check_node_local(_zero_stage(), split=fluid.groups.ep_size > 1 and trained)


def _folder(args: TrainingArguments) -> Path:
    assert args.output_dir is not None
    return Path(args.output_dir) / "fluid_profile"
