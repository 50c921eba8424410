"""Linear maps whose weight gradient is computed in a communication window of the layer that runs next in backward.

The token of such a weight (see `fluid_hf.overlap.wgrad`) is created during the forward of the earlier layer that owns
the window. The linear map takes it as an extra, empty input, uses the weight detached, and leaves its input and the
gradient of its output for it. The engine holds the token back until it runs what was created around it: the window.

Legend: M rows (all but the last dimension), I inputs, O outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from fluid_hf.overlap.wgrad import WgradScheduler, WgradWork, wgrad_token
from fluid_hf.ranges import span

__all__ = ["MAX_HELD_BYTES", "DeferredWeight", "WindowWeights"]

MAX_HELD_BYTES = 2 << 30


class _Slot:
    """What one call of a linear map and one token share.

    Args:
        weight: the parameter.
        in_window: tells whether the window is open.
        span: name of the range in a profile.
        take: computes what a work holds.
    """

    def __init__(
        self, weight: torch.Tensor, in_window: Callable[[], bool], span: str, take: Callable[[WgradWork], torch.Tensor]
    ) -> None:
        self.works: list[WgradWork] = []
        self.weight, self.in_window, self.span = weight, in_window, span
        self.token = wgrad_token(weight, lambda: take(self.works.pop()))


class _DeferredLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        token: torch.Tensor,
        leave: Callable[[torch.Tensor, torch.Tensor], None],
    ) -> torch.Tensor:
        ctx.leave, ctx.token_dtype = leave, token.dtype
        ctx.save_for_backward(x, weight_OI)
        return nn.functional.linear(x, weight_OI, bias_O)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        grad_MO = grads[0].reshape(-1, weight_OI.shape[0])
        grad_x = (grad_MO @ weight_OI).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_bias = grad_MO.sum(0) if ctx.needs_input_grad[2] else None
        ctx.leave(x.reshape(-1, weight_OI.shape[1]), grad_MO)
        return grad_x, None, grad_bias, grad_MO.new_empty(0, dtype=ctx.token_dtype), None


class DeferredWeight:
    """The weight of one linear map, `x @ weight.T + bias`.

    Args:
        name: of the weight's module, for events and profiles.
        module: holds the parameter `weight` [O, I].
        scheduler: weight gradient scheduler.
        max_held_bytes: above so many held bytes the gradient is computed at once.
    """

    def __init__(
        self, name: str, module: nn.Module, scheduler: WgradScheduler, max_held_bytes: int = MAX_HELD_BYTES
    ) -> None:
        self.name, self.module, self.scheduler = name, module, scheduler
        self.max_held_bytes = max_held_bytes
        self._slot: _Slot | None = None

    @property
    def size(self) -> int:
        """Elements of the weight: half the operations of its gradient for one row. 0 of one that is computed."""
        weight = self.weight
        return 0 if weight is None else weight.numel()

    @property
    def weight(self) -> torch.Tensor | None:
        """The parameter as it is now; `None` where it is computed (`torch.nn.utils.parametrizations`), for which asking
        the module would compute it once more: spectral norm takes a step of its iteration each time.
        """
        return self.module._parameters.get("weight")

    def offer(self, layer: str, in_window: Callable[[], bool], event: Callable[[str], None]) -> None:
        """Create the token, to be used by the next call of the linear map.

        Args:
            layer: name of the layer that owns the window.
            in_window: tells whether communication of that layer is in flight.
            event: records an event of that layer.
        """
        weight = self.weight
        if weight is None:
            self.scheduler.fall_back("weights are computed")
            return
        if not weight.requires_grad or not self.scheduler.defers or _blocked(self.scheduler, weight):
            return

        def take(work: WgradWork) -> torch.Tensor:
            gradient = self.scheduler.take(work, "weight")
            event(f"wgrad {self.name}")
            return gradient

        self._slot = _Slot(weight, in_window, f"{layer}::wgrad {self.name}", take)

    @property
    def offered(self) -> bool:
        """Whether there is a token for the next call."""
        return self._slot is not None

    def withdraw(self) -> None:
        """Forget a token that was not used."""
        self._slot = None

    @torch.compiler.disable  # what is left for the window is host code: a compiler would run it as it traces backward
    def linear(self, x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor | None:
        """`torch.nn.functional.linear`, its weight gradient left for the window; `None` if it cannot be."""
        slot, self._slot = self._slot, None
        if slot is None or slot.weight is not weight_OI or not torch.is_grad_enabled() or x.dim() < 2:
            return None
        if x.device != weight_OI.device or _blocked(self.scheduler, weight_OI):
            return None
        device, weight = x.device.type, weight_OI.detach()
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x, weight = x.to(dtype), weight.to(dtype)
            bias_O = bias_O.to(dtype) if bias_O is not None else None
        result: torch.Tensor = _DeferredLinear.apply(  # type: ignore[no-untyped-call]
            x, weight, bias_O, slot.token, functools.partial(self._leave, slot)
        )
        return result

    def _leave(self, slot: _Slot, x_MI: torch.Tensor, grad_MO: torch.Tensor) -> None:
        def compute() -> torch.Tensor:
            with span(slot.span):
                return (grad_MO.t() @ x_MI).to(slot.weight.dtype)

        work = WgradWork({"weight": compute}, x_MI.nbytes + grad_MO.nbytes, slot.in_window)
        slot.works.append(work)
        self.scheduler.add(work, self.max_held_bytes)


class WindowWeights:
    """Weights whose gradients one expert-parallel layer computes in its two windows of the backward pass.

    The output gradients travel first, covered by the input gradients of own tokens; then the input gradients, covered
    by the experts' weight gradients. Each weight goes to the window with the least predicted work.

    Args:
        weights: in forward order.
    """

    def __init__(self, weights: Sequence[DeferredWeight]) -> None:
        self.weights = list(weights)
        self._arranged: tuple[float, float] | None = None
        self._windows: tuple[list[DeferredWeight], list[DeferredWeight]] = ([], [])

    def arrange(self, own: float, experts: float) -> None:
        """Spread the weights over the windows.

        Args:
            own: elements of weights that one of this rank's tokens meets in the experts here.
            experts: the same for the experts' weight gradients.
        """
        if self._arranged == (own, experts):
            return
        self._arranged = own, experts
        loads, self._windows = [own, experts], ([], [])
        for weight in sorted(self.weights, key=lambda weight: weight.size, reverse=True):
            window = loads.index(min(loads))
            loads[window] += weight.size
            self._windows[window].append(weight)

    def offer(self, window: int, layer: str, in_window: Callable[[], bool], event: Callable[[str], None]) -> None:
        """Create the tokens of window 0 (output gradients travel) or 1 (input gradients travel) of a layer."""
        for weight in self._windows[window]:
            weight.offer(layer, in_window, event)

    def withdraw(self) -> None:
        """Forget all tokens that were not used."""
        for weight in self.weights:
            weight.withdraw()


def _blocked(scheduler: WgradScheduler, weight: torch.Tensor) -> bool:
    """Whether the gradient must be computed at once; the reason is logged the first time."""
    reason = None
    if hasattr(weight, "ds_id"):
        reason = "ZeRO 3 releases a weight when its module is done"
    elif torch._C._current_graph_task_id() != -1 or torch._C._autograd._top_saved_tensors_default_hooks(True):
        # Reentrant checkpointing runs forward inside backward. The other kind lives in hooks on saved tensors, and its
        # second run, inside backward too, must save the same tensors as the first.
        reason = "activation checkpointing, or another hook on saved tensors, is on"
    elif type(weight) is not nn.Parameter or weight.is_meta:
        reason = f"weights are of type {type(weight).__name__}"
    if reason is not None:
        scheduler.fall_back(reason)
    return reason is not None
