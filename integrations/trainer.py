"""`FluidCallback`: a patched model in the Hugging Face Trainer."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from fluid_hf.config import FluidConfig
from fluid_hf.patching import get_state, patch_model
from fluid_hf.state import FluidState

__all__ = ["FluidCallback"]


class FluidCallback(TrainerCallback):
    """Patches the model when the Trainer is built, checks every step, and adds metrics to the Trainer's logs.

    Args:
        config: settings for `patch_model`; `None` reads the `"fluid"` block of the DeepSpeed JSON.

    The metrics (`fluid/...`, see `FluidState.metrics`) are in `state.log_history` and reach every reporter.
    Gradients need nothing from this callback: they are complete when backward returns.
    """

    def __init__(self, config: FluidConfig | None = None) -> None:
        self.config = config
        self._metrics: dict[str, float] = {}

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Patch the model unless it is patched, and take a place before the reporters."""
        model: nn.Module = kwargs["model"]
        if not isinstance(getattr(model, "fluid", None), FluidState) or self.config is not None:
            patch_model(model, self.config)
        get_state(model).staging_folder = args.output_dir
        frame = inspect.currentframe()
        handler = frame.f_back.f_locals.get("self") if frame is not None and frame.f_back is not None else None
        if isinstance(handler, CallbackHandler) and self in handler.callbacks:
            # Reporters (TensorBoard, W&B) are called before a user's callbacks and would not see what `on_log` adds.
            # The first callback is the Trainer's own, which decides whether this step logs.
            handler.callbacks.remove(self)
            handler.callbacks.insert(1, self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let weight gradients run in communication windows."""
        get_state(kwargs["model"]).scheduler.enable()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the micro-batch left nothing over."""
        get_state(kwargs["model"]).finish_batch()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check that the step left nothing over; collect metrics when this step logs (on all ranks alike)."""
        fluid = get_state(kwargs["model"])
        fluid.finish_batch()
        if control.should_log:
            self._metrics = fluid.metrics()

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
        """Stop scheduling weight gradients."""
        get_state(kwargs["model"]).scheduler.disable()
