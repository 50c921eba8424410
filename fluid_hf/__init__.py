"""fluid_hf: Hugging Face MoE models trained expert parallel with DeepSpeed, communication hidden behind computation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fluid_hf.checkpoint.loading import from_pretrained
from fluid_hf.checkpoint.saving import save_pretrained
from fluid_hf.config import FluidConfig
from fluid_hf.errors import (
    AlreadyPatchedError,
    CheckpointError,
    CollectiveError,
    ConfigError,
    FluidError,
    GradientError,
    MissingPackageError,
    NotPatchedError,
    PeerError,
    RankMismatchError,
    RoutingError,
    TraceError,
    UnsupportedModelError,
    WgradPendingError,
)
from fluid_hf.models.catalogue import SupportedModel, supported_models
from fluid_hf.models.expert_blocks import register_block
from fluid_hf.moe.layer import ExpertParallelExperts
from fluid_hf.patching import patch_model, unpatch_model
from fluid_hf.state import FluidState

if TYPE_CHECKING:
    from fluid_hf.integrations.trainer import FluidCallback

__version__ = "0.1.0"

__all__ = [
    "AlreadyPatchedError",
    "CheckpointError",
    "CollectiveError",
    "ConfigError",
    "ExpertParallelExperts",
    "FluidCallback",
    "FluidConfig",
    "FluidError",
    "FluidState",
    "GradientError",
    "MissingPackageError",
    "NotPatchedError",
    "PeerError",
    "RankMismatchError",
    "RoutingError",
    "SupportedModel",
    "TraceError",
    "UnsupportedModelError",
    "WgradPendingError",
    "from_pretrained",
    "patch_model",
    "register_block",
    "save_pretrained",
    "supported_models",
    "unpatch_model",
]


def __getattr__(name: str) -> Any:
    if name == "FluidCallback":  # needs the Trainer's side; loaded when asked for
        from fluid_hf.integrations.trainer import FluidCallback

        return FluidCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
