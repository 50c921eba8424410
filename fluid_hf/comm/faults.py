"""Named errors for peers that do not take part in an exchange, and for input that no exchange can serve."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from fluid_hf.errors import PeerError, RankMismatchError, RoutingError

__all__ = ["GOOD", "MALFORMED", "input_status", "peer_error", "raise_flagged"]

GOOD, NOT_FINITE, OUT_OF_RANGE, MALFORMED = 0, 1, 2, 3  # the kernels know the first three
MEANING = {
    NOT_FINITE: "routing weights must be finite; they hold NaN or Inf",
    OUT_OF_RANGE: "expert ids must be in [0, num_experts); some are not",
}
GRACE = 2.0  # seconds in which the other survivors report, before the silent ranks are named


def input_status(weights_TK: torch.Tensor, index_TK: torch.Tensor, num_experts: int) -> int:
    """`GOOD`, or what is wrong with a router's output. Only for tensors on the CPU: it reads values.

    On a GPU the kernel that counts the rows finds the same (`fluid_hf.moe.sort_kernels`). Where nothing is exchanged it
    finds ids out of range (`fluid_hf.comm.late_status`); weights that are NaN or Inf make the output NaN or Inf."""
    if index_TK.numel() and (int(index_TK.min()) < 0 or int(index_TK.max()) >= num_experts):
        return OUT_OF_RANGE
    return GOOD if bool(torch.isfinite(weights_TK).all()) else NOT_FINITE


def raise_flagged(counts_2PC: Sequence[Sequence[Sequence[int]]], own: int, ranks: Sequence[int], layer: str) -> None:
    """Raise if this rank's or a peer's counts hold a status.

    Args:
        counts_2PC: sent and received counts, see `fluid_hf.moe.routing_plan.HitMap`.
        own: this rank within the group.
        ranks: global ranks of the group.
        layer: name of the layer.

    Raises:
        RoutingError, RankMismatchError: on every rank of the group in the same call.
    """
    bad = {peer: -counts[0] for peer, counts in enumerate(counts_2PC[1]) if peer != own and counts[0] < 0}
    if any(counts[0] < 0 for counts in counts_2PC[0]):
        bad[own] = max(-counts[0] for counts in counts_2PC[0])
    malformed = [str(ranks[peer]) for peer, status in sorted(bad.items()) if status == MALFORMED]
    if malformed:
        raise RankMismatchError(
            f"rank {', '.join(malformed)} called layer {layer} with arguments of a shape or type that it does not "
            "take; the ConfigError of that rank names the argument."
        )
    if bad:
        raise routing_error({ranks[peer]: status for peer, status in bad.items()}, layer)


def routing_error(bad: dict[int, int], layer: str, *, late: bool = False) -> RoutingError:
    """The error for ranks whose router gave something that cannot be used; with `late` in a call before."""
    first = min(bad)
    when = " It was in a call before this one, whose result has other experts in their place." if late else ""
    return RoutingError(
        f"router output of rank {', '.join(map(str, sorted(bad)))} in layer {layer}: {MEANING[bad[first]]}; look for "
        f"diverged weights, a too high learning rate or bad input on that rank.{when}"
    )


def peer_error(ranks: Sequence[int], suspects: Sequence[int], place: str, seconds: float, cause: object) -> PeerError:
    """The error for an exchange that did not end. Asks the store which ranks wait as this one does.

    Args:
        ranks: global ranks of the group.
        suspects: of them, those that this rank waited for.
        place: layer, step and round.
        seconds: how long a rank waits.
        cause: what the process group said.
    """
    silent = _silent_ranks(ranks, place)
    named = sorted(silent if silent is not None else suspects)
    return PeerError(
        f"rank {', '.join(map(str, named)) or '(unknown)'} did not take part in {place}: it raised, died, or went "
        f"another way; rank {dist.get_rank()} waited at most {seconds:.0f} s (timeout_seconds). Look at the output of "
        f"the rank that is named. ({str(cause).splitlines()[0] if str(cause) else type(cause).__name__})"
    )


def _silent_ranks(ranks: Sequence[int], place: str) -> list[int] | None:
    """Ranks that have not reported a fault themselves within the grace time; `None` if the store does not answer."""
    with contextlib.suppress(Exception):
        store = dist.distributed_c10d._get_default_store()
        prefix = "fluid_fault/" + "-".join(map(str, ranks))
        store.set(f"{prefix}/{dist.get_rank()}", place)
        deadline = time.monotonic() + GRACE
        silent = [rank for rank in ranks if rank != dist.get_rank()]
        while silent and time.monotonic() < deadline:
            silent = [rank for rank in silent if not store.check([f"{prefix}/{rank}"])]
            time.sleep(0.05)
        return silent or None
    return [0] if 0 in ranks and dist.get_rank() != 0 else None  # rank 0 (or its launcher) holds the store
