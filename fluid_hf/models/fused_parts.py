"""Norms, rotary embeddings and gated MLPs of a patched model, by one kernel each way where it serves their tensors.

What reads exactly like the text here, names of local variables aside, has the form; others keep their own forward, as
does what somebody has patched before. Modules stay what and where they are, with their weights, hooks and adapters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from fluid_hf.models.attention_forms import NORM, AttentionForm, find_attention_form
from fluid_hf.models.expert_hooks import is_watched
from fluid_hf.models.shared_experts import bind_methods, canonical_text, method_text, unbind_methods
from fluid_hf.moe.activation import is_silu
from fluid_hf.moe.block_parts import fuses_norm, fuses_rotary, fuses_swiglu, rms_norm, rotary, swiglu

__all__ = ["bind_parts", "is_fused", "unbind_parts"]

Forward = Callable[..., Any]
MARK = "_fluid_part"
NORMS = (
    NORM,
    NORM.replace("self.weight * hidden_states.to(input_dtype)", "(self.weight * hidden_states).to(input_dtype)"),
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


def attention_forward(kind: type[nn.Module], form: AttentionForm) -> Forward:
    """The forward of an attention layer of that class and form, with the rotary embedding in one launch."""
    space: dict[str, Any] = kind.forward.__globals__

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        q, k = self.q_proj(hidden_states).view(hidden_shape), self.k_proj(hidden_states).view(hidden_shape)
        if form.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        v = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        cos, sin = position_embeddings
        q, k = rotary(q, k, cos, sin) if fuses_rotary(q, k, cos, sin) else space["apply_rotary_pos_emb"](q, k, cos, sin)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        core = space["ALL_ATTENTION_FUNCTIONS"].get_interface(
            self.config._attn_implementation, space["eager_attention_forward"]
        )
        dropout = self.attention_dropout if self.training else 0.0
        options = {"dropout": dropout, "scaling": self.scaling, **form.window(self), **kwargs}
        output, weights = core(self, q, k, v, attention_mask, **options)
        return self.o_proj(output.reshape(*input_shape, -1).contiguous()), weights

    return _marked(forward)


def _marked(function: Forward) -> Forward:
    """Known as ours wherever it goes; copies in a pickle become their class's own forward, by its name."""
    function.__name__ = "forward"
    vars(function)[MARK] = True
    return function


_FORMS: dict[str | None, Forward] = {
    **{canonical_text(text): _marked(norm_forward) for text in NORMS},
    **{canonical_text(text): _marked(gated_forward) for text in GATED},
}


def bind_parts(model: nn.Module) -> None:
    """Give every norm, gated MLP and attention layer of these forms the forward that fuses it."""
    known: dict[type, Forward | None] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in known:
            known[kind] = _form_of(module)
        form = known[kind]
        if form is not None and "forward" not in vars(module):
            bind_methods(module, {"forward": form})


def unbind_parts(model: nn.Module) -> None:
    """Give the modules their classes' own forwards back, also where hooks of accelerate keep them for later; what
    somebody has put in their place stays.
    """
    for module in model.modules():
        if is_fused(module):
            unbind_methods(module, ["forward"])
        if _is_ours(vars(module).get("_old_forward")):
            module._old_forward = MethodType(type(module).forward, module)  # type: ignore[assignment]


def is_fused(module: nn.Module) -> bool:
    """Whether a module has a forward from here."""
    return _is_ours(vars(module).get("forward"))


def _is_ours(method: Any) -> bool:
    return hasattr(getattr(method, "__func__", None), MARK)


def _form_of(module: nn.Module) -> Forward | None:
    """The forward for a module's class; what else a model may hold (scripted modules, code without a file) has none."""
    kind = type(module)
    try:
        form = _FORMS.get(method_text(kind.forward))
        if form is not None:
            # Callers may name the argument.
            same = list(inspect.signature(kind.forward).parameters) == list(inspect.signature(form).parameters)
            return form if same else None
        found = find_attention_form(module) if hasattr(module, "q_proj") else None
    except Exception:
        return None
    return None if found is None else attention_forward(kind, found)
