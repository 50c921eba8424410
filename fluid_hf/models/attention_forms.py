"""Attention layers whose projections may be overlapped with their exchange: those whose code says what we compute.

A layer qualifies by the code of its forward, of its norms and of its rotary embedding, not by its family. They must
read like the texts here, docstrings and annotations aside. Any other layer runs its own forward and exchanges heads
around the core attention only: the same results, without this overlap.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["NORM", "AttentionForm", "find_attention_form"]

_FORWARD = """
def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs):
    input_shape = hidden_states.shape[:-1]
    hidden_shape = (*input_shape, -1, self.head_dim)
    query_states = {q}.transpose(1, 2)
    key_states = {k}.transpose(1, 2)
    value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
    cos, sin = position_embeddings
    query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
    if past_key_values is not None:
        key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)
    attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation, eager_attention_forward
    )
    attn_output, attn_weights = attention_interface(
        self, query_states, key_states, value_states, attention_mask,
        dropout=0.0 if not self.training else self.attention_dropout, scaling=self.scaling,{window} **kwargs,
    )
    attn_output = attn_output.reshape(*input_shape, -1).contiguous()
    attn_output = self.o_proj(attn_output)
    return attn_output, attn_weights
"""
_PROJECTED = {
    False: ("self.q_proj(hidden_states).view(hidden_shape)", "self.k_proj(hidden_states).view(hidden_shape)"),
    True: (
        "self.q_norm(self.q_proj(hidden_states).view(hidden_shape))",
        "self.k_norm(self.k_proj(hidden_states).view(hidden_shape))",
    ),
}
_WINDOWS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "": lambda module: {},
    "sliding_window=self.sliding_window,": lambda module: {"sliding_window": module.sliding_window},
    'sliding_window=getattr(self.config, "sliding_window", None),': lambda module: {
        "sliding_window": getattr(module.config, "sliding_window", None)
    },
}
_ROTARY = """
def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed
"""
_HALF = """
def rotate_half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)
"""
NORM = """
def forward(self, hidden_states):
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)
"""


@dataclass(frozen=True)
class AttentionForm:
    """What a recognised forward does.

    Attributes:
        normed: whether queries and keys are normed along the head (`q_norm`, `k_norm`).
        window: further arguments of the core.
    """

    normed: bool
    window: Callable[[Any], dict[str, Any]]


def _canonical(source: str) -> str:
    """The statements of a function without docstring and annotations, and the names of its arguments."""
    function = ast.parse(textwrap.dedent(source)).body[0]
    assert isinstance(function, ast.FunctionDef)
    body = function.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    for node in ast.walk(function):
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    names = [argument.arg for argument in function.args.args]
    return f"{names} {[ast.dump(statement) for statement in body]}"


def _reads_like(function: Any, text: str) -> bool:
    """Whether a function reads like this, under what transformers decorates it with."""
    try:
        return _canonical(inspect.getsource(inspect.unwrap(function))) == _canonical(text)
    except (OSError, TypeError, SyntaxError, AssertionError):
        return False


def _is_plainly(method: Any, text: str) -> bool:
    """Whether a method reads like this and nobody has wrapped it since."""
    return not hasattr(method, "__wrapped__") and _reads_like(method, text)


def find_attention_form(module: nn.Module) -> AttentionForm | None:
    """The form of a layer's forward, or `None` if it reads like none of them."""
    kind: Any = type(module)
    space = getattr(kind.forward, "__globals__", {})  # where it was defined, which a class that inherits it need not be
    if "forward" in vars(module) or not all(
        _reads_like(space.get(name), text) for name, text in (("apply_rotary_pos_emb", _ROTARY), ("rotate_half", _HALF))
    ):
        return None
    for normed, (q, k) in _PROJECTED.items():
        for window, arguments in _WINDOWS.items():
            if _is_plainly(kind.forward, _FORWARD.format(q=q, k=k, window=window)):
                norms = [type(getattr(module, name)) for name in ("q_norm", "k_norm")] if normed else []
                if all(_is_plainly(norm.forward, NORM) for norm in norms):
                    return AttentionForm(normed, arguments)
    return None
