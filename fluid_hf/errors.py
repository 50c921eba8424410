"""Named errors. Every message gives the field, its value, the relation that failed and the remedy."""

from __future__ import annotations

__all__ = [
    "AlreadyPatchedError",
    "CheckpointError",
    "CollectiveError",
    "ConfigError",
    "FluidError",
    "GradientError",
    "MissingPackageError",
    "NotPatchedError",
    "PeerError",
    "RankMismatchError",
    "RoutingError",
    "TraceError",
    "UnsupportedModelError",
    "WgradPendingError",
]


class FluidError(Exception):
    """Base class of every error raised by fluid_hf."""


class ConfigError(FluidError, ValueError):
    """A setting or an argument is unknown, out of range, or at odds with another one, the world size or the model.

    Remedy: Set the field that the message names to one of the values it names. All settings are checked before
    anything is changed.
    """


class UnsupportedModelError(FluidError, ValueError):
    """The model is not transformers', or has no experts module that can be patched; the message names the class and
    what is missing.

    Remedy: Patch the transformers model itself, not what is around it. Use a model of a supported family, load it
    without quantisation and without transformers' own tensor or expert parallelism, or train it without fluid_hf.
    """


class AlreadyPatchedError(FluidError, ValueError):
    """The model is patched already, with another configuration, or holds or is a part of one that is patched.

    Remedy: Patch once with the settings you want, or call `fluid_hf.unpatch_model(model)` before patching again.
    """


class NotPatchedError(FluidError, ValueError):
    """The call needs a model that `fluid_hf.patch_model` has patched.

    Remedy: Call `fluid_hf.patch_model(model)` first, or add `FluidCallback()` to the Trainer's callbacks.
    """


class RankMismatchError(FluidError, RuntimeError):
    """Ranks disagree on what must be equal on all of them, or another rank found an error of its own.

    Remedy: Give every rank the same settings, model and files. If the message quotes an error of another rank, that
    one is the cause.
    """


class CollectiveError(FluidError, RuntimeError):
    """A call that all ranks must make together was not made by all of them in time, or its process group was destroyed.

    Remedy: Make the call on every rank, never inside `if rank == 0`; look at the output of the ranks that are
    missing. Destroy the process group after the last use of the model.
    """


class PeerError(FluidError, RuntimeError):
    """Another rank did not take part in an exchange in time: it raised, died, hangs or went another way.

    Remedy: Look at the output of the rank that the message names: its error is the cause. If that rank was only slow,
    raise `timeout_seconds`.
    """


class RoutingError(FluidError, ValueError):
    """A router's output cannot be used: weights that are NaN or infinite, or expert ids out of range.

    Remedy: Look for diverged weights, a too high learning rate or bad input on the rank that the message names, and
    start again from the last checkpoint.
    """


class CheckpointError(FluidError, RuntimeError):
    """A checkpoint cannot be written or read as asked: files are missing or unwritable, the folder is not there for all
    ranks, or the parallel layout is another one.

    Remedy: Look at the folder, file or layout that the message names. To resume with another `ep_size`, make the
    checkpoint universal (the message has the command), or start from the plain weights, which every layout can read.
    """


class WgradPendingError(FluidError, RuntimeError):
    """Weight gradients were left uncomputed at the end of a batch.

    Remedy: Call `loss.backward()` without `inputs`, or turn the scheduler off around partial backward passes:
    `model.fluid.scheduler.disable()`. After a pass that raised, call `model.fluid.scheduler.reset()`.
    """


class GradientError(FluidError, RuntimeError):
    """A gradient was asked for that would be wrong: of weights that changed since forward, of a gradient, or
    reduced twice.

    Remedy: Call `loss.backward()` before `optimizer.step()`, without `create_graph` and outside `torch.func`
    transforms; take second derivatives with the unpatched model. Call `reduce_gradients` once per step, then clip.
    """


class TraceError(FluidError, ValueError):
    """A file given as a profile is not a trace of torch.profiler, or holds no step of a patched model.

    Remedy: Trace a whole step of a patched model, with `FluidCallback(profile_steps=(10, 12))` or torch.profiler's
    `export_chrome_trace`.
    """


class MissingPackageError(FluidError, ImportError):
    """What was asked for needs an optional package that is not installed; the message has the command.

    Remedy: Run the command in the message.
    """
