"""The norms and gated MLPs of a patched model, by one kernel each way where the kernels serve their tensors.

What reads exactly like the text here, names of local variables aside, has the form; others keep their own forward, as
does what somebody has patched before. Modules stay what and where they are, with their weights, hooks and adapters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fluid_hf.models.expert_hooks import is_watched
from fluid_hf.models.shared_experts import bind_methods, canonical_text, unbind_methods
from fluid_hf.moe.activation import is_silu
from fluid_hf.moe.block_parts import fuses_norm, fuses_swiglu, rms_norm, swiglu

__all__ = ["bind_parts", "unbind_parts"]

NORMS = (
    """
def forward(self, hidden_states):
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)
""",
    """
def forward(self, hidden_states):
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return (self.weight * hidden_states).to(input_dtype)
""",
)
GATED = (
    """
def forward(self, x):
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj
""",
    """
def forward(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
""",
)


def norm_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """RMSNorm in one launch."""
    if fuses_norm(hidden_states, self.weight):
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)
    result: torch.Tensor = type(self).forward(self, hidden_states)
    return result


def gated_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Gated MLP with SwiGLU in one launch."""
    gate, up = self.gate_proj(x), self.up_proj(x)
    fused = is_silu(self.act_fn) and not is_watched(self.act_fn) and fuses_swiglu(gate, up)
    result: torch.Tensor = self.down_proj(swiglu(gate, up) if fused else self.act_fn(gate) * up)
    return result


_FORMS: dict[str | None, Callable[..., torch.Tensor]] = {
    **{canonical_text(text): norm_forward for text in NORMS},
    **{canonical_text(text): gated_forward for text in GATED},
}


def bind_parts(model: nn.Module) -> list[nn.Module]:
    """Give every norm and gated MLP of these forms the forward that fuses it; returns them."""
    known: dict[type, Callable[..., torch.Tensor] | None] = {}
    bound = []
    for module in model.modules():
        kind = type(module)
        if kind not in known:
            known[kind] = _form_of(kind)
        form = known[kind]
        if form is not None and "forward" not in vars(module):
            bind_methods(module, {"forward": form})
            bound.append(module)
    return bound


def unbind_parts(bound: list[nn.Module]) -> None:
    """Give the modules their classes' own forwards back, but where somebody wrapped them since."""
    for module in bound:
        if getattr(vars(module).get("forward"), "__func__", None) in (norm_forward, gated_forward):
            unbind_methods(module, ["forward"])
    bound.clear()


def _form_of(kind: type[nn.Module]) -> Callable[..., torch.Tensor] | None:
    try:
        text = canonical_text(inspect.getsource(kind.forward))
    except (OSError, TypeError, SyntaxError):  # no source, or not a function in a file of its own
        return None
    return None if text is None else _FORMS.get(text)
