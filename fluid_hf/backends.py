"""What a training engine must provide for a patched model; the plain PyTorch one is here.

`fluid_hf.integrations.deepspeed` provides the other. Process groups and parameter layouts come from the backend, so
the core knows no engine.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import nn

from fluid_hf.config import FluidConfig
from fluid_hf.models.expert_formats import extra_modules
from fluid_hf.models.registry import LOADED_SHARE
from fluid_hf.models.stored_experts import StoredExperts, stored_parameters
from fluid_hf.moe.general_layer import GeneralExperts
from fluid_hf.moe.layer import ExpertParallelExperts, ExpertParallelLayer
from fluid_hf.process_groups import ParallelGroups, create_groups

__all__ = ["LOADED_SHARE", "Backend", "TorchBackend", "take_local_experts"]


class Backend(Protocol):
    """A training engine, as patching sees it."""

    name: str

    def check(self, config: FluidConfig) -> None:
        """Raise a named error if the engine's own settings rule the configuration out."""

    def create_groups(self, ep_size: int) -> ParallelGroups:
        """Create or reuse the expert-parallel groups; collective over all ranks."""

    def build_layer(self, source: Any, settings: ExpertParallelLayer, groups: ParallelGroups) -> ExpertParallelLayer:
        """The layer that replaces `source`, holding this rank's experts; `settings` carries everything else."""

    def full(self, parameters: Iterable[torch.Tensor]) -> contextlib.AbstractContextManager[Any]:
        """Context in which parameters partitioned by the engine are whole; collective over their partition group."""

    def gather_together(self, module: nn.Module, together: bool) -> None:
        """Let the engine gather a module's partitioned parameters at once: they are read outside their owners."""

    def attach(self, model: nn.Module) -> None:
        """Called once the model is patched."""

    def detach(self, model: nn.Module) -> None:
        """Called when the model is unpatched."""


class TorchBackend:
    """Plain PyTorch: groups from torch.distributed, weights in transformers' fused layout."""

    name = "torch"

    def check(self, config: FluidConfig) -> None:
        """Nothing to check."""

    def create_groups(self, ep_size: int) -> ParallelGroups:
        return create_groups(ep_size)

    def build_layer(self, source: Any, settings: ExpertParallelLayer, groups: ParallelGroups) -> ExpertParallelLayer:
        if groups.ep_size > 1 or isinstance(source, StoredExperts):
            held = take_local_experts(source, settings)
            trainable = {name: stored_parameters(source, name)[0].requires_grad for name in held}
            weights = {name: nn.Parameter(held[name], requires_grad=trainable[name]) for name in held}
        else:  # the parameters stay the very same objects
            weights = {name: getattr(source, name) for name in settings.weight_names}
        if settings.context.math is not None:
            return GeneralExperts(settings, weights, extra_modules(source))
        return ExpertParallelExperts.from_parameters(weights["gate_up_proj"], weights["down_proj"], settings)

    def full(self, parameters: Iterable[torch.Tensor]) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def gather_together(self, module: nn.Module, together: bool) -> None:
        """Nothing is partitioned."""

    def attach(self, model: nn.Module) -> None:
        """Nothing to do."""

    def detach(self, model: nn.Module) -> None:
        """Nothing to undo."""


def take_local_experts(source: Any, layer: ExpertParallelLayer) -> dict[str, torch.Tensor]:
    """Copies of this rank's slices of the source's weights, by name; or these, if it was loaded so."""
    if hasattr(source, LOADED_SHARE):
        return {name: getattr(source, name).data for name in layer.weight_names}
    start = layer.ep_rank * layer.num_local_experts
    held = slice(start, start + layer.num_local_experts)
    if isinstance(source, StoredExperts):
        return {name: source.take(name, held) for name in layer.weight_names}
    return {name: getattr(source, name).data[held].clone() for name in layer.weight_names}


class WeakModels:
    """Models known to a backend, without keeping them alive."""

    def __init__(self) -> None:
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def __len__(self) -> int:
        return len(self._models)

    def add(self, model: nn.Module) -> None:
        """Remember a model."""
        self._models.add(model)

    def remove(self, model: nn.Module) -> None:
        """Forget a model."""
        self._models.discard(model)
