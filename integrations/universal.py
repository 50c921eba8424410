"""DeepSpeed's universal checkpoints at other layouts of the experts' parameters, with their optimizer state.

A universal checkpoint has a folder per parameter with its whole float32 value and its optimizer's moments. Names and
shapes differ between layouts: experts split over ranks are w1 (gate), w3 (up) and w2 (down); unsplit ones are
transformers' gate_up_proj and down_proj; DeepSpeed's own AutoEP names its blocks' children in another way.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import constants

from fluid_hf.errors import CheckpointError
from fluid_hf.integrations.safe_files import check_files, read_file, read_tag

__all__ = ["Source", "convert_universal", "find_source", "read_value", "recorded_shapes"]

# Keys of the values in a parameter's files.
PARAM, CAT_DIM, IS_EXPERT, NUM_EXPERTS = (
    constants.PARAM,
    constants.CAT_DIM,
    constants.EP_IS_EXPERT_PARAM,
    constants.EP_NUM_EXPERTS,
)
GROUP_KINDS = ("moe", "name")  # options by which DeepSpeed knows a group of split experts
MADE_FROM = "fluid_source.sha256"  # in a converted checkpoint: fingerprint of what it was made from
# transformers' names of what AutoEP renames in a block.
AUTOEP_NAMES = (
    (r"\.gate\.(weight|bias)$", r".router.gate.\1"),
    (r"\.shared_expert\.", ".shared_experts."),
    (r"\.shared_expert_gate\.", ".shared_experts_gate."),
)


@dataclass(frozen=True)
class Source:
    """How to make a parameter: two folders side by side, or one half of a folder."""

    names: tuple[str, ...]
    half: int | None = None


def find_source(name: str, held: set[str]) -> Source | None:
    """Where a parameter is among the folders of a universal checkpoint; `None` if it is not there."""
    for candidate in _candidates(name):
        if all(part in held for part in candidate.names):
            return candidate
    return None


def _candidates(name: str) -> Iterable[Source]:
    yield Source((name,))
    for pattern, replacement in AUTOEP_NAMES:
        if re.search(pattern, name):
            yield Source((re.sub(pattern, replacement, name),))
    layer, _, kind = name.rpartition(".")
    block = layer.removesuffix(".experts")
    if kind == "gate_up_proj":
        for prefix in (f"{layer}.experts", layer):  # ours, AutoEP's
            yield Source((f"{prefix}.w1", f"{prefix}.w3"))
    elif kind == "down_proj":
        for prefix in (f"{layer}.experts", layer):
            yield Source((f"{prefix}.w2",))
    elif kind in ("w1", "w2", "w3") and layer.endswith(".experts"):
        # Ours is block.experts.experts.w1; AutoEP's is block.experts.w1, without a level.
        yield Source((f"{block}.{kind}",))
        yield Source((f"{layer}.experts.{kind}",))
        half = None if kind == "w2" else int(kind == "w3")
        for prefix in (block, layer):
            yield Source((f"{prefix}.{'down_proj' if kind == 'w2' else 'gate_up_proj'}",), half)


def convert_universal(
    folder: Path, tag: Any, shapes: dict[str, tuple[int, ...]], groups: list[dict[str, Any]], *, ep_size: int
) -> Any:
    """Make a universal checkpoint that has parameters of these names, if it has not; not collective.

    One made before is taken again while what it was made from, and the model's layout, are the same.

    Args:
        folder: where the checkpoint's folder is.
        tag: its name; `None` for the latest.
        shapes: whole shapes of the trainable parameters of the model to load, by name.
        groups: those of the model's optimizer.
        ep_size: of the model to load.

    Returns:
        The tag to load. A converted checkpoint stays beside the other.

    Raises:
        CheckpointError: parameters are missing, or a file holds more than values; names the first and the folder.
    """
    if tag is None:
        remedy = (
            "run ds_to_universal to make a universal checkpoint; or resume without load_universal, as it was saved."
        )
        tag = read_tag(folder, "latest_universal", remedy)
    source = folder / str(tag)
    if not (source / "zero").is_dir():
        raise CheckpointError(
            f"folder ({source / 'zero'}) must exist in a universal checkpoint but does not; run ds_to_universal again."
        )
    check_files(source.rglob("*.pt"))
    held = {path.name for path in (source / "zero").iterdir() if path.is_dir()}
    sources = {name: find_source(name, held) for name in shapes}
    lost = [name for name, found in sources.items() if found is None]
    if lost:
        others = f"{len(lost) - 1} others are missing, too"
        raise CheckpointError(
            f"tensor ({lost[0]}) must be in {source / 'zero'} but is not ({others}); resume the model it was made from."
        )
    wanted = {name: found for name, found in sources.items() if found is not None}
    if all(found == Source((name,)) for name, found in wanted.items()):
        return tag
    target = folder / f"{tag}_ep{ep_size}"
    fingerprint = _fingerprint(source, shapes, groups)
    if not target.exists() or _made_from(target) != fingerprint:
        aside = target.with_name(f"{target.name}.incomplete")
        shutil.rmtree(aside, ignore_errors=True)
        _convert(source, aside, wanted, shapes, groups, split=ep_size > 1)
        (aside / MADE_FROM).write_text(fingerprint, encoding="utf-8")
        if target.exists():  # of another source; without it the next run converts again
            shutil.rmtree(target)
        os.rename(aside, target)
    return target.name


def _fingerprint(source: Path, shapes: dict[str, tuple[int, ...]], groups: list[dict[str, Any]]) -> str:
    """Of a universal checkpoint's files, by name, size and time, and of what a conversion depends on besides."""
    stats = sorted((str(path.relative_to(source)), path.stat()) for path in source.rglob("*") if path.is_file())
    files = [(name, found.st_size, found.st_mtime_ns) for name, found in stats]
    kinds = [[group.get(key) for key in GROUP_KINDS] for group in groups]
    return hashlib.sha256(repr((files, sorted(shapes.items()), kinds)).encode()).hexdigest()


def _made_from(target: Path) -> str | None:
    path = target / MADE_FROM
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _convert(
    source: Path,
    aside: Path,
    wanted: dict[str, Source],
    shapes: dict[str, tuple[int, ...]],
    groups: list[dict[str, Any]],
    *,
    split: bool,
) -> None:
    (aside / "zero").mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file():
            _link(path, aside / path.name)
    recorded = recorded_shapes(source)
    for name, found in wanted.items():
        (aside / "zero" / name).mkdir()
        for path in (source / "zero" / found.names[0]).glob("*.pt"):
            where = aside / "zero" / name / path.name
            if found == Source((name,)) or path.name == "step.pt":
                _link(path, where)
            else:
                paths = [source / "zero" / part / path.name for part in found.names]
                value = read_value(paths, found, shapes[name], recorded)
                torch.save(_described(value, split=split), where)
    state = read_file(source / "zero" / "optimizer_state.pt")
    _convert_groups(state, groups)
    torch.save(state, aside / "zero" / "optimizer_state.pt")


def recorded_shapes(source: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the saved model's parameters: values saved at stage 3 are flat."""
    path = next(iter(sorted(source.glob("*_model_states.pt"))), None)
    groups = read_file(path, mmap=True).get("param_shapes") if path is not None else None
    return {name: tuple(shape) for group in groups or () for name, shape in group.items()}


def read_value(
    paths: list[Path], source: Source, shape: tuple[int, ...], recorded: dict[str, tuple[int, ...]]
) -> torch.Tensor:
    """A parameter's value, or one of its optimizer's, from the files of its parts.

    Args:
        paths: a file in each folder of `source`.
        source: how to make the parameter.
        shape: its whole shape.
        recorded: shapes of the saved parameters, for values that are saved flat.

    Raises:
        CheckpointError: the files hold something of another shape.
    """
    values = [read_file(path) for path in paths]
    tensors = [(value[PARAM] if isinstance(value, dict) else value).detach() for value in values]
    tensors = [
        tensor.view(recorded[path.parent.name]) if tensor.dim() == 1 and path.parent.name in recorded else tensor
        for tensor, path in zip(tensors, paths, strict=True)
    ]
    tensor = _arrange(tensors, source, shape)
    if tensor is None:
        raise CheckpointError(
            f"tensor in {paths[0]} has shape {list(tensors[0].shape)}, which cannot be made {list(shape)} "
            "for this layout of the experts; start from the plain weights instead."
        )
    return tensor


def _described(tensor: torch.Tensor, *, split: bool) -> dict[str, Any]:
    """A value as the universal checkpoint's loader wants it."""
    value: dict[str, Any] = {PARAM: tensor, CAT_DIM: 0}
    if split and tensor.dim() == 3:
        value.update({IS_EXPERT: True, NUM_EXPERTS: tensor.shape[0]})
    return value


def _arrange(tensors: list[torch.Tensor], source: Source, shape: tuple[int, ...]) -> torch.Tensor | None:
    """Side by side along the dimension that gives the shape: 1, or 2 where weights are stored transposed."""
    for dim in (1, 2) if len(shape) == 3 else (0,):
        if any(tensor.dim() <= dim for tensor in tensors):
            break
        if source.half is not None:
            made = tensors[0].chunk(2, dim=dim)[source.half].contiguous()
        else:
            made = torch.cat(tensors, dim=dim) if len(tensors) > 1 else tensors[0]
        if tuple(made.shape) == shape:
            return made
    return None


def _convert_groups(state: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """One saved group per group of the optimizer: a group of split experts has its dense neighbour's options."""
    saved = state.get("param_groups")
    if saved is None:
        return
    dense = [group for group in saved if not group.get("moe")] or saved
    converted, position = [], -1
    for group in groups:
        if not group.get("moe") or position < 0:
            position = min(position + 1, len(dense) - 1)
        options = {key: value for key, value in dense[position].items() if key not in GROUP_KINDS}
        converted.append({**options, **{key: group[key] for key in GROUP_KINDS if key in group}})
    state["param_groups"] = converted


def _link(source: Path, target: Path) -> None:
    """The same file under another name; a copy where there are no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
