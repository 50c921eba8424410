"""The experts' arithmetic on one piece of rows: forward, input and weight gradients. No communication, no autograd.

Legend: R rows, K experts per token, S pairs, H hidden, I intermediate, E experts held here. A piece is a set of rows
that is computed at once: the rank's own tokens, or the rows of one wave.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fluid_hf.kernels import use_kernels
from fluid_hf.moe.activation import Activation, glu_backward, glu_forward, is_silu
from fluid_hf.moe.grouped_gemm import grouped_dgrad, grouped_linear, grouped_wgrad
from fluid_hf.moe.permutation import PairPlan, expand_rows, reduce_pairs

if TYPE_CHECKING:  # needs Triton
    from fluid_hf.moe.gemm_kernels import RowSource

__all__ = ["ExpertWeights", "Piece", "PieceGradients", "Projected", "finish_piece", "project_piece", "reads_by_index"]


@dataclass(frozen=True)
class ExpertWeights:
    """Weights of the experts held here, without autograd.

    Attributes:
        first: gate and up projections: `[gate_up [E, 2I, H]]`, or `[gate [E, I, H], up [E, I, H]]`.
        down: down projection [E, H, I].
    """

    first: tuple[torch.Tensor, ...]
    down: torch.Tensor

    def to(self, dtype: torch.dtype) -> ExpertWeights:
        """The same weights in another type (a copy, unless they have it already)."""
        if self.down.dtype == dtype:
            return self
        return ExpertWeights(tuple(weight.to(dtype) for weight in self.first), self.down.to(dtype))


@dataclass(frozen=True)
class Piece:
    """Rows [R, H] (any row stride), routing weights [R, K] and where their pairs go."""

    rows_RH: torch.Tensor
    weights_RK: torch.Tensor
    plan: PairPlan

    @property
    def pair_weights_S(self) -> torch.Tensor:
        """Routing weight of each pair."""
        return self.weights_RK.reshape(-1).index_select(0, self.plan.pair_slot_S)


@dataclass(frozen=True)
class Projected:
    """First projection of a piece's pairs.

    Attributes:
        kept: gate and up pre-activations in the layout of `ExpertWeights.first`: [S, 2I], or two of [S, I].
        hidden_SI: input of the down projection, where the same kernel made it; `kept` is then empty unless asked for.
    """

    kept: tuple[torch.Tensor, ...]
    hidden_SI: torch.Tensor | None = None

    def first_pairs(self, num_pairs: int) -> Projected:
        """Without the places that were kept for more pairs than there are."""
        hidden = self.hidden_SI[:num_pairs] if self.hidden_SI is not None else None
        return Projected(tuple(tensor[:num_pairs] for tensor in self.kept), hidden)


def reads_by_index(rows_RH: torch.Tensor, weights: ExpertWeights, act: Activation, top_k: int) -> tuple[bool, bool]:
    """Whether the first projection gathers its rows inside the GEMM, and whether it also computes the activation."""
    contiguous = weights.down.is_contiguous() and all(weight.is_contiguous() for weight in weights.first)
    if not (contiguous and is_silu(act) and use_kernels(rows_RH)):
        return False, False
    from fluid_hf.moe import gemm_kernels

    inner = weights.down.shape[2]
    fused = gemm_kernels.prefers_fused(inner)
    return fused or gemm_kernels.prefers_gathered(inner, top_k), fused


def project_piece(piece: Piece, weights: ExpertWeights, act: Activation, keep: bool = True) -> Projected:
    """Gate and up pre-activations; with `keep` they are there for backward."""
    plan, first = piece.plan, weights.first
    gathers, fused = reads_by_index(piece.rows_RH, weights, act, piece.weights_RK.shape[1])
    if not gathers:
        pairs_SH = expand_rows(piece.rows_RH, plan)
        return Projected(tuple(grouped_linear(pairs_SH, weight, plan.offsets_E) for weight in first))
    from fluid_hf.moe import gemm_kernels

    places = plan.pair_row_S, plan.pair_slot_S, plan.offsets_E
    if fused:
        return Projected(*gemm_kernels.gated_linear(piece.rows_RH, *places, first, piece.weights_RK, keep))
    kept = [gemm_kernels.gathered_linear(piece.rows_RH, plan.pair_row_S, plan.offsets_E, w, False) for w in first]
    return Projected(tuple(kept))


def finish_piece(
    piece: Piece, projected: Projected, weights: ExpertWeights, act: Activation, out_RH: torch.Tensor
) -> None:
    """From the first projection to each row's weighted sum of expert outputs, written to `out_RH`."""
    hidden_SI, projections = projected.hidden_SI, projected.kept
    if hidden_SI is None and use_kernels(projections[0]) and is_silu(act):
        from fluid_hf.moe import row_kernels

        hidden_SI = row_kernels.glu_forward(projections, piece.weights_RK, piece.plan.pair_slot_S)
    elif hidden_SI is None:
        gate_SI, up_SI = _split(projections)
        hidden_SI = glu_forward(gate_SI, up_SI, piece.pair_weights_S, act)
    output_SH = grouped_linear(hidden_SI, weights.down, piece.plan.offsets_E)
    reduce_pairs([output_SH], piece.plan, out_RH)


class PieceGradients:
    """Input gradients piece by piece, and weight gradients over all pieces at once.

    The weight gradients need all pairs sorted by expert, across pieces. With several pieces the activation kernel
    writes its results a second time at the joint place; rows are read by the joint order, or copied straight to it.

    Args:
        pieces: all pieces of the layer, in the order in which `backward` will be called.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        self._grads: list[torch.Tensor] = []
        self._first: list[tuple[torch.Tensor, ...]] = []
        self._hidden: list[torch.Tensor] = []
        self._inputs: torch.Tensor | None = None
        self._joint: JointOrder | None = None
        self._grad_pairs: torch.Tensor | None = None
        self._gathers_wgrad = False

    def backward(
        self,
        projections: tuple[torch.Tensor, ...],
        grad_RH: torch.Tensor,
        weights: ExpertWeights,
        act: Activation,
        out: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Input gradient of the next piece.

        Args:
            grad_RH: gradient of the rows' outputs, kept for the weight gradients.
            out: where the gradients of the rows [R, H] and of the routing weights [R, K] are written.
        """
        piece = self._pieces[len(self._grads)]
        grad_SI, pairs_SH = self._through_down(piece, grad_RH, weights, act)
        if use_kernels(grad_SI) and is_silu(act):
            first = self._activation_kernel(piece, grad_SI, projections, out[1])
        else:
            first = self._activation(piece, grad_SI, projections, act, out[1])
        del grad_SI
        self._grads.append(grad_RH)
        if len(self._pieces) == 1:  # as they are for the weight gradient too
            self._grad_pairs = pairs_SH
        del pairs_SH
        pairs = [grouped_dgrad(g, weight, piece.plan.offsets_E) for g, weight in zip(first, weights.first, strict=True)]
        reduce_pairs(pairs, piece.plan, out[0])

    def _through_down(
        self, piece: Piece, grad_RH: torch.Tensor, weights: ExpertWeights, act: Activation
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gradient of the down projection's input; and of its output, where that was copied to the pairs."""
        plan = piece.plan
        gathers, self._gathers_wgrad = reads_by_index(grad_RH, weights, act, piece.weights_RK.shape[1])
        if not gathers:
            pairs_SH = expand_rows(grad_RH, plan)
            return grouped_dgrad(pairs_SH, weights.down, plan.offsets_E), pairs_SH
        from fluid_hf.moe import gemm_kernels

        return gemm_kernels.gathered_linear(grad_RH, plan.pair_row_S, plan.offsets_E, weights.down, True), None

    def weight_gradient(self, index: int | None) -> torch.Tensor:
        """Gradient of `ExpertWeights.first[index]`, or of the down projection for `None`; once each.

        What only the down projection's gradient needs is released with it: the largest of these tensors would
        otherwise stand beside the gradient of the first projection.
        """
        if index is None:
            return self._down_gradient()
        joint = self._joint
        if self._gathers_wgrad:
            return self._gathered([piece.rows_RH for piece in self._pieces], self._first[0][index], False)
        if joint is None:
            offsets = [piece.plan.offsets_E for piece in self._pieces]
            inputs = [expand_rows(piece.rows_RH, piece.plan) for piece in self._pieces]
            return grouped_wgrad([first[index] for first in self._first], inputs, offsets)
        if self._inputs is None:  # shared by the gate and up projections
            self._inputs = joint.expand([piece.rows_RH for piece in self._pieces], self._pieces)
        return grouped_wgrad([self._first[0][index]], [self._inputs], [joint.offsets_E])

    def _down_gradient(self) -> torch.Tensor:
        grads, hidden, kept = self._grads, self._hidden, self._grad_pairs
        self._grads, self._hidden, self._grad_pairs = [], [], None
        if self._gathers_wgrad:
            return self._gathered(grads, hidden[0], True)
        if self._joint is not None:
            output = self._joint.expand(grads, self._pieces)
            return grouped_wgrad([output], hidden[:1], [self._joint.offsets_E])
        outputs = (
            [kept] if kept is not None else [expand_rows(g, p.plan) for g, p in zip(grads, self._pieces, strict=True)]
        )
        return grouped_wgrad(outputs, hidden, [piece.plan.offsets_E for piece in self._pieces])

    def _gathered(self, rows: list[torch.Tensor], other: torch.Tensor, rows_first: bool) -> torch.Tensor:
        """Weight gradient whose one operand are the pieces' rows, read by index."""
        from fluid_hf.moe import gemm_kernels

        plan = self._pieces[0].plan
        row_S, offsets_E = plan.pair_row_S, plan.offsets_E
        if self._joint is not None:
            row_S, offsets_E = self._joint.row_S, self._joint.offsets_E
        return gemm_kernels.gathered_wgrad(as_source(rows), row_S, other, offsets_E, rows_first)

    @property
    def held_bytes(self) -> int:
        """Bytes kept for the weight gradients."""
        tensors = [*self._grads, *self._hidden, *(t for first in self._first for t in first)]
        return sum(t.numel() * t.element_size() for t in (*tensors, *(piece.rows_RH for piece in self._pieces)))

    def _activation(
        self,
        piece: Piece,
        grad_SI: torch.Tensor,
        projections: tuple[torch.Tensor, ...],
        act: Activation,
        out_RK: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        gate_SI, up_SI = _split(projections)
        grad_gate, grad_up, hidden, grad_weight_S = glu_backward(grad_SI, gate_SI, up_SI, piece.pair_weights_S, act)
        first = (grad_gate, grad_up) if len(projections) == 2 else (torch.cat([grad_gate, grad_up], dim=-1),)
        flat = torch.zeros(out_RK.numel(), dtype=out_RK.dtype, device=out_RK.device)
        flat[piece.plan.pair_slot_S] = grad_weight_S.to(flat.dtype)
        out_RK.copy_(flat.view(out_RK.shape))
        self._first.append(first)
        self._hidden.append(hidden)
        return first

    def _activation_kernel(
        self, piece: Piece, grad_SI: torch.Tensor, projections: tuple[torch.Tensor, ...], out_RK: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        from fluid_hf.moe import row_kernels

        first = tuple(torch.empty_like(projection) for projection in projections)
        index = len(self._grads)
        if len(self._pieces) == 1:
            hidden, joint = torch.empty_like(grad_SI), None
            self._hidden.append(hidden)
            self._first.append(first)
        else:
            if self._joint is None:
                self._joint = JointOrder(self._pieces)
                pairs = self._joint.num_pairs
                self._hidden.append(grad_SI.new_empty(pairs, grad_SI.shape[1]))
                self._first.append(tuple(p.new_empty(pairs, p.shape[1]) for p in projections))
            hidden, joint = self._hidden[0], (self._first[0], *self._joint.places(index))
        slots = piece.plan.pair_slot_S
        row_kernels.glu_backward(grad_SI, projections, piece.weights_RK, slots, out_RK, first, hidden, joint)
        return first


class JointOrder:
    """Places of each piece's pairs when all pieces are sorted by expert together, ties by piece.

    Args:
        pieces: all pieces.

    Attributes:
        row_S: row of the pair at each joint place, counted through all pieces; filled by the activation kernel.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        from fluid_hf.moe import joint_kernels

        sizes = [piece.plan.num_pairs for piece in pieces]
        self.num_pairs = sum(sizes)
        place_S, self.offsets_E = joint_kernels.joint_places(
            torch.stack([piece.plan.offsets_E for piece in pieces]), self.num_pairs
        )
        self.place_S = place_S.split(sizes)
        self.row_S = torch.empty_like(place_S)
        self._rows_before = [0, *itertools.accumulate(piece.rows_RH.shape[0] for piece in pieces)]

    def places(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Joint places of a piece's pairs, where their rows are noted, and the number of its first row."""
        return self.place_S[index], self.row_S, self._rows_before[index]

    def expand(self, rows: Sequence[torch.Tensor], pieces: Sequence[Piece]) -> torch.Tensor:
        """Rows of every piece at the joint places of their pairs: [N, H]."""
        from fluid_hf.moe import row_kernels

        out = rows[0].new_empty(self.num_pairs, rows[0].shape[1])
        for piece_rows, piece, place_S in zip(rows, pieces, self.place_S, strict=True):
            row_kernels.expand(piece_rows, piece.plan.pair_row_S, out, place_S)
        return out


def as_source(pieces: Sequence[torch.Tensor]) -> RowSource:
    """The rows of all pieces as the kernels read them: own tokens first, then what lies together in one buffer."""
    first, *others = pieces
    arrived = [rows for rows in others if rows.shape[0]]
    ends = [rows.data_ptr() + rows.shape[0] * rows.stride(0) * rows.element_size() for rows in arrived]
    if any(rows.data_ptr() != end for rows, end in zip(arrived[1:], ends, strict=False)):
        arrived = [torch.cat(arrived)]  # a saved-tensor hook (offloading) has brought each back alone
    return first, arrived[0] if arrived else first, first.shape[0]


def _split(projections: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    if len(projections) == 2:
        return projections[0], projections[1]
    gate_SI, up_SI = projections[0].chunk(2, dim=-1)
    return gate_SI, up_SI
