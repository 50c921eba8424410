"""PEFT's LoRA on expert weights (`target_parameters`) when the experts are split over ranks.

PEFT wraps the experts module in one `ParamWrapper` per weight, which adds the low-rank product to the weight for the
time of a forward. The factors, small beside the experts, stay whole on every rank, where engines treat them as dense
parameters: each rank's gradient is that of the experts it holds, summed over all tokens of the expert-parallel group,
so the mean over ranks is the gradient of the mean loss. Only the product is restricted to the experts held here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from fluid_hf.errors import ConfigError
from fluid_hf.moe.layer import ExpertParallelLayer

__all__ = [
    "adapters_of",
    "check_adapters",
    "inside_adapters",
    "join_adapters",
    "refuse_late_adapters",
    "saves_adapters",
    "split_adapters",
]

METHODS = ("get_delta_factors", "get_delta_weight", "unload_and_optionally_merge_module")


def inside_adapters(model: Any) -> nn.Module:
    """The transformers model inside PEFT's wrapper, or the model itself."""
    inner: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner


def saves_adapters(model: Any) -> bool:
    """Whether the model's own `save_pretrained` writes adapters alone: it is PEFT's, or has some by `add_adapter`."""
    return hasattr(model, "get_base_model") or getattr(model, "_hf_peft_config_loaded", False)


def adapters_of(model: nn.Module, experts: nn.Module) -> list[Any]:
    """PEFT's wrappers around the weights of an experts module."""
    wrappers: list[Any] = [module for module in model.modules() if type(module).__name__ == "ParamWrapper"]
    return [wrapper for wrapper in wrappers if wrapper.get_base_layer() is experts]


def split_adapters(wrappers: list[Any], layer: ExpertParallelLayer) -> None:
    """Let the wrappers add only the rows of the experts that `layer` holds."""
    start = layer.ep_rank * layer.num_local_experts
    held = slice(start, start + layer.num_local_experts)
    for wrapper in wrappers:
        own = type(wrapper)

        def factors(adapter_name: str, wrapper: Any = wrapper, own: Any = own) -> tuple[Any, Any, float]:
            left, right, scaling = own.get_delta_factors(wrapper, adapter_name)
            return left[held], right[held], scaling

        def product(adapter_name: str, *args: Any, wrapper: Any = wrapper, own: Any = own, **kwargs: Any) -> Any:
            return own.get_delta_weight(wrapper, adapter_name, *args, **kwargs)[held]

        def unload(*args: Any, wrapper: Any = wrapper, own: Any = own, **kwargs: Any) -> Any:
            layer.adapters_are_split = False  # those that follow would not be
            return own.unload_and_optionally_merge_module(wrapper, *args, **kwargs)

        wrapper.get_delta_factors, wrapper.get_delta_weight = factors, product
        wrapper.unload_and_optionally_merge_module = unload
    layer.adapters_are_split = True


def check_adapters(model: nn.Module, layers: Iterable[ExpertParallelLayer]) -> None:
    """Raise if PEFT was asked for adapters on experts that were split already: it finds no such weights, silently.

    Raises:
        ConfigError: `target_parameters` names expert weights, and the model was patched before PEFT wrapped it.
    """
    configs = getattr(model, "peft_config", None)
    for config in configs.values() if isinstance(configs, dict) else ():
        targets = sorted(getattr(config, "target_parameters", None) or ())
        if not targets:
            continue
        late = [layer for layer in layers if layer.ep_size > 1 and not layer.adapters_are_split]
        weights = [f".{layer.context.name}.{weight}" for layer in late for weight in layer.weight_names]
        # PEFT matches ends of names; "all-linear", and old names of experts, become `down_proj` alone.
        names = [t for t in targets if "experts" in t or any(weight.endswith(f".{t}") for weight in weights)]
        if names and late:
            raise ConfigError(
                f"target_parameters ({names[0]}) must be adapted before the experts are split over ranks (ep_size "
                f"({late[0].ep_size}) over 1); call get_peft_model first, or load the adapters, and call patch_model "
                'after it, or name target_modules without the experts ("all-linear" adapts them, too).'
            )


def refuse_late_adapters(model: nn.Module, layers: Sequence[ExpertParallelLayer]) -> None:
    """Check in every forward pass, also without an engine, as generation with adapters that were loaded is.

    PEFT calls the model's `forward` itself, past its hooks, so that the first layer has it; it goes with the layer.

    Args:
        model: the patched model, to which PEFT gives its configurations.
        layers: its layers with experts that are split.
    """

    @torch.compiler.disable
    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        if "peft_config" in vars(model):
            check_adapters(model, layers)

    if layers:
        layers[0].register_forward_pre_hook(look)


def join_adapters(wrappers: list[Any]) -> None:
    """Give the wrappers their class's own methods back."""
    for wrapper in wrappers:
        for name in METHODS:
            vars(wrapper).pop(name, None)
