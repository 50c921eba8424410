"""Refuses FSDP around experts that are split over ranks: it would take each rank's experts for a piece of the same."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.utils.hooks import RemovableHandle

from fluid_hf.errors import ConfigError

__all__ = ["refuse_fsdp", "refuse_sharding"]

REMEDY = (
    "use DeepSpeed's ZeRO, transformers' expert parallelism (fluid_hf.integrations.transformers_ep), which runs under "
    "FSDP2, or ep_size 1."
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
    """Look before every forward pass of a model whether FSDP has taken its experts.

    `fully_shard` and `FullyShardedDataParallel` tell nobody; but they replace parameters. What they are told to leave
    alone is the same as before and looked at no further.

    Args:
        model: the patched model.
        layers: its layers with experts that are split.

    Returns:
        What ends it.
    """
    known = [next(layer.parameters(), None) for layer in layers]

    @torch.compiler.disable
    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        now = [next(layer.parameters(), None) for layer in layers]
        # FullyShardedDataParallel(use_orig_params=True) keeps the parameters, and marks them.
        flattened = any(getattr(first, "_fsdp_flattened", False) for first in now)
        if not flattened and all(map(operator.is_, now, known)):
            return
        if flattened or any(first is None for first in now) or any(map(_shards, model.modules())):
            raise ConfigError(
                "parameters of experts that are split over ranks (ep_size over 1) must not be sharded by FSDP, which "
                f"takes different experts for pieces of the same; {REMEDY}"
            )
        known[:] = now

    return model.register_forward_pre_hook(look)


def _shards(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule | FullyShardedDataParallel)
