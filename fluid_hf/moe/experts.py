"""The experts' arithmetic on one piece of rows: forward, input and weight gradients. No communication, no autograd.

Legend: R rows, K experts per token, S pairs, H hidden, I intermediate, E experts held here. A piece is a set of rows
that is computed at once: the rank's own tokens, or the rows of one wave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fluid_hf.moe.activation import Activation, glu_backward, glu_forward, is_silu
from fluid_hf.moe.grouped_gemm import grouped_dgrad, grouped_linear, grouped_wgrad
from fluid_hf.moe.kernels import use_kernels
from fluid_hf.moe.permutation import PairPlan, expand_rows, reduce_pairs

__all__ = ["ExpertWeights", "Piece", "PieceGradients", "finish_piece", "project_piece"]


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


def project_piece(piece: Piece, weights: ExpertWeights) -> tuple[torch.Tensor, ...]:
    """Gate and up pre-activations, in the layout of `weights.first`: [S, 2I], or two of [S, I]."""
    pairs_SH = expand_rows(piece.rows_RH, piece.plan)
    return tuple(grouped_linear(pairs_SH, weight, piece.plan.offsets_E) for weight in weights.first)


def finish_piece(
    piece: Piece, projections: tuple[torch.Tensor, ...], weights: ExpertWeights, act: Activation, out_RH: torch.Tensor
) -> None:
    """From the pre-activations to each row's weighted sum of expert outputs, written to `out_RH`."""
    if use_kernels(projections[0]) and is_silu(act):
        from fluid_hf.moe import row_kernels

        hidden_SI = row_kernels.glu_forward(projections, piece.weights_RK, piece.plan.pair_slot_S)
    else:
        gate_SI, up_SI = _split(projections)
        hidden_SI = glu_forward(gate_SI, up_SI, piece.pair_weights_S, act)
    output_SH = grouped_linear(hidden_SI, weights.down, piece.plan.offsets_E)
    reduce_pairs([output_SH], piece.plan, out_RH)


class PieceGradients:
    """Input gradients piece by piece, and weight gradients over all pieces at once.

    The weight gradients need all pairs sorted by expert, across pieces. With several pieces the activation kernel
    writes its results a second time at the joint place, and rows are expanded straight to it.

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
        pairs_SH = expand_rows(grad_RH, piece.plan)
        grad_SI = grouped_dgrad(pairs_SH, weights.down, piece.plan.offsets_E)
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

    def weight_gradient(self, index: int | None) -> torch.Tensor:
        """Gradient of `ExpertWeights.first[index]`, or of the down projection for `None`; once each.

        What only the down projection's gradient needs is released with it: the largest of these tensors would
        otherwise stand beside the gradient of the first projection.
        """
        if index is None:
            return self._down_gradient()
        joint = self._joint
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
        if self._joint is not None:
            output = self._joint.expand(grads, self._pieces)
            return grouped_wgrad([output], hidden[:1], [self._joint.offsets_E])
        outputs = (
            [kept] if kept is not None else [expand_rows(g, p.plan) for g, p in zip(grads, self._pieces, strict=True)]
        )
        return grouped_wgrad(outputs, hidden, [piece.plan.offsets_E for piece in self._pieces])

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
                self._joint = JointOrder([piece.plan for piece in self._pieces])
                pairs = self._joint.num_pairs
                self._hidden.append(grad_SI.new_empty(pairs, grad_SI.shape[1]))
                self._first.append(tuple(p.new_empty(pairs, p.shape[1]) for p in projections))
            hidden, joint = self._hidden[0], (self._first[0], self._joint.place_S[index])
        slots = piece.plan.pair_slot_S
        row_kernels.glu_backward(grad_SI, projections, piece.weights_RK, slots, out_RK, first, hidden, joint)
        return first


class JointOrder:
    """Places of each piece's pairs when all pieces are sorted by expert together, ties by piece.

    Args:
        plans: plan of each piece.
    """

    def __init__(self, plans: Sequence[PairPlan]) -> None:
        from fluid_hf.moe import joint_kernels

        sizes = [plan.num_pairs for plan in plans]
        self.num_pairs = sum(sizes)
        place_S, self.offsets_E = joint_kernels.joint_places(
            torch.stack([plan.offsets_E for plan in plans]), self.num_pairs
        )
        self.place_S = place_S.split(sizes)

    def expand(self, rows: Sequence[torch.Tensor], pieces: Sequence[Piece]) -> torch.Tensor:
        """Rows of every piece at the joint places of their pairs: [N, H]."""
        from fluid_hf.moe import row_kernels

        out = rows[0].new_empty(self.num_pairs, rows[0].shape[1])
        for piece_rows, piece, place_S in zip(rows, pieces, self.place_S, strict=True):
            row_kernels.expand(piece_rows, piece.plan.pair_row_S, out, place_S)
        return out


def _split(projections: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    if len(projections) == 2:
        return projections[0], projections[1]
    gate_SI, up_SI = projections[0].chunk(2, dim=-1)
    return gate_SI, up_SI
