"""Arguments that several commands have, checked before anything runs."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import math
import os
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any

from fluid_hf.errors import ConfigError

__all__ = [
    "DefaultsFormatter",
    "add_json",
    "check_targets",
    "engine_settings",
    "not_negative",
    "positive",
    "positive_number",
    "write_whole",
]

# A folder that takes no new files, a file that only its owner may replace, a file that is a mount of its own.
IN_PLACE_ONLY = (errno.EACCES, errno.EPERM, errno.EBUSY, errno.EXDEV)


# What a benchmark decides itself; left out of a user's JSON.
OWN_SETTINGS = (
    "fluid",
    "optimizer",
    "scheduler",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help with the default of each option that has one: no "(default: None)", and no second one beside the text's."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        empty = action.default is None or action.default is False or action.default in ([], {})
        return action.help if empty else super()._get_help_string(action)


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, is {text!r}")
    return value


def positive_number(text: str) -> float:
    """An argparse type: a finite number over 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, is {text!r}")
    return value


def not_negative(text: str) -> float:
    """An argparse type: a finite number of at least 0."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, is {text!r}")
    return value


def engine_settings(text: str) -> dict[str, Any]:
    """An argparse type: settings of DeepSpeed for a benchmark, as JSON or the name of a file with it.

    What is the benchmark's own, `OWN_SETTINGS`, and values that are "auto" are left out.
    """
    try:
        found = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"must be JSON or a file with it, is {text!r}: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, is {text!r}")
    settings: dict[str, Any] = _without_auto({k: v for k, v in found.items() if k not in OWN_SETTINGS})
    zero = settings.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 1) not in (1, 2):
        raise argparse.ArgumentTypeError(f"zero_optimization must have stage 1 or 2, is {zero!r}")
    return settings


def _without_auto(block: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in block.items() if value != "auto"}
    return {name: _without_auto(value) if isinstance(value, dict) else value for name, value in kept.items()}


def _number(text: str) -> float:
    """NaN, which compares with nothing, for what is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def add_json(parser: argparse.ArgumentParser, what: str = "results", instead: str = "the text") -> None:
    """Add `--json`: with the name of a file it writes there; with `-` or nothing, which reads as `-`, it prints.

    Not for a command with positional arguments of its own: the first of them, behind `--json`, would be the file.
    """
    text = f"file for the {what}; `-`, or no name, prints them instead of {instead}"
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help=text)


def write_whole(target: str | Path, text: str) -> None:
    """Write a file so that whoever reads it, or cuts this process short, finds the whole old text or the whole new."""
    path = Path(os.path.realpath(target))  # a link stays one
    if path.exists() and not path.is_file():  # a device or a pipe: nothing to replace
        path.write_text(text, encoding="utf-8")
        return
    aside = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        aside.write_text(text, encoding="utf-8")
        if path.exists():
            shutil.copymode(path, aside)
        os.replace(aside, path)
    except OSError as error:
        if error.errno not in IN_PLACE_ONLY:  # a full disk: what was written before stays
            raise
        path.write_text(text, encoding="utf-8")
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def check_targets(options: argparse.Namespace) -> None:
    """Find out now, not after minutes, that results cannot be written. Nothing stays behind.

    Raises:
        ConfigError: `--json` or `--out` is not in a folder that can be written, or `--trace` of `bench model` is none.
    """
    if int(os.environ.get("RANK", "0")) != 0:  # rank 0 writes
        return
    target = getattr(options, "json", None)
    if isinstance(target, str) and target != "-" and getattr(options, "what", "") != "table":
        _try("json", Path(target), make_folder=False)
    if getattr(options, "out", None):
        _try("out", Path(f"{options.out}.json"), make_folder=True)
    if getattr(options, "what", "") == "model" and options.trace:  # other commands mean other things by that name
        _try("trace", Path(options.trace), make_folder=True, folder=True)


def _try(option: str, path: Path, *, make_folder: bool, folder: bool = False) -> None:
    inside = path if folder else path.parent
    try:
        if path.is_dir() and not folder:
            raise IsADirectoryError("it is a folder")
        if make_folder:
            inside.mkdir(parents=True, exist_ok=True)
        if path.exists() and not folder:
            with path.open("a"):
                return
        with contextlib.closing(tempfile.TemporaryFile(dir=inside)):
            return
    except OSError as error:
        reason, kind = error.strerror or error, "folder" if folder else "file"
        raise ConfigError(f"--{option} ({path}) must be a {kind} that can be written: {reason}.") from error
