"""A shared expert that is put off until the communication window: what rewritten code of a model calls.

    run = put_off(self.shared_experts, hidden)     # before the routed experts are called
    routed = run_experts(self.experts, hidden, index, weights, run)
    shared = take(run)                             # where the model's code wants the result

Whoever calls the experts takes `run` along: a helper method, or the block that a decoder layer calls. If nobody runs
it in a window, `take` runs it: the same result, without the overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fluid_hf.models.expert_hooks import is_watched

__all__ = ["CARRIED", "Run", "carries", "put_off", "run_experts", "take"]

# Name of the argument by which methods and blocks take `run` along.
CARRIED = "_fluid_run"
Run = Callable[[], Any]


class _Call:
    """One call, with the modes in force where the model makes it: the experts may be called without gradients."""

    def __init__(self, module: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._module, self._args, self._kwargs = module, args, kwargs
        self._modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.done = False
        self.window: Callable[..., Any] | None = None  # the experts in whose window it was made
        self.value: Any = None

    def run(self) -> Any:
        """Make the call."""
        self.done = True
        if self._modes == (torch.is_grad_enabled(), torch.is_inference_mode_enabled()):
            return self._module(*self._args, **self._kwargs)
        grad, inference = self._modes
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return self._module(*self._args, **self._kwargs)


# A bound method travels, not the object: engines look for tensors in objects that modules are given, and warn.
def put_off(module: Callable[..., Any], *args: Any, **kwargs: Any) -> Run:
    """The call `module(*args, **kwargs)`, not made yet."""
    return _Call(module, args, kwargs).run


def run_experts(
    experts: Callable[..., Any], hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, run: Run | None
) -> torch.Tensor:
    """The routed experts [T, H], with the call that was put off made in their window, unless hooks watch them."""
    call: _Call | None = getattr(run, "__self__", None)
    # Run again in backward, a block alone must do what it did: its value is there, and is not asked for again. Other
    # experts of the same block (Ernie 4.5-VL has two kinds) are called once more only because the whole layer is.
    again = call is not None and call.window is experts and torch._C._current_graph_task_id() != -1
    if call is None or (call.done and not again) or is_watched(experts):
        routed: torch.Tensor = experts(hidden, index, weights)
        return routed
    call.window = experts
    routed, value = experts(hidden, index, weights, run)
    call.value = None if again else value
    return routed


def take(run: Run) -> Any:
    """The result of a call that was put off; made now if it was not yet."""
    call: _Call = run.__self__  # type: ignore[attr-defined]
    if not call.done:
        return call.run()
    value, call.value = call.value, None
    return value


def carries(function: Any) -> bool:
    """Whether a method takes a call that was put off along to the experts."""
    return CARRIED in (getattr(function, "__kwdefaults__", None) or {})
