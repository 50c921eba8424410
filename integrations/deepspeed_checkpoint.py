"""DeepSpeed's checkpoints of a patched model: whole or not there, refused or converted at another expert layout."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.checkpoint import constants
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.utils import logger
from torch import nn

from fluid_hf.checkpoint.files import sync_folder
from fluid_hf.checkpoint.gather import split_layers, trained_weights
from fluid_hf.checkpoint.saving import stage_weights
from fluid_hf.control import ControlGroup
from fluid_hf.errors import CheckpointError
from fluid_hf.integrations.optimizer_groups import fit_schedules
from fluid_hf.integrations.safe_files import check_files, read_tag
from fluid_hf.integrations.shared_folder import check_found_alike, check_node_local, check_shared
from fluid_hf.integrations.universal import convert_universal
from fluid_hf.state import FluidState

__all__ = ["bind_checkpoints"]

LAYOUT_FILE = "fluid.json"
REPLACED = ".replaced"
CONFIG_FILE = "config.json"
RECOVERY_SCRIPT = """#!/usr/bin/env python
# Writes a complete Hugging Face model in float32 from this checkpoint: python zero_to_fp32.py . output_dir
from fluid_hf.integrations.zero_to_fp32 import main

if __name__ == "__main__":
    main()
"""


def bind_checkpoints(engine: Any, model: nn.Module, state: FluidState) -> None:
    """Give an engine of a patched model methods that save and load in its layout, or whole."""
    layout = {"ep_size": state.groups.ep_size, "world_size": state.groups.world_size}
    engine.save_checkpoint = _wrap_save(engine, engine.save_checkpoint, model, state, layout)
    engine.load_checkpoint = _wrap_load(engine, engine.load_checkpoint, model, state, layout)

    def consolidated(exclude_frozen_parameters: bool = False) -> Mapping[str, torch.Tensor]:
        return stage_weights(model, state, _frozen_names(model) if exclude_frozen_parameters else ())

    if state.groups.ep_size > 1 or state.bound_methods:
        engine._zero3_consolidated_16bit_state_dict = consolidated
        engine.save_16bit_model = _wrap_save_16bit(engine, engine.save_16bit_model, model, state, consolidated)


def _frozen_names(model: nn.Module) -> set[str]:
    """Names of the weights that are not trained, as the unpatched model has them, tied ones under each name."""
    named = model.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in named if not parameter.requires_grad}
    for prefix, layer in split_layers(model).items():
        frozen |= {f"{prefix}.{name}" for name, trained in trained_weights(layer).items() if not trained}
    return frozen


def _wrap_save_16bit(
    engine: Any,
    save: Callable[..., Any],
    model: nn.Module,
    state: FluidState,
    consolidated: Callable[[bool], Mapping[str, torch.Tensor]],
) -> Callable[..., bool]:
    """DeepSpeed's own writes rank 0's experts only, and refuses at stage 3."""

    @functools.wraps(save)
    def save_16bit_model(
        save_dir: Any, save_filename: str = "pytorch_model.bin", exclude_frozen_parameters: bool = False
    ) -> bool:
        path = Path(save_dir) / save_filename
        if engine.zero_optimization_partition_weights() and not engine.zero_gather_16bit_weights_on_model_save():
            logger.warning(f"Did not save the model {path} because stage3_gather_16bit_weights_on_model_save is False")
            return False
        staged = consolidated(exclude_frozen_parameters)
        commit = CheckpointCommitInfo(tag=f"global_step{engine.global_steps}", save_dir=save_dir, save_latest=False)
        engine.checkpoint_engine.create(commit)

        def write() -> None:
            weights = dict(staged)
            _add_tied(model, weights)
            engine.checkpoint_engine.makedirs(save_dir, exist_ok=True)
            engine.checkpoint_engine.save(weights, str(path))

        write_here = write if dist.get_rank() == 0 else None
        _write_or_raise(write_here, path, state.control, "engine.save_16bit_model")
        engine.checkpoint_engine.commit(commit)
        return True

    return save_16bit_model


def _add_tied(model: nn.Module, weights: MutableMapping[str, torch.Tensor]) -> None:
    """Name tied weights by all their names, as a state dict does; `stage_weights` has each of them once."""
    names: dict[int, list[str]] = {}
    for name, tensor in nn.Module.state_dict(model, keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    for tied in names.values():
        weight = next((weights[name] for name in tied if name in weights), None)
        if weight is not None:
            weights.update(dict.fromkeys(tied, weight))


def _wrap_save(
    engine: Any, save: Callable[..., Any], model: Any, state: FluidState, layout: dict[str, int]
) -> Callable[..., Any]:
    @functools.wraps(save)
    def save_checkpoint(
        save_dir: Any, tag: Any = None, client_state: Any = None, save_latest: bool = True, **kwargs: Any
    ) -> Any:
        tag = str(tag if tag is not None else f"global_step{engine.global_steps}")
        folder, is_main = Path(save_dir), dist.get_rank() == 0
        # Other engines write in the background or on several file systems; theirs is the order of events.
        at_once = type(engine.checkpoint_engine) is TorchCheckpointEngine and not engine.use_node_local_storage()
        name = f"{tag}.incomplete" if at_once else tag
        first_here = engine.local_rank == 0 if engine.use_node_local_storage() else is_main
        if engine.use_node_local_storage():
            check_node_local(engine.zero_optimization_stage(), split=engine.has_moe_layers)
        else:
            check_shared(folder, state.control, "engine.save_checkpoint")

        def begin() -> None:
            shutil.rmtree(folder / f"{tag}.incomplete", ignore_errors=True)
            _describe(folder / name, model, layout)

        _write_or_raise(begin if first_here else None, folder / tag, state.control)
        if layout["ep_size"] == 1:  # ds_to_universal asks for it; of split experts the engine writes more
            version = {constants.UNIVERSAL_CHECKPOINT_VERSION_KEY: constants.UNIVERSAL_CHECKPOINT_VERSION_VALUE}
            client_state = {constants.UNIVERSAL_CHECKPOINT_INFO: version, **(client_state or {})}
        result = save(save_dir, name, client_state or {}, save_latest=save_latest and not at_once, **kwargs)
        if at_once:
            state.control.gather(None, "engine.save_checkpoint")  # all ranks' files are there

        def finish() -> None:
            if at_once:
                _put_in_place(folder, name, tag, save_latest)
            elif save_latest and not is_main:  # the engine tells the first node only which one is the latest
                (folder / "latest").write_text(tag, encoding="utf-8")
            if layout["ep_size"] > 1:
                (folder / "zero_to_fp32.py").write_text(RECOVERY_SCRIPT, encoding="utf-8")

        _write_or_raise(finish if first_here else None, folder / tag, state.control)
        return result

    return save_checkpoint


def _write_or_raise(
    write: Callable[[], None] | None, path: Path, control: ControlGroup, what: str = "engine.save_checkpoint"
) -> None:
    """Write on the ranks that are given something to write; if that fails on any, raise on all. Collective."""
    failure: Exception | None = None
    try:
        if write is not None:
            write()
    except (OSError, RuntimeError) as error:  # the latter is what torch.save makes of a full or missing folder
        failure = error
    problems = control.gather(None if failure is None else str(failure), what)
    problem = next((found for found in problems if found is not None), None)
    if problem is not None:
        raise CheckpointError(
            f"checkpoint ({path}) cannot be written: {problem}; free space, remove what is in its way, or choose "
            "another folder."
        ) from failure


def _describe(folder: Path, model: Any, layout: dict[str, int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LAYOUT_FILE).write_text(json.dumps(layout), encoding="utf-8")
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_json_string"):
        text = config.to_json_string()
        architectures = {"architectures": [type(model).__name__]}
        (folder / CONFIG_FILE).write_text(json.dumps({**json.loads(text), **architectures}), encoding="utf-8")


def _put_in_place(folder: Path, name: str, tag: str, save_latest: bool) -> None:
    """Name a complete checkpoint, then make it the latest."""
    for path in (folder / name).rglob("*"):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
    sync_folder(folder / name)
    replaced = folder / f"{tag}{REPLACED}"
    shutil.rmtree(replaced, ignore_errors=True)
    if (folder / tag).exists():  # between the two renames a reader finds it under this name: `_find_replaced`
        os.rename(folder / tag, replaced)
    os.rename(folder / name, folder / tag)
    sync_folder(folder)
    if save_latest:
        with (folder / "latest.incomplete").open("w", encoding="utf-8") as handle:
            handle.write(tag)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(folder / "latest.incomplete", folder / "latest")
        sync_folder(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _find_replaced(folder: Path) -> None:
    """Give checkpoints their names back whose writer was killed between the two renames of `_put_in_place`."""
    for replaced in folder.glob(f"*{REPLACED}"):
        whole = replaced.with_name(replaced.name.removesuffix(REPLACED))
        if not whole.exists():
            os.rename(replaced, whole)


def _wrap_load(
    engine: Any, load: Callable[..., Any], model: nn.Module, state: FluidState, layout: dict[str, int]
) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_checkpoint(load_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        folder = Path(load_dir)
        if dist.get_rank() == 0:
            with contextlib.suppress(OSError):  # a folder that cannot be written was not being written
                _find_replaced(folder)
        state.control.gather(None, "engine.load_checkpoint")
        check_found_alike(folder / ("latest" if tag is None else str(tag)), state.control, "engine.load_checkpoint")
        if not engine.load_universal_checkpoint():
            error = None
            try:
                _check_layout(folder, tag, layout)
                _check_own_files(engine, folder, tag)
            except CheckpointError as failure:
                error = failure
            state.control.agree(error, None, "engine.load_checkpoint")
            return load(load_dir, tag, *args, **kwargs)
        shapes = {
            name: _whole_shape(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        options = [dict(group) for group in engine.optimizer.param_groups]
        error = None
        if dist.get_rank() == 0:
            try:
                tag = convert_universal(folder, tag, shapes, options, ep_size=layout["ep_size"])
            except Exception as failure:
                error = failure if isinstance(failure, CheckpointError) else CheckpointError(f"{folder}: {failure}")
        tag = next(iter(state.control.gather(tag, "engine.load_checkpoint")))
        state.control.agree(error, None, "engine.load_checkpoint")
        fit_schedules(engine.basic_optimizer)
        result = load(load_dir, tag, *args, **kwargs)
        _repair_optimizer(engine, options)
        return result

    return load_checkpoint


def _check_own_files(engine: Any, folder: Path, tag: Any) -> None:
    """Refuse files that hold more than values, each rank its share of them: DeepSpeed unpickles all that they name."""
    if type(engine.checkpoint_engine) is not TorchCheckpointEngine or (tag is None and not _has_latest(folder)):
        return  # another format; or DeepSpeed says what is missing
    tag = read_tag(folder, "latest", "") if tag is None else tag
    files = sorted((folder / str(tag)).glob("*.pt"))
    alone = engine.use_node_local_storage()
    check_files(files if alone else files[dist.get_rank() :: dist.get_world_size()])


def _has_latest(folder: Path) -> bool:
    return (folder / "latest").is_file()


def _whole_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Shape over all ranks that hold a share or a partition."""
    metadata = getattr(parameter, constants.DS_AUTOEP_UC_META, None)
    if metadata is not None:
        return tuple(metadata[constants.AUTOEP_PARAM_LOGICAL_SHAPE])
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _repair_optimizer(engine: Any, options: list[dict[str, Any]]) -> None:
    """What DeepSpeed 0.19.8 gets wrong with several groups when it loads a universal checkpoint at stage 3.

    All groups would share one step counter, which each of them then advances; and all would get the first one's
    options, such as its weight decay.
    """
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for values in getattr(optimizer, "state", {}).values():
        if isinstance(values.get("step"), torch.Tensor):
            values["step"] = values["step"].clone()
    mixed_up = engine.zero_optimization_stage() == 3
    for group, held in zip(optimizer.param_groups, options, strict=True):
        kept = set(held) - {"params", "lr"} if mixed_up else {"moe", "name"} & set(held)
        group.update({key: held[key] for key in kept})


def _check_layout(folder: Path, tag: Any, layout: dict[str, int]) -> None:
    """Refuse what DeepSpeed would load wrongly without a word: optimizer state of another expert layout."""
    if tag is None:
        if not _has_latest(folder):
            return  # DeepSpeed says what is missing
        tag = read_tag(folder, "latest", "")
    path = folder / str(tag) / LAYOUT_FILE
    saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if saved is None and layout["ep_size"] > 1:
        raise CheckpointError(
            f"checkpoint ({folder / str(tag)}) has no {LAYOUT_FILE}: it was not saved by a patched model; load the "
            f"plain weights with from_pretrained before patch_model instead, or resume with ep_size 1."
        )
    for field in ("ep_size", "world_size"):
        if saved is not None and saved[field] != layout[field] and max(saved["ep_size"], layout["ep_size"]) > 1:
            raise CheckpointError(
                f"{field} ({layout[field]}) must equal the {field} ({saved[field]}) of the checkpoint "
                f"({folder / str(tag)}); set {field} {saved[field]}, or convert it (not at ZeRO 0): python -m "
                f"deepspeed.checkpoint.ds_to_universal --input_folder {folder / str(tag)} --output_folder "
                f'{folder / str(tag)}_universal, then resume with {{"checkpoint": {{"load_universal": true}}}} in '
                "the DeepSpeed JSON; or start from the plain weights saved beside it."
            )
