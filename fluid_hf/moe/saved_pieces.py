"""What backward needs of a call's pieces, as tensors for `save_for_backward`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fluid_hf.moe.experts import Piece
from fluid_hf.moe.permutation import PairPlan

__all__ = ["pack_pieces", "unpack_pieces"]


def pack_pieces(pieces: Sequence[Piece], projections: Sequence[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
    """Flatten what backward needs into tensors for `save_for_backward`."""
    flat: list[torch.Tensor] = []
    for index, (rows_RH, weights_RK, plan) in enumerate(pieces):
        flat += (rows_RH, weights_RK, *plan)
        flat += projections[index] if projections else ()
    return flat


def unpack_pieces(
    flat: Sequence[torch.Tensor], num_projections: int
) -> tuple[list[Piece], list[tuple[torch.Tensor, ...]]]:
    """Inverse of `pack_pieces`; `num_projections` tensors per piece (0 when they were not kept)."""
    pieces, projections = [], []
    step = 6 + num_projections
    for start in range(0, len(flat), step):
        rows, weights, *plan = flat[start : start + 6]
        pieces.append(Piece(rows, weights, PairPlan(*plan)))
        if num_projections:
            projections.append(tuple(flat[start + 6 : start + step]))
    return pieces, projections
