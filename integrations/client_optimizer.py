"""What `deepspeed.initialize` is given to optimize: an optimizer, one to be made, or the parameters of the JSON's."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from fluid_hf.errors import ConfigError
from fluid_hf.integrations.deepspeed_checks import (
    check_adagrad,
    check_optimizer,
    offloads_optimizer,
    zero_settings,
)
from fluid_hf.integrations.optimizer_groups import split_expert_groups, split_groups
from fluid_hf.state import FluidState

__all__ = ["prepare_optimizer"]


def prepare_optimizer(
    arguments: dict[str, Any], settings: Any, model: nn.Module, state: FluidState, *, split: type
) -> None:
    """Give split experts optimizer groups of their own, in place, and refuse what would not train the model.

    Args:
        arguments: those of `deepspeed.initialize`.
        settings: DeepSpeed's settings.
        model: the patched model, or what wraps it.
        state: its state.
        split: class of layers for which DeepSpeed makes optimizer groups.

    Raises:
        ConfigError: parameters are not the model's, or experts are missing.
    """
    optimizer, parameters = arguments.get("optimizer"), arguments.get("model_parameters")
    if optimizer is not None:
        arguments["optimizer"] = _prepared(optimizer, settings, model, state, split)
    elif isinstance(settings, dict) and settings.get("optimizer"):
        # With offload it is DeepSpeed's own, which stays as it is.
        if _kind(settings) == "adagrad" and not offloads_optimizer(zero_settings(settings)):
            check_adagrad("optimizer.type", settings, state)
        if parameters is not None:
            arguments["model_parameters"] = _grouped(parameters, settings, model, state, split)


def _prepared(optimizer: Any, settings: Any, model: nn.Module, state: FluidState, split: type) -> Any:
    """A caller's optimizer, or a function that makes one."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        if not callable(optimizer):
            return optimizer

        @functools.wraps(optimizer)
        def make(*args: Any, **kwargs: Any) -> Any:
            return _prepared(optimizer(*args, **kwargs), settings, model, state, split)

        return make
    name = f"optimizer ({type(optimizer).__name__})"
    _refuse_unknown(name, "the optimizer is built", optimizer.param_groups, model)
    if isinstance(optimizer, torch.optim.Adagrad):
        check_adagrad("optimizer", settings, state)
    if any(isinstance(layer, split) for layer in state.layers.values()):
        split_groups(optimizer)
    check_optimizer(name, settings, optimizer.param_groups, state, split=split)
    return optimizer


def _grouped(parameters: Any, settings: dict[str, Any], model: nn.Module, state: FluidState, split: type) -> Any:
    """The parameters that the JSON's optimizer gets, as accelerate's `DummyOptim` passes them on, too.

    DeepSpeed splits a list of parameters for the experts by itself, groups only if each has a name of its own.
    """
    listed = list(parameters)
    grouped = bool(listed) and all(isinstance(item, dict) for item in listed)
    groups = [{**group, "params": _list(group["params"])} for group in listed] if grouped else [{"params": listed}]
    name = "model_parameters"
    _refuse_unknown(name, "they are collected", groups, model)
    places = split_expert_groups(groups)
    check_optimizer(name, settings, groups, state, split=split)
    if not grouped:
        return listed
    if _kind(settings) == "muon":
        # DeepSpeed splits these once more, and takes groups of one name for one group.
        for place, group in zip(places, groups, strict=True):
            if group.get("moe"):
                group["name"] = f"{group['name']}-{place}"
    return groups


def _kind(settings: dict[str, Any]) -> str:
    """The type of the JSON's optimizer, in small letters as DeepSpeed compares it."""
    block = settings["optimizer"]
    return str(block.get("type", "")).lower() if isinstance(block, dict) else ""


def _list(parameters: Any) -> list[Any]:
    return [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)


def _refuse_unknown(name: str, made: str, groups: list[dict[str, Any]], model: nn.Module) -> None:
    """Refuse the weights of before `patch_model`, which would be trained in place of the model's."""
    known = {id(parameter) for parameter in model.parameters()}
    unknown = sum(id(parameter) not in known for group in groups for parameter in group["params"])
    if unknown:
        raise ConfigError(
            f"{name} holds {unknown} parameters that are not the model's; call patch_model before {made}."
        )
