"""Methods of a Trainer that must know of patched models: weight decay, checkpoints, models made anew, generation."""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, Seq2SeqTrainer, Trainer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.trainer_utils import number_of_arguments

from fluid_hf.control import HeldGroups
from fluid_hf.errors import CheckpointError
from fluid_hf.models.stored_experts import StoredExperts, stored_parameters
from fluid_hf.patching import release_model
from fluid_hf.state import FluidState

__all__ = [
    "calling_trainer",
    "keep_weight_decay",
    "load_checkpoints_whole",
    "patch_new_models",
    "synchronise_generation",
]


def calling_trainer() -> Trainer | None:
    """The Trainer in whose constructor this is called; callbacks are not told."""
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer):
            return found
        frame = frame.f_back
    return None


def keep_weight_decay(trainer: Trainer) -> None:
    """Let the Trainer's optimizer decay of a patched model what it decays of the unpatched one.

    It goes by names, and DeepSpeed's protocol leaves experts' biases no name with "bias" in it. The Trainer's own
    method, or that of a subclass, is asked about the unpatched model; of an unpatched model it is left alone.
    """
    ask = trainer.get_decay_parameter_names

    @functools.wraps(ask)
    def names(model: nn.Module) -> list[str]:
        state = getattr(model, "fluid", None)
        return _decayed(ask, model, state) if isinstance(state, FluidState) else ask(model)

    trainer.get_decay_parameter_names = names  # type: ignore[method-assign]


def load_checkpoints_whole(trainer: Trainer) -> None:
    """Let a Trainer without DeepSpeed resume, and load the best model, with the experts of the checkpoint.

    transformers writes weights under the names that models have on the Hub, one tensor for each expert, and its Trainer
    reads them by the names in the model: experts, and routers whose names differ, stay what they were, and only a
    warning tells (5.17 to 5.23). They are read once more, by `from_pretrained`, which knows both names.
    """
    resume, best = trainer._load_from_checkpoint, trainer._load_best_model

    @functools.wraps(resume)
    def load_from_checkpoint(resume_from_checkpoint: str, model: Any = None) -> None:
        resume(resume_from_checkpoint, model)
        _load_the_rest(trainer, resume_from_checkpoint)

    @functools.wraps(best)
    def load_best_model() -> None:
        best()
        if trainer.state.best_model_checkpoint is not None:
            _load_the_rest(trainer, trainer.state.best_model_checkpoint)

    trainer._load_from_checkpoint = load_from_checkpoint  # type: ignore[method-assign]
    trainer._load_best_model = load_best_model  # type: ignore[method-assign]


def _load_the_rest(trainer: Trainer, folder: str) -> None:
    """Weights of a patched model that a folder has under other names than the model.

    Raises:
        CheckpointError: the folder lacks some of them.
    """
    model: Any = trainer.model
    state = getattr(model, "fluid", None) if isinstance(model, PreTrainedModel) else None
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return
    if not isinstance(state, FluidState) or state.groups.ep_size > 1:
        return
    written = {name for file in Path(folder).glob("*.safetensors") for name in _names_in(file)}
    missing = model.state_dict().keys() - written
    if not written or not missing:
        return
    # In what holds every weight of the model: its configuration may still have the dtype that it was loaded in.
    dtypes = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
    whole, report = type(model).from_pretrained(
        folder,
        config=model.config,
        dtype=functools.reduce(torch.promote_types, dtypes),
        key_mapping=_own_renamings(model),
        output_loading_info=True,
    )
    # from_pretrained fills with random numbers what it does not find.
    lost = sorted(missing & set(report["missing_keys"]) - set(model._keys_to_ignore_on_save or ()))
    if lost:
        raise CheckpointError(
            f"tensor ({lost[0]}) of the model must be in {folder} but {len(lost)} are not; resume with a model that is "
            "built, or loaded, as the one that was trained."
        )
    found = whole.state_dict()
    model.load_state_dict({name: found[name] for name in missing if name in found}, strict=False)


def _own_renamings(model: Any) -> dict[str, str] | None:
    """The `key_mapping` that a model was loaded with: by it transformers names what it saves."""
    usual = [(rule.source_patterns, rule.target_patterns) for rule in get_model_conversion_mapping(model)]
    used = [
        rule
        for rule in getattr(model, "_weight_conversions", None) or ()
        if type(rule) is WeightRenaming and (rule.source_patterns, rule.target_patterns) not in usual
    ]
    return {rule._original_source_patterns[0]: rule._original_target_patterns[0] for rule in used} or None


def _names_in(file: Path) -> list[str]:
    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())


def patch_new_models(trainer: Trainer, patch: Callable[[nn.Module], None]) -> None:
    """Patch what the Trainer's `model_init` makes at every `train`; the model before gives its process groups back.

    Args:
        trainer: a Trainer; without `model_init`, nothing is done.
        patch: patches a model. Called on all ranks.
    """
    make: Any = trainer.model_init
    if make is None:
        return
    last = _Patched(trainer.model)

    def follow(model: Any) -> Any:
        nonlocal last
        patch(model)
        earlier, last = last, _Patched(model)
        if earlier.groups is not last.groups:
            earlier.release()
        return model

    def made_for(trial: Any) -> Any:
        return follow(make(trial))

    def made() -> Any:
        return follow(make())

    # The Trainer gives as many arguments as it counts, and counts those of a functools.partial in a way of its own.
    trainer.model_init = made_for if number_of_arguments(make) == 1 else made


class _Patched:
    """A patched model that its Trainer may drop: rank 0 of a search with Optuna does after every trial, and alone."""

    def __init__(self, model: Any) -> None:
        state = getattr(model, "fluid", None)
        self.groups: HeldGroups | None = state.held_groups if isinstance(state, FluidState) else None
        self._model = weakref.ref(model) if self.groups is not None else None

    def release(self) -> None:
        """Give its process groups back, once. Collective over all ranks."""
        model = self._model() if self._model is not None else None
        if model is not None and isinstance(getattr(model, "fluid", None), FluidState):
            release_model(model)
        elif self.groups is not None:
            self.groups.release()


def synchronise_generation(trainer: Trainer) -> None:
    """Let `Seq2SeqTrainer(predict_with_generate=True)` generate until all ranks are done.

    It tells `generate` so at ZeRO 3 and under FSDP only; experts that are split over ranks need it as well.
    """
    if not isinstance(trainer, Seq2SeqTrainer):
        return
    own: Any = trainer.prediction_step

    @functools.wraps(own)
    def prediction_step(
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **settings: Any,
    ) -> Any:
        state = getattr(trainer.model, "fluid", None)
        if isinstance(state, FluidState) and state.groups.ep_size > 1:
            if settings:
                settings = {"synced_gpus": True, **settings}
            else:  # a subclass may take no settings: they are left where Seq2SeqTrainer looks for them
                evaluated: Any = trainer
                evaluated._gen_kwargs = {"synced_gpus": True, **getattr(trainer, "_gen_kwargs", {})}
        return own(model, inputs, prediction_loss_only, ignore_keys=ignore_keys, **settings)

    trainer.prediction_step = prediction_step  # type: ignore[method-assign]


def _decayed(ask: Callable[[nn.Module], list[str]], model: nn.Module, state: FluidState) -> list[str]:
    with _originals_in_place(model, state):
        found = ask(model)
        chosen = set(found)
        decayed = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in chosen}
    places = {id(module): place for place, module in model.named_modules()}
    for name, layer in state.layers.items():
        original = state.originals[name]
        for own, weights in layer.weights_in_parameters().items():
            parts = [part for weight in weights for part in stored_parameters(original, weight)]
            if all(id(part) in decayed for part in parts):
                found.append(f"{places[id(layer)]}.{own}")
    held = {name for name, _ in model.named_parameters()}
    return [name for name in dict.fromkeys(found) if name in held]


@contextlib.contextmanager
def _originals_in_place(model: nn.Module, state: FluidState) -> Iterator[None]:
    """For reading names: the experts' own modules where they were before patching, without their weights."""
    originals = {id(layer): state.originals[name] for name, layer in state.layers.items()}
    places = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent.named_children()
        if id(child) in originals
    ]
    try:
        for parent, name, layer in places:
            original = originals[id(layer)]
            parent._modules[name] = original.module if isinstance(original, StoredExperts) else original
        yield
    finally:
        for parent, name, layer in places:
            parent._modules[name] = layer
