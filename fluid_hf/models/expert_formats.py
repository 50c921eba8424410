"""Reads from an experts module of transformers what it computes: names of its weights, and their arithmetic.

`use_experts_implementation` says whether experts have a gate, biases, transposed weights or a norm after them; a gate
of their own is the method `_apply_gate`, which is used as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.integrations import moe as transformers_moe

from fluid_hf.errors import UnsupportedModelError
from fluid_hf.moe.activation import activated
from fluid_hf.moe.expert_math import ExpertFormat

__all__ = ["expert_format", "extra_modules", "is_experts", "weight_names"]

# Children of an experts module that may have parameters: every rank keeps them whole.
EXTRA_MODULES = ("act_fn", "post_expert_norm")


# Experts that are given every token for every expert, scaled by its routing weight; their block needs a form of ours.
SCALED_INPUT = ("Llama4TextExperts",)


def is_experts(module: nn.Module) -> bool:
    """Whether a module follows transformers' experts interface, or is known to compute the same in another way."""
    if type(module).__name__ in SCALED_INPUT:
        return True
    called = inspect.signature(module.forward).parameters if hasattr(module, "_apply_gate") else {}
    return hasattr(module, "has_gate") and hasattr(module, "_apply_gate") or "top_k_weights" in called


def weight_names(module: Any) -> tuple[str, ...]:
    """Names of the weights with one slice per expert."""
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    if getattr(module, "has_bias", False):
        return (first, f"{first}_bias", "down_proj", "down_proj_bias")
    return (first, "down_proj")


def expert_format(module: Any, where: str) -> ExpertFormat | None:
    """What the experts compute; `None` for `act(gate) * up` between two plain projections.

    Raises:
        UnsupportedModelError: the module has parameters whose use is unknown.
    """
    names = weight_names(module)
    extra = {name: parameter for name, parameter in module.named_parameters() if name not in names}
    for name in extra:
        if name.partition(".")[0] not in EXTRA_MODULES:
            raise UnsupportedModelError(
                f"{where} has a parameter {name}, which is neither a projection, a bias, a norm after the experts nor "
                "part of the activation; its gradient would be unknown."
            )
    if type(module).__name__ in SCALED_INPUT:
        return ExpertFormat(_gate_of(module.act_fn), transposed=True, scale_input=True)
    norm = module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None
    default_gate = type(module)._apply_gate is transformers_moe._default_apply_gate
    transposed = bool(getattr(module, "is_transposed", False))
    concatenated = bool(getattr(module, "is_concatenated", True))
    if default_gate and not concatenated:
        raise UnsupportedModelError(
            f"{where} has is_concatenated=False but no _apply_gate of its own, so its layout of gate and up is unknown."
        )
    has_gate = getattr(module, "has_gate", True)
    if has_gate and default_gate and len(names) == 2 and not transposed and norm is None and not extra:
        return None
    gate: Callable[[torch.Tensor], torch.Tensor] = module._apply_gate if has_gate else module.act_fn
    return ExpertFormat(gate, transposed=transposed, norm=norm, extra=extra)


def _gate_of(act: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def gate(gate_up_SN: torch.Tensor) -> torch.Tensor:
        gate_SI, up_SI = gate_up_SN.chunk(2, dim=-1)
        return up_SI * activated(act, gate_SI)

    return gate


def extra_modules(module: Any) -> dict[str, nn.Module]:
    """Children that the layer in its place keeps, for their parameters and buffers."""
    if not isinstance(module, nn.Module):  # a list of experts, whose code has neither
        return {}
    children = dict(module.named_children())
    return {name: children[name] for name in EXTRA_MODULES if name in children}
