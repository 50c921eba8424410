"""Named errors. Every message gives the field, its value, the relation that failed and the remedy."""

from __future__ import annotations

__all__ = [
    "AlreadyPatchedError",
    "CheckpointError",
    "CollectiveError",
    "ConfigError",
    "FluidError",
    "MissingPackageError",
    "NotPatchedError",
    "RankMismatchError",
    "TraceError",
    "UnsupportedModelError",
    "WgradPendingError",
]


class FluidError(Exception):
    """Base class of every error raised by fluid_hf."""


class ConfigError(FluidError, ValueError):
    """A setting is unknown, out of range, or at odds with another setting, the world size or the model."""


class UnsupportedModelError(FluidError, ValueError):
    """The model has no experts module that can be patched; the message names the class and what is missing."""


class AlreadyPatchedError(FluidError, ValueError):
    """The model is patched already, with another configuration."""


class NotPatchedError(FluidError, ValueError):
    """The call needs a model that `fluid_hf.patch_model` has patched."""


class RankMismatchError(FluidError, RuntimeError):
    """Ranks disagree on what must be equal on all of them, or another rank found an error of its own."""


class CollectiveError(FluidError, RuntimeError):
    """A call that all ranks must make together was not made by all of them in time."""


class CheckpointError(FluidError, RuntimeError):
    """A checkpoint cannot be written or read as asked: missing or unwritable files, or another parallel layout."""


class WgradPendingError(FluidError, RuntimeError):
    """Weight gradients were left uncomputed at the end of a batch."""


class TraceError(FluidError, ValueError):
    """A file given as a profile is not a trace of torch.profiler, or holds no step of a patched model."""


class MissingPackageError(FluidError, ImportError):
    """What was asked for needs an optional package that is not installed; the message has the command."""
