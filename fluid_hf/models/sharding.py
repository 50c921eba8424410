"""Refuses FSDP and DistributedDataParallel around experts that are split over ranks: the one would take each rank's
experts for a piece of the same, the other would give every rank those of the first and average their gradients. And
copies of a patched model.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from fluid_hf.errors import ConfigError, UnsupportedModelError

__all__ = ["RefuseDDP", "refuse_copy", "refuse_fsdp", "refuse_sharding", "refuse_unpatching"]

REMEDY = (
    "use DeepSpeed's ZeRO, transformers' expert parallelism (fluid_hf.integrations.transformers_ep), which runs under "
    "FSDP2, or ep_size 1."
)
REFUSED_DDP = (
    "ep_size must be 1 under DistributedDataParallel, which would average the gradients of different experts; use "
    "DeepSpeed, or a plain loop with model.fluid.reduce_gradients(model)."
)


def refuse_fsdp(ep_size: int | None) -> None:
    """Raise for a Trainer that shards its model with FSDP.

    Args:
        ep_size: as set; `None` would be chosen.

    Raises:
        ConfigError: it is not 1.
    """
    if ep_size != 1:
        asked = "left out, so that it is chosen" if ep_size is None else ep_size
        raise ConfigError(
            f"ep_size ({asked}) must be 1 with TrainingArguments(fsdp=...): FSDP takes different experts for pieces of "
            f"the same; {REMEDY}"
        )


def refuse_sharding(model: nn.Module, layers: Sequence[nn.Module]) -> RemovableHandle:
    """Look before every forward pass of a model whether FSDP or DistributedDataParallel has taken its experts.

    `fully_shard` and `FullyShardedDataParallel` tell nobody; but they replace parameters. What they are told to leave
    alone is the same as before and looked at no further. DistributedDataParallel around a module that holds the model
    asks that module alone what to ignore; but it tells whose forward pass is running.

    Args:
        model: the patched model.
        layers: its layers with experts that are split.

    Returns:
        What ends it.
    """
    known = [next(layer.parameters(), None) for layer in layers]
    harmless: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    @torch.compiler.disable
    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        now = [next(layer.parameters(), None) for layer in layers]
        around = DistributedDataParallel._get_active_ddp_module()
        if around is not None and around not in harmless:
            if _averages(around, now):
                raise ConfigError(REFUSED_DDP)
            harmless.add(around)
        if _sharded(model, now, known):
            raise ConfigError(
                "parameters of experts that are split over ranks (ep_size over 1) must not be sharded by FSDP, which "
                f"takes different experts for pieces of the same; {REMEDY}"
            )
        known[:] = now

    return model.register_forward_pre_hook(look)


def refuse_unpatching(model: nn.Module, layers: Sequence[tuple[nn.Module, torch.Tensor | None]]) -> None:
    """Raise before a model is unpatched whose experts FSDP has taken: it would go on with those of the layers alone.

    Args:
        model: the patched model.
        layers: its layers, each with its first parameter as of patching; `None` if that is gone.

    Raises:
        ConfigError: FSDP has replaced parameters of the experts.
    """
    now = [next(layer.parameters(), None) for layer, _ in layers]
    if any(first is None for first in now) or _sharded(model, now, [before for _, before in layers]):
        raise ConfigError(
            "parameters of experts must not be sharded by FSDP in unpatch_model, which cannot put them where FSDP "
            "looks for them; write the model with fluid_hf.save_pretrained, and load the checkpoint."
        )


def _sharded(model: nn.Module, now: Sequence[torch.Tensor | None], before: Sequence[torch.Tensor | None]) -> bool:
    """Whether FSDP has taken parameters since they were those of `before`."""
    # FullyShardedDataParallel(use_orig_params=True) keeps the parameters, and marks them.
    flattened = any(getattr(first, "_fsdp_flattened", False) for first in now)
    if not flattened and all(map(operator.is_, now, before)):
        return False
    return flattened or any(first is None for first in now) or any(map(_shards, model.modules()))


def _shards(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule | FullyShardedDataParallel)


def _averages(around: DistributedDataParallel, parameters: Sequence[torch.Tensor | None]) -> bool:
    """Whether it takes one of the parameters; a model that is called in there may be no part of it."""
    named = around.module.named_parameters()
    taken = {id(parameter) for name, parameter in named if name not in around.parameters_to_ignore}
    return any(id(parameter) in taken for parameter in parameters)


class RefuseDDP:
    """Stands where DistributedDataParallel reads what to ignore: it would average different experts with each other."""

    def __iter__(self) -> Iterator[str]:
        raise ConfigError(REFUSED_DDP)


def refuse_copy(*args: Any) -> Any:
    """Stands where `copy.deepcopy`, `pickle` and `torch.save` ask a model how to copy it."""
    raise UnsupportedModelError(
        "a patched model cannot be copied or pickled: its experts, process groups and saving belong to this one; "
        "copy it before patch_model and patch the copy too, or write it with fluid_hf.save_pretrained."
    )
