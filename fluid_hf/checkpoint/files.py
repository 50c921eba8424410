"""safetensors files written tensor by tensor, and model folders changed so that a reader never sees half a model."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["SafetensorsFile", "TensorSpec", "new_folder", "publish", "remove_folder", "sync_folder"]

INSIDE = Path(".cache", "huggingface")  # in a model's folder; left out of every upload

# Names of the safetensors format: https://huggingface.co/docs/safetensors
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that is not there yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        """That of a tensor; ZeRO-3 keeps the whole shape of a parameter that it has partitioned."""
        return cls(tuple(getattr(tensor, "ds_shape", tensor.shape)), tensor.dtype)

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def meta(self) -> torch.Tensor:
        """A tensor without data."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class SafetensorsFile:
    """One file of tensors that are known by shape first and written one at a time, in any order.

    Args:
        path: where to write.
        specs: all tensors of the file.

    The data lies as safetensors' own writer lays it: by decreasing size of the dtype, then by name.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self._specs = dict(specs)
        self._missing = set(specs)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._offsets: dict[str, int] = {}
        position = 0
        for name in sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name)):
            spec = specs[name]
            end = position + spec.num_bytes
            header[name] = {"dtype": DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [position, end]}
            self._offsets[name] = position
            position = end
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._start + position)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the data of one tensor on the CPU."""
        if TensorSpec.of(tensor) != self._specs[name]:
            raise ValueError(f"{name} is {TensorSpec.of(tensor)}, planned was {self._specs[name]}")
        self._file.seek(self._start + self._offsets[name])
        self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._missing.discard(name)

    @property
    def complete(self) -> bool:
        """Whether every tensor is written."""
        return not self._missing

    def close(self) -> None:
        """Bring the data to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def new_folder(target: Path) -> Path:
    """An empty folder on the file system of `target`; what killed writers of the same target left is removed.

    Of a target that exists it is inside: that may be a mount point, a link, or in a folder that cannot be written.
    There it is where `huggingface_hub` keeps files of its own, which it never uploads. `remove_folder` removes it.
    """
    beside = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.tmp")
    inside = re.compile(r"fluid_hf\.[0-9a-f]{8}\.tmp")
    token = uuid.uuid4().hex[:8]
    if target.exists():
        place = target.resolve() / INSIDE
        aside = place / f"fluid_hf.{token}.tmp"
    else:
        place = target.parent
        aside = place / f".{target.name}.{token}.tmp"
    place.mkdir(parents=True, exist_ok=True)
    for folder, name in ((target.parent, beside), (target / INSIDE, inside)):
        with contextlib.suppress(OSError):  # no longer there, or a parent that cannot be read
            for path in [path for path in folder.iterdir() if name.fullmatch(path.name)]:
                shutil.rmtree(path, ignore_errors=True)
    aside.mkdir()
    return aside


def remove_folder(aside: Path) -> None:
    """Remove what `new_folder` made, with what is in it."""
    shutil.rmtree(aside, ignore_errors=True)
    place = aside.parent
    if place.parts[-len(INSIDE.parts) :] == INSIDE.parts:
        with contextlib.suppress(OSError):  # others' files are there
            place.rmdir()
            place.parent.rmdir()


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(aside: Path, target: Path, weights_name: str, index_name: str) -> None:
    """Move the complete model in `aside` to `target`. At every moment a reader finds one whole model there.

    Args:
        aside: folder on the same file system, with all files of the new model.
        target: the folder to change; other files in it stay.
        weights_name: file of an unsharded model, which readers prefer to an index.
        index_name: index of a sharded one.
    """
    for path in aside.iterdir():
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
    sync_folder(aside)
    if not target.exists():
        os.rename(aside, target)
        sync_folder(target.parent)
        return
    stem = weights_name.removesuffix(".safetensors")
    shard = re.compile(rf"{re.escape(stem)}(-[0-9a-f]{{8}})?-\d{{5}}-of-\d{{5}}\.safetensors")
    for path in sorted(aside.iterdir()):
        if path.is_file() and path.name not in (weights_name, index_name) and not shard.fullmatch(path.name):
            os.replace(path, target / path.name)
    shards = sorted(path for path in aside.iterdir() if shard.fullmatch(path.name))
    kept = {path.name for path in shards}
    if (aside / weights_name).exists():
        kept = {weights_name}
        _move([aside / weights_name], target)
        (target / index_name).unlink(missing_ok=True)
    elif shards:
        kept = _publish_shards(aside, target, shards, weights_name, index_name)
    for path in list(target.iterdir()) if kept else []:
        if shard.fullmatch(path.name) and path.name not in kept:
            path.unlink()
    sync_folder(target)


def _publish_shards(aside: Path, target: Path, shards: list[Path], weights_name: str, index_name: str) -> set[str]:
    """Put shards, then their index in place; the index is what makes them the model. Returns the shards' names."""
    names = {path.name for path in shards}
    if not any((target / name).exists() for name in names):
        _move(shards, target)
        _move([aside / index_name], target)
        (target / weights_name).unlink(missing_ok=True)
        return names
    # The old index may name these very files: first under names of their own, later under the usual ones.
    stem, token = weights_name.removesuffix(".safetensors"), uuid.uuid4().hex[:8]
    renamed = {name: f"{stem}-{token}{name.removeprefix(stem)}" for name in names}
    index = json.loads((aside / index_name).read_text(encoding="utf-8"))
    index["weight_map"] = {key: renamed[name] for key, name in index["weight_map"].items()}
    first_index = aside / f"{token}.json"
    with first_index.open("w", encoding="utf-8") as handle:
        json.dump(index, handle, indent=2, sort_keys=True)
        handle.flush()
        os.fsync(handle.fileno())
    linked = _link(shards, [target / renamed[path.name] for path in shards])
    sync_folder(target)
    os.replace(first_index, target / index_name)
    (target / weights_name).unlink(missing_ok=True)
    sync_folder(target)
    if not linked:  # a file system without links keeps the other names, which the index gives
        return set(renamed.values())
    _move(shards, target)
    _move([aside / index_name], target)
    return names


def _link(sources: Iterable[Path], targets: Iterable[Path]) -> bool:
    """Give the files second names; where there are no links, move them. Whether the first names are left."""
    linked = True
    for source, target in zip(sources, targets, strict=True):
        try:
            os.link(source, target)
        except OSError:
            linked = False
            os.replace(source, target)
    return linked


def _move(paths: Iterable[Path], target: Path) -> None:
    for path in paths:
        os.replace(path, target / path.name)
    sync_folder(target)
