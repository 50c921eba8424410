"""Reading what DeepSpeed writes: tensors, plain values and four of its classes. Nothing that a file names is called."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from fluid_hf.errors import CheckpointError

__all__ = ["check_files", "read_file", "read_tag"]


def _stage(owner: Any, name: str) -> ZeroStageEnum:
    """What stands for `getattr` in a file: Python 3.11.0 to 3.11.3 write a member of an enumeration by it."""
    if owner is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
        raise pickle.UnpicklingError(f"it asks for {name!r} of {owner!r}")
    return ZeroStageEnum[name]


# Beside tensors, all that DeepSpeed 0.19.8 puts into its files: values of these, without any code of a file's own.
ALLOWED = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address, (_stage, "builtins.getattr")]


def read_file(path: Path, *, mmap: bool = False) -> Any:
    """What a `.pt` file holds, on the CPU.

    Args:
        path: the file.
        mmap: leave tensors on disk until they are read.

    Raises:
        CheckpointError: the file cannot be read, or names something else than values; says what.
    """
    with torch.serialization.safe_globals(ALLOWED):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:
            raise CheckpointError(_refusal(path, error)) from error


def check_files(paths: Iterable[Path]) -> None:
    """Refuse files that DeepSpeed would unpickle with all that they name; tensors are not read.

    Raises:
        CheckpointError: as for `read_file`.
    """
    for path in paths:
        read_file(path, mmap=True)


def _refusal(path: Path, error: Exception) -> str:
    try:
        named = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not even a file of torch.save
        named = []
    if named:
        return (
            f"file ({path}) must hold tensors and plain values but names {', '.join(named)}; if the checkpoint is "
            "your own, allow them: torch.serialization.add_safe_globals([...])."
        )
    return f"file ({path}) cannot be read: {str(error).splitlines()[0]}"


def read_tag(folder: Path, name: str, remedy: str) -> str:
    """The tag that a file of a checkpoint's folder gives, such as `latest`.

    Args:
        folder: the checkpoint's folder.
        name: of the file.
        remedy: what to do if there is no such file.

    Raises:
        CheckpointError: the file is missing, or leads out of the folder.
    """
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"file ({path}) is missing; {remedy}")
    tag = path.read_text(encoding="utf-8").strip()
    if not tag or os.path.isabs(tag) or ".." in Path(tag).parts:
        raise CheckpointError(f"tag ({tag}) in file ({path}) must be the name of a folder in {folder}; correct it.")
    return tag
