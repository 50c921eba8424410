"""Weight gradients as nodes of the autograd graph, scheduled by the order in which the nodes are created.

The autograd engine runs ready nodes in the reverse order of their creation. A `WgradToken` created after the dispatch
node and before the experts node therefore computes its weight gradient after the input gradients were sent and before
their arrival is waited for: inside the communication window. The gradient reaches the parameter through autograd
itself, before `backward()` returns, so every hook on the parameter (DeepSpeed ZeRO, DDP, FSDP, clipping) sees it.
Deferring wgrad past dgrad follows Zero Bubble Pipeline Parallelism (Qi et al., 2023) and DualPipe's `WeightGradStore`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fluid_hf.config import check_wgrad
from fluid_hf.errors import WgradPendingError
from fluid_hf.nodes import apply_inner

__all__ = ["WgradScheduler", "WgradStats", "WgradWork", "wgrad_token", "wgrad_tokens"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class WgradStats:
    """Counts since the last `finish_batch()`.

    Attributes:
        inside: weight gradients computed while communication was in flight.
        outside: weight gradients computed with nothing in flight.
        peak_bytes: most bytes held at once for weight gradients that were still to be computed.
    """

    inside: int = 0
    outside: int = 0
    peak_bytes: int = 0

    @property
    def share_inside(self) -> float:
        """Share of the weight gradients computed inside windows; 0 if there were none."""
        return self.inside / max(1, self.inside + self.outside)


class WgradWork:
    """Weight gradients of one layer and one backward pass that are still to be computed.

    Args:
        compute: one function per weight name, each returning that weight's gradient.
        held_bytes: bytes kept alive until the last of them has run.
        in_window: tells whether communication of this layer is in flight.
    """

    def __init__(
        self, compute: Mapping[str, Callable[[], torch.Tensor]], held_bytes: int, in_window: Callable[[], bool]
    ) -> None:
        self.compute = dict(compute)
        self.ready: dict[str, torch.Tensor] = {}
        self.held_bytes = held_bytes
        self.in_window = in_window


class WgradScheduler:
    """Decides when weight gradients are computed; owned by one patched model.

    Args:
        policy: `"layer"` leaves them for the layer's communication window while enabled; `"cross_layer"` also leaves
            those of attention and the router for the window of the MoE layer before; `"off"` never does.

    Raises:
        ConfigError: there is no such policy.
    """

    def __init__(self, policy: str) -> None:
        check_wgrad(policy)
        self.policy = policy
        self.enabled = True
        self.stats = WgradStats()
        self._held_bytes = 0
        self._pending: set[WgradWork] = set()
        self._reasons: set[str] = set()

    def enable(self) -> None:
        """Compute weight gradients inside communication windows, as the policy says."""
        self.enabled = True

    def disable(self) -> None:
        """Compute every weight gradient together with the input gradient."""
        self.enabled = False

    @property
    def defers(self) -> bool:
        """Whether weight gradients are left for the communication window."""
        return self.enabled and self.policy != "off"

    @property
    def held_bytes(self) -> int:
        """Bytes held now for weight gradients that are still to be computed."""
        return self._held_bytes

    def fall_back(self, reason: str) -> None:
        """Say once that the policy `"cross_layer"` does what `"layer"` does, and why."""
        if reason not in self._reasons:
            self._reasons.add(reason)
            logger.warning("wgrad ('cross_layer') works as 'layer' here: %s.", reason)

    def add(self, work: WgradWork, max_held_bytes: int | None = None) -> None:
        """Take over the weight gradients of one layer: leave them for the window, or compute them now.

        With more than `max_held_bytes` held by all layers together they are computed now.
        """
        self._pending.add(work)
        self._held_bytes += work.held_bytes
        self.stats.peak_bytes = max(self.stats.peak_bytes, self._held_bytes)
        if not self.defers or (max_held_bytes is not None and self._held_bytes > max_held_bytes):
            for name in list(work.compute):
                work.ready[name] = self._run(work, name)

    def take(self, work: WgradWork, name: str) -> torch.Tensor:
        """The gradient of one weight, computed now unless it already was."""
        gradient = work.ready.pop(name) if name in work.ready else self._run(work, name)
        if not work.compute and not work.ready:
            self._pending.discard(work)
        return gradient

    def finish_batch(self) -> WgradStats:
        """End a batch: check that no weight gradient is left, return the counts and start new ones.

        Raises:
            WgradPendingError: backward left weight gradients uncomputed (it was interrupted, or asked for the
                gradients of some inputs only).
        """
        # Gradients that were computed but never asked for are no loss: backward did not want them.
        pending, stats = sum(len(work.compute) for work in self._pending), self.stats
        self.reset()
        if pending:
            raise WgradPendingError(
                f"weight gradients pending ({pending}) must be 0 at the end of a batch: backward did not reach them; "
                "call loss.backward() without `inputs`, scheduler.disable() around partial backward passes, or "
                "scheduler.reset() after a pass that raised."
            )
        return stats

    def reset(self) -> None:
        """Forget the batch so far: after a backward pass that raised and is not gone on with."""
        self.stats = WgradStats()
        self._pending.clear()
        self._held_bytes = 0

    def _run(self, work: WgradWork, name: str) -> torch.Tensor:
        if work.in_window():
            self.stats.inside += 1
        else:
            self.stats.outside += 1
        gradient = work.compute.pop(name)()
        if not work.compute:
            self._held_bytes -= work.held_bytes
        return gradient


class _WgradToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, take: Callable[[], torch.Tensor]) -> torch.Tensor:
        ctx.take = take
        # Not a view of the weight: a saved view would keep ZeRO-3's gathered weight alive. On the weight's device,
        # since the engine has one queue per device and order holds within a queue only.
        return weight.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.take(), None


def wgrad_token(weight: torch.Tensor, take: Callable[[], torch.Tensor]) -> torch.Tensor:
    """An empty tensor whose backward delivers the gradient of `weight`.

    Args:
        weight: the parameter.
        take: called in backward, returns the gradient in the weight's shape.
    """
    return _WgradToken.apply(weight, take)  # type: ignore[no-any-return, no-untyped-call]


class _WgradTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, take: Callable[[], Sequence[torch.Tensor]], *weights: torch.Tensor) -> torch.Tensor:
        ctx.take = take
        ctx.set_materialize_grads(False)  # its gradient says that it is time, no more: no zeros are made for it
        return weights[0].new_empty(0)  # not a view, on the weights' device: see `_WgradToken`

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.take()


def wgrad_tokens(weights: Sequence[torch.Tensor], take: Callable[[], Sequence[torch.Tensor]]) -> torch.Tensor:
    """One token (`wgrad_token`) for several parameters, whose gradients come from the same products.

    Args:
        weights: the parameters, one at least.
        take: called in backward, returns their gradients in order.
    """
    return apply_inner(_WgradTokens, take, *weights)  # type: ignore[no-any-return]
