"""Gradients that nodes with host code between them cannot give: they are refused instead of being wrong."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.tensor import DTensor

from fluid_hf.errors import ConfigError, GradientError

__all__ = [
    "LeftGradients",
    "UntrainedExperts",
    "check_versions",
    "inside_transforms",
    "left_to_us",
    "refuse_flattened",
    "refuse_second_derivatives",
    "refuse_transforms",
    "square_sum",
]


class LeftGradients:
    """Gradients as they were left, known again as the same tensors that nothing has changed; keeps none of them alive.

    A backward pass, and `zero_grad` of either kind, makes them others.
    """

    def __init__(self) -> None:
        self._left: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}

    def leave(self, gradients: Iterable[torch.Tensor]) -> None:
        """Remember these, and no others."""
        self._left = {id(g): (weakref.ref(g), g._version) for g in gradients if not g.is_inference()}

    def any_other(self, gradients: Iterable[torch.Tensor]) -> bool:
        """Whether any of these is another one, or has changed."""
        return any(not self.is_left(gradient) for gradient in gradients)

    def is_left(self, gradient: torch.Tensor) -> bool:
        """Whether this is one of them, and has not changed."""
        known = self._left.get(id(gradient))
        return known is not None and known[0]() is gradient and known[1] == gradient._version


class UntrainedExperts:
    """Tells once that an optimizer holds the experts of before the model was patched: nothing else in a loop would."""

    def __init__(self) -> None:
        self._versions: dict[int, int] = {}
        self._told = False

    def found(self, experts: set[int], parameters: Iterable[nn.Parameter]) -> bool:
        """Whether others of these parameters have changed since the last call, and none of the experts.

        Args:
            experts: ids of the experts among them.
            parameters: those that have gradients.
        """
        versions = {id(parameter): parameter._version for parameter in parameters}
        before, self._versions = self._versions, versions
        changed = {key for key, version in versions.items() if before.get(key, version) != version}
        watched = experts & before.keys()
        if self._told or not changed or not watched or changed & watched:
            return False
        self._told = True
        return True


def refuse_flattened(model: nn.Module, world_size: int) -> None:
    """Raise if FullyShardedDataParallel holds parameters: of each, ranks have other pieces, or none.

    Raises:
        ConfigError: names the first.
    """
    flattened = (name for name, parameter in model.named_parameters() if getattr(parameter, "_fsdp_flattened", False))
    if world_size > 1 and (name := next(flattened, None)) is not None:
        raise ConfigError(
            f"{name} must not be sharded by FullyShardedDataParallel in reduce_gradients and clip_grad_norm_: it has "
            "averaged the gradients itself, and ranks hold other pieces of them; leave out reduce_gradients and call "
            "clip_grad_norm_ of the FullyShardedDataParallel, or use fully_shard."
        )


def left_to_us(named: Iterable[tuple[str, nn.Parameter]], world_size: int) -> list[tuple[str, nn.Parameter]]:
    """The parameters without those that FSDP2 has sharded: it averages their gradients in the backward pass.

    Raises:
        ConfigError: FSDP2 averages over some of the ranks only.
    """
    left = []
    for name, parameter in named:
        if not isinstance(parameter, DTensor):
            left.append((name, parameter))
        elif parameter.device_mesh.size() != world_size:
            raise ConfigError(
                f"mesh of {name} ({parameter.device_mesh.size()} ranks) must have all {world_size} ranks, or FSDP does "
                "not average its gradient over them; give fully_shard a mesh of all ranks, such as "
                '("replicate", "shard").'
            )
    return left


def square_sum(gradient: torch.Tensor) -> torch.Tensor:
    """Sum of the squares of a gradient, float64; of a sharded one over all shards, collective."""
    total = gradient.double().square().sum()
    return total.full_tensor() if isinstance(total, DTensor) else total  # type: ignore[no-untyped-call]


def inside_transforms() -> bool:
    """Whether this runs inside a `torch.func` transform or forward-mode differentiation."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def refuse_transforms(layer: str) -> None:
    """Raise inside `torch.func` transforms (`grad`, `vmap`, `jvp` and what is made of them).

    Raises:
        GradientError: names the layer.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise GradientError(
            f"layer {layer} must be called outside torch.func transforms (grad, vmap, jvp): they would run its "
            "exchange another number of times on each rank; use loss.backward() or torch.autograd.grad."
        )


def refuse_second_derivatives(layer: str) -> None:
    """Raise in a backward pass whose gradients are to have gradients: these would be missing, without a word.

    Nor may `torch.compile` take the backward pass apart (compiled autograd): it compiles the exchange's host code frame
    by frame, until it fails on one rank or does not end.

    Raises:
        GradientError: names the layer.
    """
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")  # importing it takes seconds
    if compiled is not None and compiled.in_compiled_autograd_region:
        raise GradientError(
            f"compiled autograd (on) must be off in a backward pass through layer {layer}, which has host code between "
            "its autograd nodes; compile the forward pass alone, with torch.compile(model)."
        )
    if torch.is_grad_enabled():
        raise GradientError(
            f"create_graph (True) must be False in a backward pass through layer {layer}: its gradients have no "
            "gradients of their own; take second derivatives with the unpatched model."
        )


def check_versions(before: list[int] | None, weights: Iterable[torch.Tensor], layer: str) -> list[int]:
    """How often each weight was changed in place; backward reads the weights again, as autograd's own check cannot see.

    Args:
        before: what forward got from here; `None` in forward.
        weights: as they are now.
        layer: its name.

    Raises:
        GradientError: they have changed since forward.
    """
    now = [0 if weight.is_inference() else weight._version for weight in weights]
    if before is not None and before != now:
        raise GradientError(
            f"weights of layer {layer} (changed in place {sum(now) - sum(before)} times since forward) must be the "
            "same in forward and backward; call loss.backward() before optimizer.step(), and forward again after it."
        )
    return now
