"""Collectives that end in bounded time."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable

import torch
import torch.distributed as dist

from fluid_hf.comm.faults import peer_error
from fluid_hf.errors import PeerError
from fluid_hf.process_groups import backend_of, check_alive

__all__ = ["all_gather_in_time", "all_reduce_in_time", "in_time", "meet_first", "meet_in_time", "spread_overflow"]


def all_reduce_in_time(
    tensor: torch.Tensor,
    group: dist.ProcessGroup | None,
    timeout_seconds: float,
    place: str,
    met: set[str],
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
) -> None:
    """Sum a tensor in place over the ranks of a group, or what else `op` says; collective.

    Over gloo no rank waits longer than asked for. Over NCCL the current stream waits, and NCCL's watchdog ends the
    process after the group's own timeout.

    Args:
        tensor: reduced in place.
        group: `None` is the default group.
        timeout_seconds: how long to wait for the other ranks.
        place: what it belongs to, for the error.
        met: of `meet_first`.
        op: how the ranks' values are joined.

    Raises:
        PeerError: a rank did not take part in time; names it and the place.
    """
    start = functools.partial(dist.all_reduce, tensor, op, group=group, async_op=True)
    in_time(start, tensor.device, group, timeout_seconds, place, met)


def all_gather_in_time(
    tensor: torch.Tensor, group: dist.ProcessGroup | None, timeout_seconds: float, place: str, met: set[str]
) -> list[torch.Tensor]:
    """The tensors of all ranks, of equal shapes, in rank order; see `all_reduce_in_time`."""
    own = tensor.contiguous()
    values = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    start = functools.partial(dist.all_gather, values, own, group=group, async_op=True)
    in_time(start, own.device, group, timeout_seconds, place, met)
    return values


@torch.no_grad()
def spread_overflow(gradients: list[torch.Tensor], timeout_seconds: float, met: set[str]) -> None:
    """Put NaN into the experts' gradients of every rank for which some rank's is not finite, without a host read.

    Dense gradients are equal on all ranks, but a rank that alone has an overflow in its experts would skip a step
    that the others make. Collective over all ranks.

    Args:
        gradients: the experts', equally many on every rank, and at least one.
        timeout_seconds, met: as for `all_reduce_in_time`.
    """
    largest = torch.stack(torch._foreach_norm(gradients, float("inf")))  # the sum of squares may overflow
    flags = largest.isfinite().logical_not().float()
    place = "the check of the experts' gradients"
    all_reduce_in_time(flags, None, timeout_seconds, place, met, dist.ReduceOp.MAX)
    poison = torch.zeros_like(flags).masked_fill_(flags > 0, float("nan"))
    for gradient, value in zip(gradients, poison, strict=True):
        gradient[(0,) * gradient.dim()].add_(value)


def meet_first(group: dist.ProcessGroup, timeout_seconds: float, place: str, met: set[str]) -> None:
    """`meet_in_time`, once for each group: before its first exchange.

    Args:
        met: names of the groups whose ranks have met; its owner keeps it for as long as the groups live.
    """
    if group.group_name not in met:
        meet_in_time(group, timeout_seconds, place)
        met.add(group.group_name)


def meet_in_time(group: dist.ProcessGroup, timeout_seconds: float, place: str) -> None:
    """Wait on the host until all ranks of a group are here; collective.

    For NCCL, which connects ranks inside a first call: the host stays in there for as long as one of them is missing,
    and no watchdog ends it. The ranks meet at the store, which needs no connections between them.

    Raises:
        PeerError: as `all_reduce_in_time`.
    """
    ranks = dist.get_process_group_ranks(group)
    key = "/".join(["fluid_meeting", group.group_name, *map(str, ranks)])
    try:
        store = dist.distributed_c10d._get_default_store()
        number = store.add(key, 1)  # counts on from meeting to meeting
        meeting = (number - 1) // len(ranks)
        if number % len(ranks) == 0:
            store.set(f"{key}/{meeting}", "all are here")
        store.wait([f"{key}/{meeting}"], datetime.timedelta(seconds=timeout_seconds))
    except RuntimeError as error:
        raise _error(group, timeout_seconds, place, error) from error


def in_time(
    start: Callable[[], dist.Work | None],
    device: torch.device,
    group: dist.ProcessGroup | None,
    timeout_seconds: float,
    place: str,
    met: set[str],
) -> None:
    """Start a collective of tensors on `device` without waiting, and wait for it; see `all_reduce_in_time`.

    Raises:
        CollectiveError: the group was destroyed.
    """
    group = dist.group.WORLD if group is None else group
    check_alive(group, place)
    assert group is not None
    backend = backend_of(group, device.type)
    if backend == "nccl":
        meet_first(group, timeout_seconds, place, met)
    try:
        work = start()
        assert work is not None
        if backend == "gloo":
            work.wait(datetime.timedelta(seconds=timeout_seconds))
        else:
            work.wait()
    except RuntimeError as error:
        raise _error(group, timeout_seconds, place, error) from error


def _error(group: dist.ProcessGroup, timeout_seconds: float, place: str, cause: object) -> PeerError:
    ranks = dist.get_process_group_ranks(group)
    others = [rank for rank in ranks if rank != dist.get_rank()]
    return peer_error(ranks, others, place, timeout_seconds, cause)
