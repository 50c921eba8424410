"""The order of all pairs of several pieces, in which the weight gradients are computed (by the Triton kernels).

Legend: N pieces, R rows, S pairs of a piece, E experts held here, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fluid_hf.kernels import kernel_module
from fluid_hf.moe.permutation import stacked

if TYPE_CHECKING:  # need Triton
    from fluid_hf.moe.experts import Piece
    from fluid_hf.moe.linear_kernels import Places
    from fluid_hf.moe.row_kernels import JointPlaces

__all__ = ["JointOrder"]


class JointOrder:
    """Places of each piece's pairs when all pieces are sorted by expert together, ties by piece.

    Args:
        pieces: all pieces.
        first_output: output gradients [R, H] of the first piece, if rows are to be read by their addresses.

    Attributes:
        addresses: where the row and the output gradient of each joint place lie (`JointPlaces`), filled by the
            activation kernel; `None` without `first_output`.
        unit: elements in which they are counted.
    """

    def __init__(self, pieces: Sequence[Piece], first_output: torch.Tensor | None) -> None:
        joint_kernels = kernel_module("joint_kernels")
        sizes = [piece.plan.num_pairs for piece in pieces]
        self.num_pairs = sum(sizes)
        place_S, self.offsets_E, self._starts_NE = joint_kernels.joint_places(
            stacked([piece.plan.offsets_E for piece in pieces]), self.num_pairs
        )
        self._sizes = sizes
        self.place_S: tuple[torch.Tensor, ...] = torch.split_with_sizes(place_S, sizes)
        self.addresses: torch.Tensor | None = None
        self.unit = 1
        if first_output is not None:
            self.addresses = torch.empty(2, self.num_pairs, dtype=torch.int64, device=place_S.device)
            # The kernel that reads by these moves 16 bytes at once if it can tell that they are aligned. The other
            # pieces' output gradients lie in one buffer, rows side by side; a stride says nothing of that if the first
            # piece has one row, or none.
            tensors, each = (first_output, *[piece.rows_RH for piece in pieces]), first_output.element_size()
            steps = [each * first_output.shape[1], *[each * tensor.stride(0) for tensor in tensors]]
            if all([number % 16 == 0 for number in (*[tensor.data_ptr() for tensor in tensors], *steps)]):
                self.unit = 16 // each

    def places(
        self,
        index: int,
        grads: tuple[torch.Tensor, ...],
        rows: tuple[torch.Tensor, torch.Tensor],
        outputs: tuple[torch.Tensor, torch.Tensor],
    ) -> JointPlaces:
        """Joint places of a piece's pairs; `grads` receive what the projections' gradients are there."""
        places: JointPlaces = kernel_module("row_kernels").JointPlaces(
            grads, self.place_S[index], self.addresses, rows, outputs, self.unit
        )
        return places

    def rows_of(self, index: int) -> Places:
        """Where a piece's pairs lie in a tensor in the joint order: side by side for each expert."""
        places: Places = kernel_module("linear_kernels").Places(self._starts_NE[index], self._sizes[index])
        return places

    def expand(self, rows: Sequence[torch.Tensor], pieces: Sequence[Piece], which: int) -> torch.Tensor:
        """Rows of every piece at the joint places of their pairs: [N, H]; `which` are theirs of the `addresses`."""
        row_kernels = kernel_module("row_kernels")
        if self.addresses is not None:  # in one launch
            return row_kernels.expand(rows[0], self.addresses[which], unit=self.unit)  # type: ignore[no-any-return]
        out = rows[0].new_empty(self.num_pairs, rows[0].shape[1])
        for piece_rows, piece, place_S in zip(rows, pieces, self.place_S, strict=True):
            row_kernels.expand(piece_rows, piece.plan.pair_row_S, out, place_S)
        return out
