"""Finds the experts modules of a Hugging Face model and checks that they can be patched.

A module qualifies by its interface, not by its family: transformers' `use_experts_implementation` experts, called as
`experts(hidden [T, H], top_k_index [T, K], top_k_weights [T, K])`, gated, without bias, not transposed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.integrations import moe as transformers_moe

from fluid_hf.errors import UnsupportedModelError

__all__ = ["LOADED_SHARE", "ExpertsSite", "find_experts", "has_experts"]

# Set on an experts module that holds this rank's experts only: the number of experts of the layer.
LOADED_SHARE = "_fluid_num_experts"


@dataclass(frozen=True)
class ExpertsSite:
    """One experts module and where it hangs."""

    name: str
    parent: nn.Module
    attribute: str
    module: nn.Module

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        if hasattr(self.module, LOADED_SHARE):
            return int(getattr(self.module, LOADED_SHARE))
        return int(self.parameter_shape("down_proj")[0])

    def parameter_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter, also when ZeRO-3 has partitioned it."""
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
        if _is_experts(module):
            parent_name, _, attribute = name.rpartition(".")
            site = ExpertsSite(name, model.get_submodule(parent_name), attribute, module)
            _check_site(site)
            sites.append(site)
    if not sites:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no experts module with transformers' experts interface "
            "(`use_experts_implementation`: gate_up_proj and down_proj as 3-D parameters); patch a mixture-of-experts "
            "model such as Mixtral, Qwen2-MoE or Qwen3-MoE."
        )
    return sites


def has_experts(model: nn.Module) -> bool:
    """Whether any module follows transformers' experts interface."""
    return any(_is_experts(module) for module in model.modules())


def _is_experts(module: nn.Module) -> bool:
    return hasattr(module, "_apply_gate") and hasattr(module, "has_gate")


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


def _check_site(site: ExpertsSite) -> None:
    module, where = site.module, f"{type(site.module).__name__} ({site.name})"
    if getattr(module, "_is_expert_parallel", False):
        raise UnsupportedModelError(f"{where} is expert parallel already; load the model without expert parallelism.")
    wanted = (
        ("has_gate", True, "gated experts"),
        ("has_bias", False, "experts without bias"),
        ("is_transposed", False, "weights as [experts, out, in]"),
        ("is_concatenated", True, "gate and up projections one after the other"),
        ("has_post_expert_norm", False, "experts without a norm after them"),
    )
    for attribute, value, meaning in wanted:
        if getattr(module, attribute, value) != value:
            raise UnsupportedModelError(f"{where} has {attribute}={not value}; only {meaning} can be patched.")
    if getattr(type(module), "_apply_gate", None) is not transformers_moe._default_apply_gate:
        raise UnsupportedModelError(f"{where} has its own _apply_gate; only act(gate) * up can be patched.")
    for name in ("gate_up_proj", "down_proj"):
        parameter = getattr(module, name, None)
        if not isinstance(parameter, nn.Parameter) or len(site.parameter_shape(name)) != 3:
            raise UnsupportedModelError(f"{where} has no 3-D parameter {name}.")
        if type(parameter.data) is not torch.Tensor:
            kind = type(parameter.data).__name__
            raise UnsupportedModelError(f"{where}.{name} is a {kind}; only plain tensors can be split over ranks.")
        if not parameter.dtype.is_floating_point or parameter.dtype.itemsize < 2:
            raise UnsupportedModelError(
                f"{where}.{name} has dtype {parameter.dtype} (quantised); load the model in bfloat16 or float32."
            )
