"""Puts weight gradients of attention's projections and of the router into the windows of the MoE layer before.

Backward meets the MoE layer before right after these layers, so their gradients are kept for its communication windows
(`fluid_hf.overlap.deferred_linear`). The forwards are bound on the instances; classes, parameters and names stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fluid_hf.models.attention import PROJECTIONS
from fluid_hf.moe.layer import ExpertParallelLayer
from fluid_hf.overlap.deferred_linear import DeferredWeight, WindowWeights
from fluid_hf.overlap.wgrad import WgradScheduler

__all__ = ["CrossLayerWgrad"]

ROUTERS = ("gate", "router")


class _LinearForward:
    """Stands in for `nn.Linear.forward`."""

    def __init__(self, module: nn.Linear, deferred: DeferredWeight) -> None:
        self._module, self._deferred = module, deferred

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = self._module.weight, self._module.bias  # read once: they may be computed
        result = self._deferred.linear(input, weight, bias)
        return nn.functional.linear(input, weight, bias) if result is None else result


class _RouterForward:
    """Stands in for the forward of a router: its own code, in which the product with its weight is ours."""

    def __init__(self, own: Callable[..., Any], deferred: DeferredWeight) -> None:
        self._own, self._deferred = own, deferred

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._deferred.offered:
            return self._own(*args, **kwargs)
        with _ReplaceLinear(self._deferred):
            return self._own(*args, **kwargs)


class _ReplaceLinear(TorchFunctionMode):
    """Inside, `linear` of the given weight leaves its weight gradient for the window."""

    def __init__(self, deferred: DeferredWeight) -> None:
        super().__init__()
        self._deferred = deferred

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.linear and len(args) >= 2 and args[1] is self._deferred.weight:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            result = self._deferred.linear(args[0], args[1], bias)
            if result is not None:
                return result
        return func(*args, **kwargs)


class CrossLayerWgrad:
    """The policy `"cross_layer"` on one model; `attach` turns it on, `detach` off.

    Args:
        model: the model, its experts replaced by `layers` (by module name, in forward order).
        layers: the expert-parallel layers.
        scheduler: weight gradient scheduler.

    Attributes:
        placed: names of the modules whose weight gradients each layer computes, by the layer's name.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, ExpertParallelLayer], scheduler: WgradScheduler) -> None:
        self.placed: dict[str, list[str]] = {}
        self._model, self._layers, self._scheduler = model, layers, scheduler
        self._bound: list[nn.Module] = []

    def attach(self) -> None:
        """Bind the forwards and give every layer the weights of its windows."""
        weights: dict[str, list[DeferredWeight]] = {}
        for layer, name, module in self._find():
            deferred = DeferredWeight(name, module, self._scheduler)
            forward: Any = (
                _LinearForward(module, deferred)
                if type(module) is nn.Linear
                else _RouterForward(module.forward, deferred)
            )
            module.forward = forward
            self._bound.append(module)
            weights.setdefault(layer, []).append(deferred)
        for layer, deferred_weights in weights.items():
            self._layers[layer].context.windows = WindowWeights(deferred_weights)
        self.placed = {layer: [weight.name for weight in found] for layer, found in weights.items()}
        if not weights:
            self._scheduler.fall_back("no attention layer or router with plain weights comes after an MoE layer")

    def detach(self) -> None:
        """Put everything back."""
        for module in self._bound:
            if isinstance(vars(module).get("forward"), _LinearForward | _RouterForward):
                del module.forward
        for layer in self._layers.values():
            layer.context.windows = None
        self._bound, self.placed = [], {}

    def _find(self) -> Iterator[tuple[str, str, nn.Module]]:
        """(MoE layer before, module name, module) of every weight that can be placed."""
        uses = Counter(id(p) for _, p in self._model.named_parameters(remove_duplicate=False))
        seen: list[str] = []
        for name, module in self._model.named_modules():
            parent = name.rpartition(".")[0]
            if name in self._layers:
                found = _routers(parent, self._model.get_submodule(parent))
                before, seen = seen, [*seen, name]
            else:
                # Attention runs before the experts of its own decoder layer, whichever of them is registered first.
                found = _projections(name, module)
                before = [layer for layer in seen if not layer.startswith(f"{parent}.")] if found else []
            for module_name, candidate in found.items():
                if before and _plain(candidate) and uses[id(candidate.weight)] == 1:
                    yield before[-1], module_name, candidate


def _projections(name: str, module: nn.Module) -> dict[str, nn.Module]:
    if not all(isinstance(getattr(module, projection, None), nn.Module) for projection in PROJECTIONS):
        return {}
    found = {f"{name}.{projection}": getattr(module, projection) for projection in PROJECTIONS}
    return {name: projection for name, projection in found.items() if type(projection) is nn.Linear}


def _routers(name: str, block: nn.Module) -> dict[str, nn.Module]:
    return {f"{name}.{router}": getattr(block, router) for router in ROUTERS if hasattr(block, router)}


def _plain(module: Any) -> bool:
    """Whether the module holds one plain weight matrix and runs its class's own forward."""
    if not isinstance(module, nn.Module):
        return False
    weight = module._parameters.get("weight")
    return (
        type(weight) is nn.Parameter
        and len(getattr(weight, "ds_shape", weight.shape)) == 2
        and "forward" not in vars(module)
        and not list(module.children())
    )
