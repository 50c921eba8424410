"""Keeps `torch.distributed.checkpoint` from taking each rank's experts for copies of the same tensor.

It knows tensors by their names. A rank's experts have the names, and the shapes, that other ranks' have, so it would
write those of one rank and give them to all, without a word. Before it writes a tensor it asks that how to, if it says
so; those of a layer's state dict say that they cannot be written.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from fluid_hf.errors import CheckpointError

if TYPE_CHECKING:
    from fluid_hf.moe.layer import ExpertParallelLayer

__all__ = ["mark_shares"]


def mark_shares(layer: ExpertParallelLayer, state_dict: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    """After `state_dict` of a layer whose experts are split: mark those that are here."""
    split = {id(parameter) for parameter in layer.split_parameters()}
    names = [prefix + name for name, parameter in layer.named_parameters() if id(parameter) in split]
    for tensor in (state_dict.get(name) for name in names):
        if type(tensor) is torch.Tensor:  # no parameter (`keep_vars`), which would stay marked; no DTensor
            vars(tensor).update(__create_write_items__=_refuse_to_write, __getstate__=_without_marks)


def _refuse_to_write(name: str, tensor: torch.Tensor) -> NoReturn:
    raise CheckpointError(
        f"tensor ({name}) cannot be written by torch.distributed.checkpoint: every rank has experts of its own under "
        "this name, of which it keeps one rank's; write the model with fluid_hf.save_pretrained, or let every rank "
        "write its state dict to a file of its own with torch.save."
    )


def _without_marks() -> dict[str, Any]:
    """What `pickle` and `torch.save` keep of a marked tensor besides its data: nothing, as of any other."""
    return {}
