"""The rank's own tokens, which no wire carries: what is computed of them fills the times of waiting.

Legend: T tokens here, H hidden, K experts per token, P ranks, S pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fluid_hf.moe.expert_math import ExpertMath
from fluid_hf.moe.experts import Piece, Projected
from fluid_hf.moe.permutation import PairPlan

__all__ = ["OwnTokens"]


class OwnTokens:
    """First projection of the own tokens: queued before the host knows how many pairs there are, if the math can.

    Args:
        math: what the experts compute.
        keep: backward will follow.
    """

    def __init__(self, math: ExpertMath, keep: bool) -> None:
        self._math, self._keep = math, keep
        self.plan: PairPlan | None = None  # from the kernels: with places for T * K pairs
        self.ready = False  # all of it is queued
        self._started: tuple[Piece, Projected] | None = None

    def start_early(self, hidden_TH: torch.Tensor, weights_TK: torch.Tensor, weights: Any, share: float) -> bool:
        """Queue the projection for an eighth more than a share of all pairs, before the counts are read.

        Returns whether it was done; `start` is to be called all the same, whenever it costs least.
        """
        if self.plan is None or not self._math.starts_early(hidden_TH, weights, weights_TK.shape[1]):
            return False
        pairs = weights_TK.numel()
        places = min(pairs, int(pairs * share * 9 / 8) + 256)
        piece = Piece(hidden_TH, weights_TK.contiguous(), self.plan.first_pairs(places))
        self._started = piece, self._math.project(piece, weights, self._keep, early=True)
        return True

    def start(
        self,
        hidden_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        weights: Any,
        make_plan: Callable[[], PairPlan],
        num_pairs: int,
    ) -> None:
        """Queue the projection of all pairs, unless it was and had places for them."""
        self.ready = True
        if self._started is not None and self._started[0].plan.num_pairs >= num_pairs:
            piece, projected = self._started
            piece = Piece(piece.rows_RH, piece.weights_RK, piece.plan.first_pairs(num_pairs))
            self._started = piece, projected.first_pairs(num_pairs)
            return
        plan = self.plan if self.plan is not None else make_plan()
        piece = Piece(hidden_TH, weights_TK.contiguous(), plan.first_pairs(num_pairs))
        self._started = piece, self._math.project(piece, weights, self._keep)

    def take(self) -> tuple[Piece, Projected] | None:
        """What was started, once."""
        started, self._started, self.plan = self._started, None, None
        return started
