"""Plain Hugging Face checkpoints from a patched model, written as a stream: no rank ever holds more than a layer."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import tempfile
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from fluid_hf.checkpoint.files import SafetensorsFile, TensorSpec, new_folder, publish, remove_folder
from fluid_hf.checkpoint.gather import (
    as_stored,
    check_whole,
    held_elsewhere,
    iterate_weights,
    local_weights,
    share_of_whole,
    split_layers,
    weight_specs,
)
from fluid_hf.checkpoint.plan import SavePlan, to_checkpoint_layout
from fluid_hf.errors import CheckpointError, ConfigError, NotPatchedError, RankMismatchError
from fluid_hf.models.adapters import saves_adapters
from fluid_hf.state import FluidState, patched_elsewhere, unwrapped

__all__ = ["StagedWeights", "bind_adapter_saving", "bind_saving", "save_pretrained", "stage_weights", "unbind_saving"]


def save_pretrained(model: nn.Module, directory: str | os.PathLike[str], **kwargs: Any) -> None:
    """Write a complete plain Hugging Face checkpoint. Collective over all ranks; rank 0 writes.

    Of a model with adapters (PEFT), the adapters alone, as PEFT writes them.

    Weights are gathered one at a time and written as they come, into a hidden folder in `directory`, or beside one that
    is not there yet, and then take their place. A reader, or a restart after a crash at any moment, finds the old model
    or the new one, whole.

    Args:
        model: a patched model, also inside `torch.compile` or an engine.
        directory: where to write; other files in it stay.
        **kwargs: those of transformers' `save_pretrained`: `max_shard_size`, `variant`, `save_original_format`.

    Raises:
        CheckpointError: on every rank, when the directory, or the model, cannot be written; the one there stays as it
            was.
        CollectiveError: not every rank called it in time.
        ConfigError: `push_to_hub` is asked for.
        NotPatchedError: the model is not patched.
    """
    state = getattr(model, "fluid", None)
    if not isinstance(state, FluidState):
        place = patched_elsewhere(model) if isinstance(model, nn.Module) else ""
        remedy = f", but {place}; save the one given to patch_model." if place else "; use its own save_pretrained."
        raise NotPatchedError(f"{type(model).__name__} is not patched{remedy}")
    _save_whole(unwrapped(model), state, directory, kwargs)


def _save_whole(model: nn.Module, state: FluidState, directory: str | os.PathLike[str], kwargs: dict[str, Any]) -> None:
    """`save_pretrained` of the patched model, or of a part of it that is a transformers model, too."""
    _refuse_push(kwargs)
    state.control.gather(None, "saving a patched model")
    writer = _Attempt(_is_main())
    if saves_adapters(model):
        writer.run(lambda: _save_adapters(model, directory, **kwargs))
        writer.agree(state, directory)
        return
    specs = weight_specs(model)
    writer.run(lambda: _ModelWriter(model, Path(directory), specs, kwargs))
    with state.gathering():
        for name, tensor in iterate_weights(model, state, list(specs)):
            writer.run(lambda name=name, tensor=tensor: writer.result.add(name, tensor))  # type: ignore[misc]
    writer.run(lambda: writer.result.finish())
    writer.agree(state, directory)


def write_checkpoint(
    model: Any, directory: str | os.PathLike[str], weights: Mapping[str, torch.Tensor], **kwargs: Any
) -> None:
    """Write weights that this rank has, or has staged, in the same way. Not collective.

    Raises:
        CheckpointError: the directory cannot be written.
    """
    _refuse_push(kwargs)
    specs: dict[str, TensorSpec] | None = getattr(weights, "specs", None)  # of weights that are read when asked for
    if specs is None:
        specs = {name: TensorSpec.of(tensor) for name, tensor in weights.items()}
    attempt = _Attempt(True)
    attempt.run(lambda: _ModelWriter(model, Path(directory), specs, kwargs))
    for name in specs:
        attempt.run(lambda name=name: attempt.result.add(name, weights[name].detach().cpu()))  # type: ignore[misc]
    attempt.run(lambda: attempt.result.finish())
    attempt.agree(None, directory)


class _Attempt:
    """Runs steps on the writing rank until one fails; the other ranks, and the rest of the steps, do nothing. The error
    is kept until all ranks have gathered, as none must be left waiting.
    """

    def __init__(self, active: bool) -> None:
        self.result: Any = None
        self.error: Exception | None = None
        self._active = active

    def run(self, step: Any) -> None:
        """Run a step; what it returns first is the `result`."""
        if not self._active or self.error is not None:
            return
        try:
            value = step()
            self.result = value if self.result is None else self.result
        except Exception as error:
            self.error = error
            if self.result is not None:
                self.result.abandon()

    def agree(self, state: FluidState | None, directory: str | os.PathLike[str]) -> None:
        """Raise on every rank if the writing rank failed."""
        error = self.error
        if error is not None:
            reason = f"directory ({directory}) cannot be written"
            if not isinstance(error, OSError):  # of the model, or of a package that reads it
                reason = f"model cannot be written to directory ({directory}): {type(error).__name__}"
            error = CheckpointError(f"{reason}: {error}; the model in it is as it was.")
            error.__cause__ = self.error
        if state is not None:
            try:
                state.control.agree(error, None, "fluid_hf.save_pretrained")
            except RankMismatchError as other:  # the writing rank's error
                raise CheckpointError(str(other)) from None
        elif error is not None:
            raise error


class _ModelWriter:
    """Takes the weights in the order of `specs`, converts them layer by layer and writes each at its place."""

    def __init__(self, model: Any, target: Path, specs: Mapping[str, TensorSpec], options: dict[str, Any]) -> None:
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(f"{target} is a file")
        self._model, self._target = model, target
        self._plan = SavePlan.make(model, specs, options)
        self._unit_of = {name: unit for unit in self._plan.units for name in unit}
        self._held: dict[str, torch.Tensor] = {}
        self._total = sum(spec.num_bytes // spec.dtype.itemsize for spec in specs.values())
        self._aside = new_folder(target)
        self._files: dict[str, SafetensorsFile] = {}
        self._file_of = {name: file for file, tensors in self._plan.files.items() for name in tensors}
        try:
            self._write_configs()
        except BaseException:
            self.abandon()
            raise

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a weight; a layer is written when it is complete."""
        unit = self._unit_of.get(name)
        if unit is None:  # transformers does not save it
            return
        self._held[name] = tensor
        if any(other not in self._held for other in unit):
            return
        ready = {other: self._held.pop(other) for other in unit}
        for target, value in to_checkpoint_layout(self._model, ready, self._plan.original_format):
            file = self._file_of[target]
            if file not in self._files:
                self._files[file] = SafetensorsFile(self._aside / file, self._plan.files[file])
            self._files[file].write(target, value)
            if self._files[file].complete:
                self._files[file].close()

    def finish(self) -> None:
        """Put the checkpoint in place."""
        try:
            assert all(file.complete for file in self._files.values()) and len(self._files) == len(self._plan.files)
            if len(self._plan.files) > 1:
                text = json.dumps(self._plan.index(self._total), indent=2, sort_keys=True) + "\n"
                (self._aside / self._plan.index_name).write_text(text, encoding="utf-8")
            publish(self._aside, self._target, self._plan.weights_name, self._plan.index_name)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Remove what is not in place."""
        remove_folder(self._aside)

    def _write_configs(self) -> None:
        """config.json, generation_config.json and remote code, as transformers writes them beside weights."""
        placeholder = {"placeholder": torch.zeros(1)}
        with quiet_progress():
            save = type(self._model).save_pretrained
            save(self._model, self._aside, state_dict=placeholder, save_original_format=False)
        for path in self._aside.glob("*.safetensors"):
            path.unlink()


class StagedWeights(Mapping[str, torch.Tensor]):
    """A whole model's weights in a temporary file, read when asked for: what stands for a state dict on rank 0.

    Engines and trainers ask for the weights on all ranks first and write them on one later; kept in memory, a big
    model would not fit. Pickled or deep-copied, it becomes a plain dict.

    Args:
        path: a complete file; its name is removed at once, its data when the mapping goes.
        specs: shapes and dtypes by name.
    """

    def __init__(self, path: Path, specs: dict[str, TensorSpec]) -> None:
        self.specs = specs
        self._reader = safe_open(path, framework="pt")
        path.unlink()

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.specs:
            raise KeyError(name)
        tensor: torch.Tensor = self._reader.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (list(self.items()),)


def stage_weights(
    model: nn.Module, state: FluidState, exclude: Collection[str] = ()
) -> StagedWeights | dict[str, torch.Tensor]:
    """Weights under transformers' names: on rank 0, from a file; empty elsewhere. Collective over all ranks.

    The file is in `model.fluid.staging_folder`, or in the system's folder for temporary files.

    Args:
        model: the patched model, or one that wraps it.
        state: the patched model's.
        exclude: names to leave out.

    Raises:
        CheckpointError: on every rank, when the file cannot be written.
        CollectiveError: not every rank called it in time.
    """
    state.control.gather(None, "saving a patched model (state_dict)")
    specs = {name: spec for name, spec in weight_specs(model).items() if name not in exclude}
    folder = Path(state.staging_folder or tempfile.gettempdir())
    meta = as_stored(model, {name: spec.meta() for name, spec in specs.items()})
    named = {name: TensorSpec.of(tensor) for name, tensor in meta.items()}
    attempt = _Attempt(_is_main())
    attempt.run(lambda: _StageWriter(folder, named, owns_folder=state.staging_folder is not None))

    def write(name: str, tensor: torch.Tensor) -> None:
        for key, value in as_stored(model, {name: tensor}).items():
            attempt.result.file.write(key, value)

    with state.gathering():
        for name, tensor in iterate_weights(model, state, list(specs)):
            attempt.run(lambda name=name, tensor=tensor: write(name, tensor))  # type: ignore[misc]
    attempt.run(lambda: attempt.result.file.close())
    attempt.agree(state, folder)
    return StagedWeights(attempt.result.path, named) if _is_main() else {}


class _StageWriter:
    """The temporary file of one call; in a folder of the training run, files that killed runs left are removed."""

    def __init__(self, folder: Path, specs: dict[str, TensorSpec], *, owns_folder: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(".fluid_hf.*.staged") if owns_folder else ():
            path.unlink(missing_ok=True)
        self.path = folder / f".fluid_hf.{uuid.uuid4().hex[:8]}.staged"
        self.file = SafetensorsFile(self.path, specs)

    def abandon(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)


def bind_saving(model: nn.Module, state: FluidState) -> None:
    """Let the model and its parts save all by `save_pretrained`, and `state_dict` under an engine; load all, too."""
    if state.groups.ep_size == 1 and not state.bound_methods:
        return
    for part in model.modules():
        if part is model or (isinstance(part, PreTrainedModel) and split_layers(part)):
            part.save_pretrained = functools.partial(_save_bound, part, state)  # type: ignore[assignment]
    for layer in split_layers(model).values():
        layer.register_state_dict_pre_hook(_refuse_unbound_save)
        layer.register_load_state_dict_pre_hook(share_of_whole(state))

    def state_dict(*args: Any, **kwargs: Any) -> Any:
        # accelerate asks without arguments, on all ranks, to save; DeepSpeed and nesting modules pass arguments and
        # want the parameters as they are.
        if args or kwargs or not state.engine_bound:
            return nn.Module.state_dict(model, *args, **kwargs)
        return stage_weights(model, state) or held_elsewhere(model)

    model.state_dict = state_dict  # type: ignore[assignment]


def _save_bound(
    model: nn.Module, state: FluidState, directory: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> None:
    if saves_adapters(model):
        _save_adapters(model, directory, *args, **kwargs)
        return
    weights = kwargs.pop("state_dict", None)
    is_main = kwargs.pop("is_main_process", None)
    if weights is not None and not isinstance(weights, StagedWeights):
        check_whole(model, weights)
    if weights is None and state.groups.ep_size == 1 and not state.engine_bound:
        weights = local_weights(model)  # nothing to gather: one rank may call it alone, as without patching
    if weights is None:
        _save_whole(model, state, directory, kwargs)
    # Told of no main process, all ranks write in transformers; here those that `held_elsewhere` is for have nothing to.
    elif _is_main() or weights if is_main is None else is_main:
        write_checkpoint(model, directory, weights, **kwargs)


def _refuse_unbound_save(layer: Any, *_: Any) -> None:
    """Before a layer's `state_dict`: not for transformers' own saving, which would take this rank's experts for all.

    A model around the one given to `patch_model` cannot be bound, as nothing leads to it, and anyone may call a class's
    method on a bound one. Only the stack tells who asks; engines, and whoever wants this rank's part, get it as ever.

    Raises:
        CheckpointError: transformers' `save_pretrained` asks for the weights of a model that holds the layer.
    """
    frame, code = inspect.currentframe(), inspect.unwrap(PreTrainedModel.save_pretrained).__code__
    while frame is not None:
        if frame.f_code is code and frame.f_locals.get("state_dict") is None:
            saved = frame.f_locals["self"]
            if not saves_adapters(saved) and any(module is layer for module in saved.modules()):
                raise CheckpointError(
                    f"{type(saved).__name__} cannot be written by transformers' save_pretrained: the experts of the "
                    f"{layer.patched_in} that was given to patch_model are not here as checkpoints have them; save "
                    "that model with fluid_hf.save_pretrained, or unpatch it and patch the whole one."
                )
        frame = frame.f_back


def bind_adapter_saving(model: nn.Module) -> None:
    """Let a PEFT model around a patched one write its adapters once, from whichever ranks it is called on."""
    model.save_pretrained = functools.partial(_save_adapters, model)  # type: ignore[assignment]


def _save_adapters(model: Any, directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """As the model's class saves them: every rank holds them whole."""
    if kwargs.get("state_dict") is None and "is_main_process" not in kwargs:
        kwargs["is_main_process"] = _is_main()
    type(model).save_pretrained(model, directory, *args, **kwargs)


def unbind_saving(model: nn.Module) -> None:
    """Give the model and its parts their classes' own methods back."""
    for name in ("save_pretrained", "state_dict"):
        model.__dict__.pop(name, None)
    for part in model.modules():
        bound = vars(part).get("save_pretrained")
        if isinstance(bound, functools.partial) and bound.func is _save_bound:
            del part.save_pretrained


@contextlib.contextmanager
def quiet_progress(quiet: bool = True) -> Iterator[None]:
    """Without transformers' progress bars."""
    shown = logging.is_progress_bar_enabled()
    if quiet:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if quiet and shown:
            logging.enable_progress_bar()


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _refuse_push(options: dict[str, Any]) -> None:
    if options.pop("push_to_hub", False):
        raise ConfigError(
            "push_to_hub (True) must be False for a patched model; save first, then upload the folder with "
            "huggingface_hub.upload_folder, or set push_to_hub in TrainingArguments."
        )
