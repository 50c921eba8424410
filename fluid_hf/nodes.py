"""Autograd nodes of this package's own tensors, applied with less work for the host than `Function.apply`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _python_dispatch as dispatch
from torch.utils import checkpoint

__all__ = ["apart", "apply_inner", "apply_or_run"]

_AS_IT_IS = contextlib.nullcontext()
# What selective activation checkpointing sees operations through, in forward and when it runs again.
_SELECTIVE = checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode


def apply_inner(node: type[torch.autograd.Function], *args: Any) -> Any:
    """`node.apply` on tensors made here: past torch's search of the arguments for what a transform left (3 us)."""
    return super(torch.autograd.Function, node).apply(*args)  # type: ignore[misc]


class _NoBackward:
    """A node's context where no backward pass follows: it keeps nothing beyond the call."""

    def set_materialize_grads(self, value: bool) -> None:
        pass

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        pass


def apply_or_run(node: Any, *args: Any) -> Any:
    """`apply_inner`; without gradients the node's forward alone, without a node (6 us)."""
    return apply_inner(node, *args) if torch.is_grad_enabled() else node.forward(_NoBackward(), *args)


def apart() -> contextlib.AbstractContextManager[Any]:
    """Context in which selective activation checkpointing sees nothing: it counts operations, which must be the same
    when they run again. Those of an exchange need not be: rows that were promised go early, what is empty is not sent.
    Nothing of them is saved.
    """
    return _apart() if torch._C._len_torch_dispatch_stack() else _AS_IT_IS


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    modes = dispatch._get_current_dispatch_mode_stack()
    others = [mode for mode in modes if not isinstance(mode, _SELECTIVE)]
    if len(others) == len(modes):
        yield
        return
    with dispatch._disable_current_modes():
        for mode in others:
            dispatch._push_mode(mode)
        try:
            yield
        finally:
            for _ in others:
                dispatch._pop_mode()
