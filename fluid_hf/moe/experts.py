"""The experts' arithmetic on one piece of rows: forward, input and weight gradients. No communication, no autograd.

Legend: R rows, K experts per token, S pairs, H hidden, I intermediate, E experts held here. A piece is a set of rows
that is computed at once: the rank's own tokens, or the rows of one wave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fluid_hf.moe.activation import Activation, glu_backward, glu_forward
from fluid_hf.moe.grouped_gemm import grouped_dgrad, grouped_linear, grouped_wgrad
from fluid_hf.moe.permutation import PairPlan, expand_rows, reduce_pairs

__all__ = ["ExpertWeights", "Piece", "PieceGrads", "backward_piece", "finish_piece", "project_piece", "weight_gradient"]


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
class PieceGrads:
    """What the weight gradients of a piece need.

    Attributes:
        first: gradients of the projections, in the layout of `ExpertWeights.first`.
        hidden_SI: routing weight times activation, the input of the down projection.
        output_SH: gradient of the down projection's output.
    """

    first: tuple[torch.Tensor, ...]
    hidden_SI: torch.Tensor
    output_SH: torch.Tensor


def project_piece(piece: Piece, weights: ExpertWeights) -> tuple[torch.Tensor, ...]:
    """Gate and up pre-activations, in the layout of `weights.first`: [S, 2I], or two of [S, I]."""
    pairs_SH = expand_rows(piece.rows_RH, piece.plan)
    return tuple(grouped_linear(pairs_SH, weight, piece.plan.offsets_E) for weight in weights.first)


def finish_piece(
    piece: Piece, projections: tuple[torch.Tensor, ...], weights: ExpertWeights, act: Activation, out_RH: torch.Tensor
) -> None:
    """From the pre-activations to each row's weighted sum of expert outputs, written to `out_RH`."""
    gate_SI, up_SI = _split(projections)
    hidden_SI = glu_forward(gate_SI, up_SI, piece.pair_weights_S, act)
    output_SH = grouped_linear(hidden_SI, weights.down, piece.plan.offsets_E)
    reduce_pairs([output_SH], piece.plan, out_RH)


def backward_piece(
    piece: Piece,
    projections: tuple[torch.Tensor, ...],
    grad_RH: torch.Tensor,
    weights: ExpertWeights,
    act: Activation,
    out: tuple[torch.Tensor, torch.Tensor],
) -> PieceGrads:
    """Input gradient of a piece.

    Args:
        grad_RH: gradient of the rows' outputs.
        out: where the gradients of the rows [R, H] and of the routing weights [R, K] are written.
    """
    plan = piece.plan
    output_SH = expand_rows(grad_RH, plan)
    grad_SI = grouped_dgrad(output_SH, weights.down, plan.offsets_E)
    gate_SI, up_SI = _split(projections)
    grad_gate, grad_up, hidden_SI, grad_weight_S = glu_backward(grad_SI, gate_SI, up_SI, piece.pair_weights_S, act)
    first = (grad_gate, grad_up) if len(weights.first) == 2 else (torch.cat([grad_gate, grad_up], dim=-1),)
    pairs = [grouped_dgrad(grad, weight, plan.offsets_E) for grad, weight in zip(first, weights.first, strict=True)]
    reduce_pairs(pairs, plan, out[0])
    flat = torch.zeros(out[1].numel(), dtype=out[1].dtype, device=out[1].device)
    flat[plan.pair_slot_S] = grad_weight_S.to(flat.dtype)
    out[1].copy_(flat.view(out[1].shape))
    return PieceGrads(first, hidden_SI, output_SH)


def weight_gradient(index: int | None, pieces: Sequence[Piece], grads: Sequence[PieceGrads]) -> torch.Tensor:
    """Gradient of `ExpertWeights.first[index]`, or of the down projection for `None`, over all pieces at once."""
    offsets = [piece.plan.offsets_E for piece in pieces]
    if index is None:
        return grouped_wgrad([g.output_SH for g in grads], [g.hidden_SI for g in grads], offsets)
    inputs = [expand_rows(piece.rows_RH, piece.plan) for piece in pieces]
    return grouped_wgrad([g.first[index] for g in grads], inputs, offsets)


def _split(projections: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    if len(projections) == 2:
        return projections[0], projections[1]
    gate_SI, up_SI = projections[0].chunk(2, dim=-1)
    return gate_SI, up_SI
