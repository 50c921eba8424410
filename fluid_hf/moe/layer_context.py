"""What stays the same between calls of one expert-parallel layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fluid_hf.comm.head_start import HeadStart
from fluid_hf.comm.late_status import LateStatus
from fluid_hf.comm.peer_exchange import PeerExchange
from fluid_hf.moe.activation import Activation
from fluid_hf.moe.expert_math import ExpertMath
from fluid_hf.moe.statistics import LayerStats
from fluid_hf.overlap.deferred_linear import WindowWeights
from fluid_hf.overlap.wgrad import WgradScheduler
from fluid_hf.ranges import mark

__all__ = ["LayerContext"]


@dataclass
class LayerContext:
    """What stays the same between calls of one layer.

    Attributes:
        exchange: exchange of the expert-parallel group (size 1: no communication).
        num_experts: experts of the whole layer.
        act: activation of the gate.
        scheduler: weight gradient scheduler.
        overlap: exchange in waves; `False` for one all-to-all each way.
        waves: waves of the exchange, equal on all ranks.
        recompute: compute the projections again in backward instead of keeping them.
        stats: counts since they were last read.
        math: what the experts compute; by default `act(gate) * up` between two projections.
        record: called with the name of each event, for tests and timelines; `None` for nothing.
        name: of the layer, in the ranges of a profile and in errors.
        windows: weights of other layers whose gradients are computed in this layer's windows.
        head_start: rows promised for the next call.
        late_status: what kernels found where nothing is exchanged.
        own_share: of this rank's pairs, those that it computed itself in the last call: about as many as in the next.
    """

    exchange: PeerExchange
    num_experts: int
    act: Activation
    scheduler: WgradScheduler
    overlap: bool = True
    waves: int = 1
    recompute: bool = False
    stats: LayerStats = field(default_factory=LayerStats)
    math: ExpertMath | None = None
    record: Callable[[str], None] | None = None
    name: str = "layer"
    windows: WindowWeights | None = None
    head_start: HeadStart = field(default_factory=HeadStart)
    late_status: LateStatus = field(default_factory=LateStatus)
    own_share: float = 0.0

    @property
    def num_local_experts(self) -> int:
        """Experts held by this rank."""
        return self.num_experts // self.exchange.size

    def event(self, name: str) -> None:
        """Record an event, if anybody listens."""
        if self.record is not None:
            self.record(name)
        if torch.autograd._profiler_enabled():
            mark(name)
