"""Hooks on a module of experts: they go on being called when another module takes its place.

Both modules share the tables of hooks, so that handles that were given out before still remove theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.utils import logging

__all__ = ["give_back_hooks", "has_hooks", "hooked", "is_watched", "share_hooks"]

CALLED = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
TABLES = (*CALLED, "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
# Those of engines and ours take what they are given as it comes.
KNOWN = ("deepspeed", "fluid_hf")
logger = logging.get_logger(__name__)


def share_hooks(source: nn.Module, layer: nn.Module) -> None:
    """Let `layer`, which has none yet, have the hooks of `source`. A forward of its own is warned of."""
    if "forward" in vars(source):
        logger.warning_once(
            f"a forward that was set on {type(source).__name__} itself is not called while the model is patched: "
            "fluid_hf computes the experts."
        )
    state: dict[str, Any] = vars(layer)
    for name in (*TABLES, "_is_full_backward_hook"):
        state[name] = vars(source)[name]
    state["hooks_before"] = frozenset(key for name in CALLED for key in state[name])


def give_back_hooks(layer: nn.Module) -> None:
    """Leave the tables those that were in them when they were shared: what was added goes with the layer."""
    before = vars(layer).get("hooks_before", frozenset())
    for name in TABLES:
        table = vars(layer)[name]
        for key in [key for key in table if key not in before]:
            del table[key]


def has_hooks(module: nn.Module) -> bool:
    """Whether any hook on calls of a module is registered."""
    return any(vars(module)[name] for name in CALLED)


def is_watched(experts: Any) -> bool:
    """Whether somebody's own hooks or forward are on experts, or on what wraps them: these know the arguments and the
    result that transformers' experts have.
    """
    while isinstance(experts, nn.Module):
        state = vars(experts)
        if "forward" in state and _root(state["forward"]) not in KNOWN:
            return True
        for name in CALLED:
            if state[name] and any([_root(hook) not in KNOWN for hook in state[name].values()]):
                return True
        experts = experts._modules.get("base_layer")
    return False


def _root(hook: Any) -> str:
    """The package that a hook comes from."""
    return (getattr(hook, "__module__", None) or "").partition(".")[0]


def hooked(weight: torch.Tensor) -> bool:
    """Whether a parameter has hooks on its gradient."""
    return bool(weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None))
