"""What one sequence-parallel attention layer keeps between calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fluid_hf.attention.fused_projection import HeadPlan
from fluid_hf.attention.heads import HeadLayout
from fluid_hf.comm.peer_exchange import PeerExchange
from fluid_hf.overlap.wgrad import WgradScheduler
from fluid_hf.ranges import mark

__all__ = ["AttentionContext"]


@dataclass
class AttentionContext:
    """What stays the same between calls of one layer.

    Attributes:
        exchange: exchange of the sequence-parallel group, of size 2 or more.
        layout: heads over ranks.
        head_dim: D.
        scheduler: weight gradient scheduler.
        record: called with the name of each event, for tests and timelines; `None` for nothing.
        name: of the layer, in the ranges of a profile.
        plans: plans made so far, by the number of chunks.
    """

    exchange: PeerExchange
    layout: HeadLayout
    head_dim: int
    scheduler: WgradScheduler
    record: Callable[[str], None] | None = None
    name: str = "attention"
    plans: dict[int, HeadPlan] = field(default_factory=dict)

    def event(self, name: str) -> None:
        """Record an event, if anybody listens."""
        if self.record is not None:
            self.record(name)
        if torch.autograd._profiler_enabled():
            mark(name)

    def plan(self, chunks: int) -> HeadPlan:
        """How the heads are cut into at most so many chunks."""
        plan = self.plans.get(chunks)
        if plan is None:
            plan = self.plans[chunks] = HeadPlan(self.layout, self.head_dim, chunks)
        return plan
