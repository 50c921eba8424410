"""Gated activation with the routing weight folded in: `w * act(gate) * up`, forward and backward.

Legend: S pairs, I intermediate size. Folding the routing weight in before the down projection gives the same output
as scaling after it, and its gradient without keeping the expert's output: with `dhw` the gradient of `w * h`,
`dw = <dhw, h>` and `dh = w * dhw`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from fluid_hf.errors import ConfigError
from fluid_hf.moe.permutation import sum_dtype

__all__ = ["Activation", "activated", "glu_backward", "glu_forward", "is_silu"]

Activation = Callable[[torch.Tensor], torch.Tensor]
_SILU = (("torch.nn.modules.activation", "SiLU"), ("transformers.activations", "SiLUActivation"))


def is_silu(act: Activation) -> bool:
    """Whether `act` is SiLU, as torch or transformers write it."""
    if act is functional.silu:
        return True
    return (type(act).__module__, type(act).__name__) in _SILU and "forward" not in vars(act)


def activated(act: Activation, input: torch.Tensor) -> torch.Tensor:
    """`act(input)`, and `input` as it was: backward reads it again. Copied only for an `act` that says it is in place.

    Raises:
        ConfigError: `act` works in place without an attribute `inplace` that says so.
    """
    if getattr(act, "inplace", False):
        return act(input.clone())
    if input.is_inference():  # nothing is kept, and no version is counted
        return act(input)
    version = input._version
    result = act(input)
    if input._version != version:
        raise ConfigError(
            f"act ({act!r}) must not write to its input, which backward needs; pass one that returns a new tensor."
        )
    return result


def glu_forward(gate_SI: torch.Tensor, up_SI: torch.Tensor, weight_S: torch.Tensor, act: Activation) -> torch.Tensor:
    """`weight * act(gate) * up`: [S, I] in the type of `gate`, computed in float32 or wider."""
    wide = sum_dtype(gate_SI.dtype)
    hidden = activated(act, gate_SI.to(wide)) * up_SI.to(wide)
    return (hidden * weight_S[:, None].to(wide)).to(gate_SI.dtype)


def glu_backward(
    grad_SI: torch.Tensor, gate_SI: torch.Tensor, up_SI: torch.Tensor, weight_S: torch.Tensor, act: Activation
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Backward of `glu_forward`.

    Args:
        grad_SI: gradient of the output.
        gate_SI, up_SI, weight_S, act: the arguments of forward.

    Returns:
        Gradients of gate and up [S, I], the forward output again [S, I] (for the weight gradient of the down
        projection), and the gradient of the routing weight [S] in float32 or wider.
    """
    wide = sum_dtype(gate_SI.dtype)
    grad, gate, up, weight = grad_SI.to(wide), gate_SI.to(wide), up_SI.to(wide), weight_S[:, None].to(wide)
    value, slope = _value_and_slope(gate, act)
    hidden = value * up
    grad_weight = (grad * hidden).sum(-1)
    grad_hidden = grad * weight
    dtype = gate_SI.dtype
    return (
        (grad_hidden * up * slope).to(dtype),
        (grad_hidden * value).to(dtype),
        (hidden * weight).to(dtype),
        grad_weight,
    )


def _value_and_slope(gate: torch.Tensor, act: Activation) -> tuple[torch.Tensor, torch.Tensor]:
    """`act(gate)` and its elementwise derivative."""
    if is_silu(act):
        sigmoid = torch.sigmoid(gate)
        value = gate * sigmoid
        return value, sigmoid * (1 + gate - value)
    with torch.enable_grad():
        leaf = gate.detach().requires_grad_()
        value = activated(act, leaf)
        (slope,) = torch.autograd.grad(value, leaf, torch.ones_like(value))
    return value.detach(), slope
