"""What is in a checkpoint's safetensors files, checked against the model before a byte of data is read."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from fluid_hf.checkpoint.files import DTYPES, TensorSpec
from fluid_hf.checkpoint.memory import MemoryReturner
from fluid_hf.errors import CheckpointError

__all__ = [
    "ExpertShare",
    "LazyTensor",
    "StoredTensor",
    "check_inside",
    "match_tensors",
    "open_share",
    "read_headers",
    "select_share",
]

FLOATING = {name for dtype, name in DTYPES.items() if dtype.is_floating_point}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class ExpertShare:
    """The experts that one rank holds of each layer."""

    num_experts: int
    start: int
    stop: int


@dataclass
class Sources:
    """Stored tensors that make one tensor of the model, by the pattern that they match."""

    by_pattern: dict[str | None, list[StoredTensor]] = field(default_factory=dict)

    def all(self) -> list[StoredTensor]:
        """All of them."""
        return [stored for group in self.by_pattern.values() for stored in group]


class LazyTensor:
    """Rows of a stored tensor, read when they are asked for as `tensor[...]`, as transformers' loader does."""

    def __init__(self, opened: Any, name: str, rows: slice | None, memory: MemoryReturner) -> None:
        self._slice = opened.get_slice(name)
        self._rows = rows
        self._memory = memory

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor: torch.Tensor = self._slice[self._rows if self._rows is not None else index]
        self._memory.allocated(tensor.nbytes)
        return tensor

    def get_shape(self) -> list[int]:
        """Shape of what is read."""
        shape = list(self._slice.get_shape())
        return shape if self._rows is None else [self._rows.stop - self._rows.start, *shape[1:]]

    def get_dtype(self) -> str:
        """Dtype as safetensors names it."""
        return str(self._slice.get_dtype())


def check_inside(folder: str, weight_map: Mapping[str, str]) -> None:
    """Refuse an index that leads out of its folder.

    Raises:
        CheckpointError: names the tensor and the file.
    """
    for name, file in weight_map.items():
        if os.path.isabs(file) or ".." in Path(file).parts:
            raise CheckpointError(
                f"file ({file}) of tensor ({name}) by the index must be in {folder}; get the index again."
            )


def read_headers(files: Sequence[str | os.PathLike[str]], weight_map: Mapping[str, str]) -> dict[str, StoredTensor]:
    """All tensors of the files, from their headers.

    Args:
        files: the shards.
        weight_map: tensors and their files by the index; empty without one.

    Raises:
        CheckpointError: a file is missing, cut off or not in the safetensors format, or lacks a tensor that the index
            says it has; names the file and a tensor.
    """
    found: dict[str, StoredTensor] = {}
    for path in map(Path, files):
        listed = sorted(name for name, file in weight_map.items() if file == path.name)
        try:
            found.update(_read_header(path))
        except (OSError, ValueError, KeyError, TypeError) as error:
            held = f", which the index says has tensor ({listed[0]}) and {len(listed) - 1} others," if listed else ""
            raise CheckpointError(f"file ({path}){held} cannot be read: {error}; get it again.") from error
        lost = [name for name in listed if name not in found or found[name].file != path]
        if lost:
            raise CheckpointError(
                f"tensor ({lost[0]}) must be in file ({path}), as the index says, but is not; get both again."
            )
    return found


def _read_header(path: Path) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"it is cut off in its header, at {size} bytes")
        header = json.loads(file.read(length))
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    # In the order of the data, so that the first tensor that the file is too short for is named.
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        end = 8 + length + entry["data_offsets"][1]
        if end > size:
            raise ValueError(f"it is cut off at {size} bytes, in tensor ({name}), which ends at {end}")
    return {name: StoredTensor(name, path, tuple(e["shape"]), e["dtype"]) for name, e in entries.items()}


def match_tensors(model: Any, stored: Mapping[str, StoredTensor], weight_mapping: Sequence[Any]) -> dict[str, Sources]:
    """Stored tensors by the model's name of what they become, by transformers' own conversion rules."""
    rules = copy.deepcopy(list(weight_mapping))  # they remember what they have matched
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    expected, prefix = model.state_dict(), model.base_model_prefix
    matched: dict[str, Sources] = {}
    for name, tensor in stored.items():
        target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in expected and name in expected:
            target, pattern = rename_source_key(name, [], [], prefix, expected)
        matched.setdefault(target, Sources()).by_pattern.setdefault(pattern, []).append(tensor)
    return matched


def select_share(
    expected: Mapping[str, TensorSpec], matched: Mapping[str, Sources], split: Mapping[str, ExpertShare]
) -> dict[str, slice | None]:
    """Which stored tensors this rank reads, and which of their rows (`None`: all).

    Args:
        expected: the model's tensors, whole.
        matched: what was found for each.
        split: names of the experts' tensors, and this rank's experts.

    Raises:
        CheckpointError: a tensor has a shape or dtype that does not fit the model, or an expert is missing.
    """
    wanted: dict[str, slice | None] = {}
    for target, sources in matched.items():
        if target not in expected:
            continue  # transformers reports what the model has no place for
        _check_sources(target, expected[target], sources, split.get(target))
        for group in sources.by_pattern.values():
            for stored in group:
                share = split.get(target)
                if share is None:
                    wanted[stored.name] = None
                elif len(stored.shape) == len(expected[target].shape):
                    wanted[stored.name] = slice(share.start, share.stop)
                elif share.start <= expert_index(stored.name) < share.stop:
                    wanted[stored.name] = None
    return wanted


def expert_index(name: str) -> int:
    """The expert that a tensor belongs to: the last number in its name."""
    return next((int(part) for part in reversed(name.split(".")) if part.isdigit()), -1)


def _check_sources(target: str, expected: TensorSpec, sources: Sources, share: ExpertShare | None) -> None:
    for stored in sources.all():
        if expected.dtype.is_floating_point and stored.dtype not in FLOATING:
            raise CheckpointError(
                f"tensor ({stored.name}) in file ({stored.file}) has dtype ({stored.dtype}) and must be floating point "
                f"for {target}; load an unquantised checkpoint."
            )
    for group in sources.by_pattern.values():
        if share is not None:
            _check_experts(target, expected, group, share)
    stored = sources.all()[0]
    if None in sources.by_pattern and stored.shape != expected.shape:
        raise CheckpointError(
            f"tensor ({stored.name}) in file ({stored.file}) has shape {list(stored.shape)} and must have "
            f"{list(expected.shape)} for {target}; use the config.json that belongs to the files."
        )
    total = sum(math.prod(stored.shape) for stored in sources.all())
    if share is not None and total != math.prod(expected.shape):
        raise CheckpointError(
            f"tensors of {target} (such as {stored.name}, shape {list(stored.shape)}, in file {stored.file}) have "
            f"{total} elements and must have {math.prod(expected.shape)} for shape {list(expected.shape)}; use the "
            "config.json that belongs to the files."
        )


def _check_experts(target: str, expected: TensorSpec, group: list[StoredTensor], share: ExpertShare) -> None:
    """One tensor per expert, all alike; or one for all experts with the experts first."""
    first = group[0]
    if len(first.shape) == len(expected.shape):
        if len(group) > 1 or first.shape[0] != share.num_experts:
            raise CheckpointError(
                f"tensor ({first.name}) in file ({first.file}) has shape {list(first.shape)} and must have num_experts "
                f"({share.num_experts}) first for {target}; use the config.json that belongs to the files."
            )
        return
    held = {expert_index(stored.name): stored for stored in group}
    lost = sorted(set(range(share.num_experts)) - set(held))
    if lost or len(held) != share.num_experts:
        raise CheckpointError(
            f"experts of {target} in the files ({len(held)}) must be num_experts ({share.num_experts}): "
            f"{f'expert {lost[0]} is missing beside' if lost else 'there are more, such as'} tensor "
            f"({group[-1].name}) in file ({group[-1].file}); get the files or config.json again."
        )
    for stored in group:
        if stored.shape != first.shape:
            raise CheckpointError(
                f"tensor ({stored.name}) in file ({stored.file}) has shape {list(stored.shape)} and must have that of "
                f"{first.name} ({list(first.shape)})."
            )


def open_share(stored: Mapping[str, StoredTensor], wanted: Mapping[str, slice | None]) -> dict[str, LazyTensor]:
    """Readers of this rank's tensors and rows."""
    files = {stored[name].file for name in wanted}
    # Read, not mapped: pages of a mapped file would count as this process's memory until it is closed.
    opened = {file: _open(file) for file in files}
    memory = MemoryReturner()
    return {name: LazyTensor(opened[stored[name].file], name, rows, memory) for name, rows in wanted.items()}


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", backend="pread")
    except TypeError:  # safetensors below 0.8
        return safe_open(file, framework="pt")
