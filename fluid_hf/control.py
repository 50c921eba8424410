"""Agreement between ranks in bounded time: a gloo group beside the data path, with a timeout of its own."""

from __future__ import annotations

import datetime
import socket
from typing import Any

import torch.distributed as dist

from fluid_hf.errors import CollectiveError, FluidError, RankMismatchError
from fluid_hf.process_groups import set_group_timeout

__all__ = ["ControlGroup"]


class ControlGroup:
    """Small host-side collectives over all ranks, for checks and checkpoints. Does nothing in a single process.

    Args:
        timeout_seconds: how long a rank waits for the others.
    """

    def __init__(self, timeout_seconds: float = 300.0) -> None:
        self._timeout = datetime.timedelta(seconds=timeout_seconds)
        several = dist.is_initialized() and dist.get_world_size() > 1
        # A mirror world (fluid_hf.bench.mirror) is one process that plays every rank.
        several = several and not getattr(dist.group.WORLD, "plays_all_ranks", False)
        self._group = dist.new_group(backend="gloo", timeout=self._timeout) if several else None

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group itself, for tensors on the CPU; `None` in a single process."""
        return self._group

    def wait_at_most(self, timeout_seconds: float) -> None:
        """How long a rank waits for the others from now on."""
        self._timeout = datetime.timedelta(seconds=timeout_seconds)
        set_group_timeout(self._group, timeout_seconds)

    def gather(self, value: Any, what: str) -> list[Any]:
        """Every rank's value, in rank order.

        Raises:
            CollectiveError: a rank did not make this call in time.
        """
        if self._group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size()
        try:
            dist.all_gather_object(values, value, group=self._group)
        except (RuntimeError, ValueError) as error:
            raise CollectiveError(
                f"{what} must be called on all {len(values)} ranks; waited at most "
                f"{self._timeout.total_seconds():.0f} s for the others. "
                f"Call it on every rank, not inside `if rank == 0`. ({error})"
            ) from error
        return values

    def hosts(self, what: str) -> list[str]:
        """The name of every rank's node, in rank order.

        Raises:
            CollectiveError: a rank did not make this call in time.
        """
        return self.gather(socket.gethostname(), what)

    def agree(self, error: Exception | None, fingerprint: Any, what: str) -> None:
        """Raise on every rank if any rank has an error, or if fingerprints differ between ranks.

        Raises:
            FluidError: this rank's own error.
            RankMismatchError: another rank's error, or differing fingerprints; names ranks and values.
        """
        own = None if error is None else f"{type(error).__name__}: {error}"
        reports = self.gather((own, fingerprint), what)
        if error is not None:
            raise error
        failed = {rank: text for rank, (text, _) in enumerate(reports) if text is not None}
        if failed:
            raise RankMismatchError(
                f"{what} failed on rank {', '.join(map(str, failed))}: {next(iter(failed.values()))}"
            )
        differing = {rank: value for rank, (_, value) in enumerate(reports) if value != reports[0][1]}
        if differing:
            rank, value = next(iter(differing.items()))
            raise RankMismatchError(
                f"{what} must be equal on all ranks: rank 0 has {reports[0][1]}, rank {rank} has {value}; "
                "pass the same settings everywhere."
            )

    def close(self) -> None:
        """Release the group."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None


def as_error(error: BaseException) -> Exception:
    """An error to report to the other ranks; anything unexpected is reported under its own name."""
    return error if isinstance(error, FluidError) else RuntimeError(f"{type(error).__name__}: {error}")
