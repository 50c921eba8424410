"""Agreement between ranks in bounded time: a gloo group beside the data path, with a timeout of its own."""

from __future__ import annotations

import datetime
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from fluid_hf.comm.call_form import describe_ranks
from fluid_hf.errors import CollectiveError, FluidError, RankMismatchError
from fluid_hf.process_groups import ParallelGroups, check_alive, is_alive, release_exchange_groups, set_group_timeout

__all__ = ["ControlGroup", "HeldGroups"]

ABSENT = "not there"


class ControlGroup:
    """Small host-side collectives over all ranks, for checks and checkpoints. Does nothing in a single process.

    Args:
        timeout_seconds: how long a rank waits for the others.
        what: the call that makes it.

    Raises:
        CollectiveError: a rank did not make this call in time.
    """

    def __init__(self, timeout_seconds: float = 300.0, what: str = "a call with a control group") -> None:
        self._timeout = datetime.timedelta(seconds=timeout_seconds)
        several = dist.is_initialized() and dist.get_world_size() > 1
        # A mirror world (fluid_hf.bench.mirror) is one process that plays every rank.
        several = several and not getattr(dist.group.WORLD, "plays_all_ranks", False)
        self._group: dist.ProcessGroup | None = None
        try:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout) if several else None
        except RuntimeError as error:  # gloo connects the ranks at once
            raise self._missing(what, dist.get_world_size(), error) from error

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
            CollectiveError: a rank did not make this call in time, or the group was destroyed.
        """
        if self._group is None:
            return [value]
        check_alive(self._group, what)
        values: list[Any] = [None] * dist.get_world_size()
        try:
            dist.all_gather_object(values, value, group=self._group)
        except (RuntimeError, ValueError) as error:
            raise self._missing(what, len(values), error) from error
        return values

    def _missing(self, what: str, ranks: int, error: Exception) -> CollectiveError:
        return CollectiveError(
            f"{what} must be called on all {ranks} ranks; waited at most {self._timeout.total_seconds():.0f} s for the "
            f"others. Call it on every rank, not inside `if rank == 0`. ({error})"
        )

    def hosts(self, what: str) -> list[str]:
        """The name of every rank's node, in rank order.

        Raises:
            CollectiveError: a rank did not make this call in time.
        """
        return self.gather(socket.gethostname(), what)

    def agree(self, error: Exception | None, fingerprint: Mapping[str, Any] | None, what: str) -> None:
        """Raise on every rank if any rank has an error, or if fingerprints differ between ranks.

        Args:
            error: this rank's own.
            fingerprint: what must be equal on all ranks, by name.
            what: the call that all ranks make.

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
        check_equal([fingerprint or {} for _, fingerprint in reports], what)

    def close(self) -> None:
        """Release the group."""
        if is_alive(self._group):
            dist.destroy_process_group(self._group)
        self._group = None


class HeldGroups:
    """What a patched model holds of the process group, apart from the model: a rank may have let go of that already.

    Args:
        control: its control group.
        groups: its groups.
    """

    def __init__(self, control: ControlGroup, groups: ParallelGroups) -> None:
        self._held: tuple[ControlGroup, ParallelGroups] | None = (control, groups)

    def release(self) -> None:
        """Give all of it back, the first time. Collective over all ranks."""
        held, self._held = self._held, None
        if held is not None:
            control, groups = held
            control.close()
            release_exchange_groups(groups)


def check_equal(fingerprints: Sequence[Mapping[str, Any]], what: str) -> None:
    """Raise `RankMismatchError` unless those of all ranks are equal; it tells what differs, not all that they hold."""
    names = dict.fromkeys(name for found in fingerprints for name in found)
    rows = {name: {rank: found.get(name, ABSENT) for rank, found in enumerate(fingerprints)} for name in names}
    differing = [name for name, row in rows.items() if any(value != row[0] for value in row.values())]
    if not differing:
        return
    first, *others = differing
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    so_must = f", and so must {', '.join(others[:3])}{more}" if others else ""
    raise RankMismatchError(
        f"{first} ({describe_ranks(rows[first])}) must be equal on all ranks that call {what}{so_must}; "
        "pass the same settings and model everywhere."
    )


def as_error(error: BaseException) -> Exception:
    """An error to report to the other ranks; anything unexpected is reported under its own name."""
    return error if isinstance(error, FluidError) else RuntimeError(f"{type(error).__name__}: {error}")
