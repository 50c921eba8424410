"""Sums over ranks that end in bounded time."""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist

from fluid_hf.comm.faults import peer_error

__all__ = ["all_reduce_in_time"]


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
    group = dist.group.WORLD if group is None else group
    try:
        work = dist.all_reduce(tensor, group=group, async_op=True)
        if dist.get_backend(group) == "gloo":
            work.wait(datetime.timedelta(seconds=timeout_seconds))
        else:
            work.wait()
    except RuntimeError as error:
        ranks = dist.get_process_group_ranks(group)
        others = [rank for rank in ranks if rank != dist.get_rank()]
        raise peer_error(ranks, others, place, timeout_seconds, error) from error
