"""Experts whose weights are stored otherwise than the layer holds them: read and written as tensors of all experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fluid_hf.moe.expert_math import ExpertFormat

__all__ = ["StoredExperts", "let_go", "put_parameters", "put_weights", "stored_parameters"]


class StoredExperts(ABC):
    """Base of the ways in which experts are stored.

    Attributes:
        module: what holds them in the block.
        weight_names: names of the stacked weights.
        act_fn: activation.
        format: what they compute; `None` for `act(gate) * up` between two plain projections.
    """

    def __init__(
        self, module: nn.Module, weight_names: tuple[str, ...], act_fn: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self.module, self.weight_names, self.act_fn = module, weight_names, act_fn

    @property
    def training(self) -> bool:
        """Mode of the module."""
        return self.module.training

    @property
    def format(self) -> ExpertFormat | None:
        return None

    @abstractmethod
    def parameters(self, name: str) -> list[nn.Parameter]:
        """The parameters that make a weight."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight of all experts, also when ZeRO-3 has partitioned its parameters."""

    @abstractmethod
    def take(self, name: str, held: slice) -> torch.Tensor:
        """A copy of a weight of some experts, experts first."""

    @abstractmethod
    def unstack(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """A weight of all experts as it is stored: tensors, also without data, by their names within the module.

        What has the same name there may come in once more, as it is stored, and must be left so.
        """

    @abstractmethod
    def stack(self, name: str, stored: Mapping[str, torch.Tensor], held: slice) -> torch.Tensor:
        """A weight of some experts, copied from what `unstack` gives for all of them."""

    def put(self, name: str, weight: torch.Tensor) -> None:
        """Give the module its own copy of a weight of all experts."""
        for part, value in self.unstack(name, weight).items():
            self.module.get_parameter(part).data = value.clone()

    def release(self, name: str) -> None:
        """Let go of a weight's memory; what ZeRO-3 has partitioned stays with it."""
        for parameter in self.parameters(name):
            if not hasattr(parameter, "ds_id"):
                parameter.data = parameter.data.new_empty(0)


def stored_parameters(source: Any, name: str) -> list[nn.Parameter]:
    """The parameters that a weight of an experts module, stored in whatever way, is made of."""
    return source.parameters(name) if isinstance(source, StoredExperts) else [getattr(source, name)]


def put_weights(source: Any, weights: Mapping[str, torch.Tensor], trained: Mapping[str, bool]) -> None:
    """Give an experts module, stored in whatever way, weights of all experts, and let those be trained that are."""
    for name, weight in weights.items():
        if isinstance(source, StoredExperts):
            source.put(name, weight)
        else:
            getattr(source, name).data = weight
        parameters = stored_parameters(source, name)
        if parameters[0].requires_grad != trained[name]:  # else each stays as it was before patching
            for parameter in parameters:
                parameter.requires_grad_(trained[name])


def put_parameters(source: nn.Module, layer: nn.Module, names: Iterable[str]) -> None:
    """Give an experts module the parameters of the layer that stands in its place and has all of them.

    As they are now: `load_state_dict(assign=True)` and others replace parameters. Of computed ones (by a
    parametrization of the layer) it gets the value.
    """
    for name in names:
        held = layer._parameters.get(name)
        setattr(source, name, nn.Parameter(getattr(layer, name).detach()) if held is None else held)


def let_go(model: nn.Module, sources: Iterable[tuple[nn.Module | StoredExperts, Iterable[str]]]) -> None:
    """Leave the named parameters of experts modules to the layers in their places, which have the same ones.

    FSDP replaces those of the layers by shards: held here too, the whole ones would stay in memory. Modules that are
    still a part of the model, where blocks share one, keep theirs.
    """
    present = set(model.modules())
    for source, names in sources:
        if isinstance(source, nn.Module) and source not in present:
            source._parameters.update(dict.fromkeys(names))
