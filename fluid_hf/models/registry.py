"""Finds the experts modules of a Hugging Face model and checks that they can be patched.

A module qualifies by its interface, not by its family: transformers' `use_experts_implementation` experts, called as
`experts(hidden [T, H], top_k_index [T, K], top_k_weights [T, K])`; or a `nn.ModuleList` of experts in a block whose
code is known (`fluid_hf.models.expert_lists`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fluid_hf.errors import UnsupportedModelError
from fluid_hf.models.adapters import adapters_of
from fluid_hf.models.expert_blocks import block_methods
from fluid_hf.models.expert_formats import expert_format, is_experts, weight_names
from fluid_hf.models.expert_hooks import has_hooks, hooked
from fluid_hf.models.expert_lists import is_expert_list, read_expert_list
from fluid_hf.models.other_experts import OTHER_EXPERTS, read_other_experts
from fluid_hf.models.shared_experts import find_form
from fluid_hf.models.stored_experts import StoredExperts, stored_parameters
from fluid_hf.moe.expert_math import ExpertFormat

__all__ = ["LOADED_SHARE", "ExpertsSite", "check_loaded", "check_unshared", "find_experts", "has_experts"]

# Set on an experts module that holds this rank's experts only: the number of experts of the layer.
LOADED_SHARE = "_fluid_num_experts"


@dataclass(frozen=True)
class ExpertsSite:
    """One experts module and where it hangs.

    Attributes:
        name: module name.
        parent, attribute: what holds it.
        module: the experts.
        weight_names: names of the weights with one slice per expert.
        format: what the experts compute, if it is not `act(gate) * up` between two plain projections.
        methods: methods that take the place of the block's own, by name.
    """

    name: str
    parent: nn.Module
    attribute: str
    module: nn.Module | StoredExperts
    weight_names: tuple[str, ...]
    format: ExpertFormat | None
    methods: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        if isinstance(self.module, StoredExperts):
            return self.module.shape("down_proj")[0]
        if hasattr(self.module, LOADED_SHARE):
            return int(getattr(self.module, LOADED_SHARE))
        return int(self.parameter_shape("down_proj")[0])

    def parameter_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter, also when ZeRO-3 has partitioned it."""
        if isinstance(self.module, StoredExperts):
            return self.module.shape(name)
        parameter = getattr(self.module, name)
        return tuple(getattr(parameter, "ds_shape", parameter.shape))


def find_experts(model: nn.Module) -> list[ExpertsSite]:
    """All experts modules of a model, checked.

    Raises:
        UnsupportedModelError: there is none, or one that cannot be patched; names its class and what is missing.
    """
    _check_model(model)
    sites = []
    for name, module in model.named_modules():
        if is_experts(module):
            sites.append(_make_site(model, name, module))
        elif is_stored_otherwise(name, module):
            sites.append(_make_stored_site(model, name, module))
    if not sites:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no experts module with transformers' experts interface "
            "(`use_experts_implementation`: gate_up_proj and down_proj as 3-D parameters) and no nn.ModuleList of "
            "experts; patch a mixture-of-experts model such as Mixtral, Qwen2-MoE or Qwen3-MoE."
        )
    return sites


def has_experts(model: nn.Module) -> bool:
    """Whether any module is one of experts, or a list of them."""
    return any(is_experts(module) or is_stored_otherwise(name, module) for name, module in model.named_modules())


def check_loaded(sites: Sequence[ExpertsSite]) -> None:
    """Experts must be there: those on the meta device have no values to share out.

    Raises:
        UnsupportedModelError: the model was built there, or a `device_map` has left some of it on disk or on the CPU;
            names the layer.
    """
    for site in sites:
        if any(weight.is_meta for name in site.weight_names for weight in stored_parameters(site.module, name)):
            raise UnsupportedModelError(
                f"the experts of {site.name} must be loaded but are on the meta device, without values; load the model "
                "without a device_map that offloads parts of it, or with fluid_hf.from_pretrained, which reads on each "
                "rank its own experts only."
            )


def check_unshared(model: nn.Module, sites: Sequence[ExpertsSite]) -> None:
    """Weights to be split must belong to one block: another one that reads them would find some of the experts only.

    Raises:
        UnsupportedModelError: experts, or weights of theirs, are in several places, are to be saved with adapters, or
            have hooks on their gradients; names the layer.
    """
    parents = Counter(id(child) for module in model.modules() for child in module.children())
    holders = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    for site in sites:
        _check_gradient_hooks(site.name, site.module, site.weight_names)
        if ".modules_to_save." in site.name:
            raise UnsupportedModelError(
                f"the experts of {site.name} (modules_to_save) must not be among what PEFT saves from one rank while "
                "ep_size is over 1; adapt them by target_parameters, or set ep_size 1."
            )
        module = site.module.module if isinstance(site.module, StoredExperts) else site.module
        weights = [weight for name in site.weight_names for weight in stored_parameters(site.module, name)]
        if parents[id(module)] > 1 or any(holders[id(weight)] > 1 for weight in weights):
            raise UnsupportedModelError(
                f"the experts of {site.name} must not be those of another layer too while ep_size is over 1; give each "
                "layer its own experts, let layers share the whole block, or set ep_size 1."
            )


def _check_call_hooks(module: nn.Module, where: str) -> None:
    """Hooks on experts, or parts of them, that are called in another way than transformers' interface asks for."""
    if has_hooks(module):
        raise UnsupportedModelError(
            f"{where} has hooks, which would be called with other arguments; register them after patch_model."
        )


def _check_gradient_hooks(name: str, experts: Any, weight_names: Sequence[str]) -> None:
    """Hooks on gradients of weights that the layer holds in parameters of its own: split, or stored otherwise."""
    for weight in weight_names:
        if any(map(hooked, stored_parameters(experts, weight))):
            remedy = "" if isinstance(experts, StoredExperts) else ", or set ep_size 1"
            raise UnsupportedModelError(
                f"{name}.{weight} has hooks on its gradient, which would not be called: other parameters hold the "
                f"experts of this rank; register them on those, after patch_model{remedy}."
            )


def _check_model(model: nn.Module) -> None:
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is quantised (hf_quantizer {type(quantizer).__name__}); load it unquantised."
        )
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} is tensor parallel already (tp_size {model._tp_size}); load it without tp_plan."
        )


def _make_site(model: nn.Module, name: str, module: nn.Module) -> ExpertsSite:
    where = f"{type(module).__name__} ({name})"
    if getattr(module, "_is_expert_parallel", False):
        raise UnsupportedModelError(f"{where} is expert parallel already; load the model without expert parallelism.")
    names = weight_names(module)
    for weight in names:
        _check_weight(module, weight, where)
    biases = {getattr(module, weight).requires_grad for weight in names if weight.endswith("_bias")}
    if len(biases) > 1:
        raise UnsupportedModelError(f"{where} has one frozen and one trainable bias; freeze both or neither.")
    parent, _, attribute = name.rpartition(".")
    first_dimensions = {_shape(getattr(module, weight))[0] for weight in names}
    if len(first_dimensions) > 1:
        raise UnsupportedModelError(f"{where} has weights for different numbers of experts {sorted(first_dimensions)}.")
    format = expert_format(module, where)
    if format is not None and format.scale_input and find_form(type(model.get_submodule(parent))) is None:
        raise UnsupportedModelError(
            f"{where} is called in a way that is not known; patch_model knows transformers 5.23."
        )
    if format is not None and format.scale_input:
        _check_call_hooks(module, where)
    block = model.get_submodule(parent.rpartition(".")[0])
    if hasattr(block, "text_moe") and hasattr(block, "vision_moe") and find_form(type(block)) is None:
        raise UnsupportedModelError(
            f"{type(block).__name__} calls its experts for some batches only, in a way that "
            "is not known; ranks would wait for each other."
        )
    return ExpertsSite(name, model.get_submodule(parent), attribute, module, names, format)


def is_stored_otherwise(name: str, module: nn.Module) -> bool:
    """Whether a module holds experts in another way than transformers' interface asks for."""
    return is_expert_list(name, module) or type(module).__name__ in OTHER_EXPERTS


def _make_stored_site(model: nn.Module, name: str, module: nn.Module) -> ExpertsSite:
    parent, _, attribute = name.rpartition(".")
    block = model.get_submodule(parent)
    where = f"{type(block).__name__} ({name})"
    experts: StoredExperts
    if isinstance(module, nn.ModuleList):
        experts = read_expert_list(module, where)
        methods = block_methods(block, attribute, f"{type(block).__name__} ({parent})")
    else:
        experts, methods = read_other_experts(module, block, where)
        for part in module.modules():
            _check_call_hooks(part, where)
        if adapters_of(model, module):
            raise UnsupportedModelError(f"{where} has adapters (target_parameters), which are not known how to split.")
    for weight in experts.weight_names:
        _check_values(experts.parameters(weight)[0], f"{where}.{weight}")
    _check_gradient_hooks(name, experts, experts.weight_names)
    return ExpertsSite(name, block, attribute, experts, experts.weight_names, experts.format, methods)


def _shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Shape of a parameter, also when ZeRO-3 has partitioned it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _check_weight(module: nn.Module, name: str, where: str) -> None:
    parameter = getattr(module, name, None)
    dimensions = 2 if name.endswith("_bias") else 3
    if not isinstance(parameter, nn.Parameter) or len(_shape(parameter)) != dimensions:
        raise UnsupportedModelError(f"{where} has no {dimensions}-D parameter {name}.")
    _check_values(parameter, f"{where}.{name}")


def _check_values(parameter: nn.Parameter, where: str) -> None:
    if type(parameter.data) is not torch.Tensor:
        kind = type(parameter.data).__name__
        raise UnsupportedModelError(f"{where} is a {kind}; only plain tensors can be split over ranks.")
    if not parameter.dtype.is_floating_point or parameter.dtype.itemsize < 2:
        raise UnsupportedModelError(
            f"{where} has dtype {parameter.dtype} (quantised); load the model in bfloat16 or float32."
        )
