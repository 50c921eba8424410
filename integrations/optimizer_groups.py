"""Optimizer groups as ZeRO 1 and 2 require them for split experts, and the learning rate schedules that follow them."""

from __future__ import annotations

import gc
from typing import Any

import torch
from deepspeed.moe.utils import is_moe_param
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

__all__ = ["fit_schedules", "split_expert_groups", "split_groups"]

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
    """Schedules built on an optimizer or what wraps it: it does not know them, nor does `deepspeed.initialize`."""
    kinds = (LRScheduler, ReduceLROnPlateau)
    schedules = [found for found in gc.get_objects() if issubclass(type(found), kinds)]
    return [schedule for schedule in schedules if _innermost(getattr(schedule, "optimizer", None)) is optimizer]


def _innermost(optimizer: Any) -> Any:
    """PyTorch's optimizer in ZeRO's, in accelerate's."""
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    return optimizer


def fit_schedules(optimizer: torch.optim.Optimizer) -> None:
    """Let the schedules built on an optimizer load, once, a state that was saved with another number of groups."""
    for schedule in _schedules_of(optimizer):
        kind = type(schedule)
        if isinstance(schedule, LRScheduler) and not issubclass(kind, _Fitting):
            # A class, not an attribute of the schedule: a schedule saves all of its attributes.
            schedule.__class__ = type(kind.__name__, (_Fitting, kind), {"__module__": kind.__module__})


class _Fitting:
    """A schedule before it loads a state; after that it has its own class again."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        schedule: Any = self
        schedule.__class__ = type(self).__mro__[2]
        schedule.load_state_dict({name: _fit(schedule, name, value) for name, value in state.items()})


def _fit(schedule: Any, name: str, saved: Any) -> Any:
    """What is saved for each group, for the groups that there are: one value for all, else what they have now."""
    groups = schedule.optimizer.param_groups
    if name not in PER_GROUP or not isinstance(saved, (list, tuple)) or len(saved) == len(groups):
        return saved
    if all(value == saved[0] for value in saved):
        return type(saved)(saved[:1]) * len(groups)
    if name == "lr_lambdas":  # functions stay as they are
        return [None] * len(groups)
    return [group["lr"] for group in groups] if name == "_last_lr" else vars(schedule)[name]
