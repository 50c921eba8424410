"""Collectives that end in bounded time."""

from __future__ import annotations

import datetime
from collections.abc import Callable

import torch
import torch.distributed as dist

from fluid_hf.comm.faults import peer_error

__all__ = ["all_gather_in_time", "all_reduce_in_time"]


def all_reduce_in_time(
    tensor: torch.Tensor, group: dist.ProcessGroup | None, timeout_seconds: float, place: str
) -> None:
    """Sum a tensor in place over the ranks of a group; collective.

    Over gloo no rank waits longer than asked for. Over NCCL the current stream waits, and NCCL's watchdog ends the
    process after the group's own timeout.

    Args:
        tensor: summed in place.
        group: `None` is the default group.
        timeout_seconds: how long to wait for the other ranks.
        place: what it belongs to, for the error.

    Raises:
        PeerError: a rank did not take part in time; names it and the place.
    """
    _in_time(lambda: dist.all_reduce(tensor, group=group, async_op=True), group, timeout_seconds, place)


def all_gather_in_time(
    tensor: torch.Tensor, group: dist.ProcessGroup | None, timeout_seconds: float, place: str
) -> list[torch.Tensor]:
    """The tensors of all ranks, of equal shapes, in rank order; see `all_reduce_in_time`."""
    own = tensor.contiguous()
    values = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    _in_time(lambda: dist.all_gather(values, own, group=group, async_op=True), group, timeout_seconds, place)
    return values


def _in_time(
    start: Callable[[], dist.Work | None], group: dist.ProcessGroup | None, timeout_seconds: float, place: str
) -> None:
    group = dist.group.WORLD if group is None else group
    try:
        work = start()
        assert work is not None
        if dist.get_backend(group) == "gloo":
            work.wait(datetime.timedelta(seconds=timeout_seconds))
        else:
            work.wait()
    except RuntimeError as error:
        ranks = dist.get_process_group_ranks(group)
        others = [rank for rank in ranks if rank != dist.get_rank()]
        raise peer_error(ranks, others, place, timeout_seconds, error) from error
