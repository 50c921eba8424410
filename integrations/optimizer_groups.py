"""Optimizer groups as ZeRO 1 and 2 require them for split experts, and the learning rate schedules that follow them."""

from __future__ import annotations

import gc
from typing import Any

import torch
from deepspeed.moe.utils import is_moe_param
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

__all__ = ["split_expert_groups", "split_groups"]

# What PyTorch's schedules hold per group of their optimizer.
PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "max_lrs", "min_lrs", "base_momentums", "max_momentums")


def split_expert_groups(param_groups: list[dict[str, Any]]) -> list[int]:
    """Split each optimizer group in place into dense and expert parameters, as ZeRO 1 and 2 require; idempotent.

    Returns:
        For each group, the place that it, or what it was split from, had before.
    """
    split: list[dict[str, Any]] = []
    places: list[int] = []
    for place, group in enumerate(param_groups):
        expert = [parameter for parameter in group["params"] if is_moe_param(parameter)]
        if not expert or group.get("moe"):
            parts = [group]
        else:
            dense = [parameter for parameter in group["params"] if not is_moe_param(parameter)]
            parts = [{**group, "params": dense}] if dense else []
            parts.append({**group, "params": expert, "moe": True, "name": expert[0].group_name})
        split += parts
        places += [place] * len(parts)
    param_groups[:] = split
    return places


def split_groups(optimizer: torch.optim.Optimizer) -> None:
    """Split the optimizer's groups, and what schedules that were built on it before hold per group."""
    before = len(optimizer.param_groups)
    places = split_expert_groups(optimizer.param_groups)
    if len(places) == before:
        return
    for schedule in _schedules_of(optimizer):
        for name in PER_GROUP:
            held = vars(schedule).get(name)
            if isinstance(held, (list, tuple)) and len(held) == before:
                setattr(schedule, name, type(held)(held[place] for place in places))


def _schedules_of(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Schedules built on an optimizer: it does not know them, and nobody passes them to `deepspeed.initialize`."""
    kinds = (LRScheduler, ReduceLROnPlateau)
    schedules = [found for found in gc.get_objects() if issubclass(type(found), kinds)]
    return [schedule for schedule in schedules if getattr(schedule, "optimizer", None) is optimizer]
