"""Arguments that several commands have, checked before anything runs."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from pathlib import Path

from fluid_hf.errors import ConfigError

__all__ = ["check_targets", "positive"]


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, is {text!r}")
    return value


def check_targets(options: argparse.Namespace) -> None:
    """Find out now, not after minutes, that results cannot be written. Nothing stays behind.

    Raises:
        ConfigError: `--json` or `--out` is not in a folder that can be written.
    """
    if int(os.environ.get("RANK", "0")) != 0:  # rank 0 writes
        return
    target = getattr(options, "json", None)
    if isinstance(target, str) and target != "-" and getattr(options, "what", "") != "table":
        _try("json", Path(target), make_folder=False)
    if getattr(options, "out", None):
        _try("out", Path(f"{options.out}.json"), make_folder=True)


def _try(option: str, path: Path, *, make_folder: bool) -> None:
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with path.open("a"):
                return
        with contextlib.closing(tempfile.TemporaryFile(dir=path.parent)):
            return
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"--{option} ({path}) must be a file that can be written: {reason}.") from error
