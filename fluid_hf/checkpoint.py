"""Plain Hugging Face checkpoints from a patched model: gather the experts, write aside, rename into place."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fluid_hf.errors import CheckpointError, NotPatchedError
from fluid_hf.moe.layer import ExpertParallelLayer
from fluid_hf.state import FluidState

__all__ = ["bind_saving", "full_state_dict", "gather_experts", "save_pretrained", "unbind_saving"]


def save_pretrained(model: nn.Module, directory: str | os.PathLike[str], **kwargs: Any) -> None:
    """Write a complete plain Hugging Face checkpoint. Collective over all ranks; rank 0 writes.

    Args:
        model: a patched model.
        directory: where to write; files appear there only once they are complete.
        **kwargs: passed on to transformers' `save_pretrained` (`max_shard_size`, ...).

    Raises:
        CheckpointError: on every rank, when the directory cannot be written; what was there stays as it was.
        NotPatchedError: the model is not patched.
    """
    state = getattr(model, "fluid", None)
    if not isinstance(state, FluidState):
        raise NotPatchedError(f"{type(model).__name__} is not patched; use its own save_pretrained.")
    weights = full_state_dict(model)
    error = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            write_checkpoint(model, directory, weights, **kwargs)
        except Exception as failure:
            error = CheckpointError(f"directory ({directory}) cannot be written: {failure}; nothing was changed in it.")
    state.control.agree(error, None, "fluid_hf.save_pretrained")


def write_checkpoint(
    model: Any, directory: str | os.PathLike[str], weights: dict[str, torch.Tensor], **kwargs: Any
) -> None:
    """Write `weights` under transformers' names into a folder beside `directory`, then move each file into place."""
    target = Path(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        type(model).save_pretrained(model, aside, state_dict=weights, **kwargs)
        target.mkdir(exist_ok=True)
        written = sorted(path for path in aside.iterdir() if path.is_file())
        for path in written:
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        # An index is moved last: it is what makes a sharded checkpoint visible.
        for path in sorted(written, key=lambda path: path.name.endswith(".index.json")):
            os.replace(path, target / path.name)
        _remove_stale_weights(target, {path.name for path in written})
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _remove_stale_weights(target: Path, written: set[str]) -> None:
    """Weight files of an earlier save with other shards would be read instead of, or beside, the new ones."""
    for path in target.glob("model*.safetensors*"):
        if path.name not in written:
            path.unlink()


def full_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights under transformers' names, on the CPU of rank 0; empty elsewhere. Collective over all ranks.

    Raises:
        CollectiveError: not every rank called it in time.
    """
    state: FluidState = model.fluid  # type: ignore[assignment]
    state.control.gather(None, "saving a patched model (state_dict)")
    with state.gathering():
        return _gather_all(model, state)


def _gather_all(model: nn.Module, state: FluidState) -> dict[str, torch.Tensor]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    full: dict[str, torch.Tensor] = {}
    inside = tuple(f"{name}." for name in state.layers) if state.groups.ep_size > 1 else ()
    for name, tensor in nn.Module.state_dict(model, keep_vars=True).items():
        if inside and name.startswith(inside):
            continue
        with state.backend.full([tensor]):
            if rank == 0:
                full[name] = tensor.detach().to("cpu", copy=True)
    for name, layer in state.layers.items() if inside else ():
        gate_up, down = gather_experts(layer, state, to_all=False)
        if rank == 0:
            assert gate_up is not None and down is not None
            full[f"{name}.gate_up_proj"], full[f"{name}.down_proj"] = gate_up, down
    return full


@torch.no_grad()
def gather_experts(
    layer: ExpertParallelLayer, state: FluidState, *, to_all: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """All experts of a layer in transformers' fused layout: on every rank, or on the CPU of global rank 0 only."""
    group, size, rank = state.groups.ep_group, state.groups.ep_size, dist.get_rank()
    takes_part = to_all or 0 in dist.get_process_group_ranks(group)
    gathered: list[torch.Tensor | None] = [None, None]
    with state.backend.full(layer.parameters()):
        for index, tensor in enumerate(layer.fused_weights() if takes_part else ()):
            tensor = tensor.contiguous()
            parts = [torch.empty_like(tensor) for _ in range(size)] if to_all or rank == 0 else None
            if to_all:
                dist.all_gather(parts, tensor, group=group)
            else:
                dist.gather(tensor, parts, dst=0, group=group)
            if parts is not None:
                gathered[index] = torch.cat(parts if to_all else [part.cpu() for part in parts])
    return gathered[0], gathered[1]


def bind_saving(model: nn.Module, state: FluidState) -> None:
    """Let the model's own `save_pretrained`, and its `state_dict` under an engine, give complete checkpoints."""
    if state.groups.ep_size == 1:
        return

    def save(directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        weights = kwargs.pop("state_dict", None)
        is_main = kwargs.pop("is_main_process", None)
        if weights is None:
            save_pretrained(model, directory, **kwargs)
        elif is_main is None or is_main:
            write_checkpoint(model, directory, weights, **kwargs)

    def state_dict(*args: Any, **kwargs: Any) -> dict[str, Any]:
        # accelerate asks without arguments, on all ranks, to save; DeepSpeed and nesting modules pass arguments and
        # want the parameters as they are.
        if args or kwargs or not state.engine_bound:
            return nn.Module.state_dict(model, *args, **kwargs)
        return full_state_dict(model)

    model.save_pretrained = save  # type: ignore[assignment]
    model.state_dict = state_dict  # type: ignore[assignment]


def unbind_saving(model: nn.Module) -> None:
    """Give the model its class's own methods back."""
    for name in ("save_pretrained", "state_dict"):
        model.__dict__.pop(name, None)
