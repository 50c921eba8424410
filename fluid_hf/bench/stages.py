"""What a long benchmark is doing: a line per stage, at once, so that a run that is cut or hangs shows where it was."""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from fluid_hf.bench.links import is_first

__all__ = ["Stages"]


class Stages:
    """Prints on rank 0; every rank writes all its stacks to stderr when a stage takes long.

    Args:
        device: where the ranks agree on whether time is left.
        budget: seconds from now after which `time_left` says no; `None` for no limit.
        stack_after: seconds of one stage after which stacks are written, again and again; 0 for never.
    """

    def __init__(self, device: torch.device, budget: float | None = None, stack_after: float = 60.0) -> None:
        self._device, self._budget, self._stack_after = device, budget, stack_after
        self._start = time.monotonic()
        self.is_first = is_first()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[list[str]]:
        """Print the name now, and what is put into the list, with the seconds taken, at the end."""
        begin, found = self.seconds, list[str]()
        self.say(f"  {begin:7.1f} s  {name} ...", end="")
        # stderr as the process got it: sys.stderr may have been replaced by something without a descriptor.
        if self._stack_after and sys.__stderr__ is not None:
            faulthandler.dump_traceback_later(self._stack_after, repeat=True, file=sys.__stderr__)
        try:
            yield found
        except BaseException as error:
            found.append(type(error).__name__)
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
            self.say("  ".join(["", *found, f"[{self.seconds - begin:.1f} s]"]))

    def say(self, text: str, end: str = "\n") -> None:
        """Print on rank 0, at once."""
        if self.is_first:
            print(text, end=end, flush=True)

    def time_left(self) -> bool:
        """Whether rank 0's budget is not yet spent; equal on all ranks. Collective if there is a budget."""
        if self._budget is None:
            return True
        spent = torch.tensor([float(self.seconds > self._budget)], device=self._device)
        if dist.is_initialized():
            dist.broadcast(spent, 0)
        return not bool(spent.item())
