"""Triton kernel for the joint order of several pieces, in which the weight gradients are computed.

Legend: N pieces, S pairs of all pieces, E experts held here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fluid_hf.launch import Kernel

__all__ = ["joint_places"]


def joint_places(offsets_NE: torch.Tensor, num_pairs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Places of the pairs of N pieces when all are sorted by expert together, ties by piece.

    Args:
        offsets_NE: contiguous int32, end of each expert's pairs in each piece.
        num_pairs: pairs of all pieces.

    Returns:
        The place of every pair, piece after piece [S], the joint end of each expert's pairs [E], and the place of each
        expert's first pair of each piece [N, E]; int32.
    """
    pieces, experts = offsets_NE.shape
    place = torch.empty(num_pairs, dtype=torch.int32, device=offsets_NE.device)
    ends = torch.empty(experts, dtype=torch.int32, device=offsets_NE.device)
    starts = torch.empty_like(offsets_NE)
    _joint_places((experts, pieces, 1), (offsets_NE, place, ends, starts), (), (pieces, experts, 1024))
    return place, ends, starts


@triton.jit
def _joint_places_kernel(
    offsets, place, ends, starts, PIECES: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    expert, piece = tl.program_id(0), tl.program_id(1)
    joint_end = tl.zeros((), tl.int32)
    shift = tl.zeros((), tl.int32)  # from a pair's place in its piece to its joint place
    base = tl.zeros((), tl.int32)
    first = tl.zeros((), tl.int32)
    for other in tl.static_range(PIECES):
        at = offsets + other * EXPERTS + expert
        end = tl.load(at)
        start = tl.load(at - 1, mask=expert > 0, other=0)
        joint_end += end
        shift += tl.where(other < piece, end, start)
        base += tl.where(other < piece, tl.load(offsets + other * EXPERTS + EXPERTS - 1), 0)
        first += tl.where(other == piece, start, 0)
    tl.store(starts + piece * EXPERTS + expert, shift)
    shift -= first
    tl.store(ends + expert, joint_end, mask=piece == 0)
    last = tl.load(offsets + piece * EXPERTS + expert)
    for start in range(first, last, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        tl.store(place + base + pair, pair + shift, mask=pair < last)


_joint_places = Kernel(_joint_places_kernel)
