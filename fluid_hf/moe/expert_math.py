"""What the experts compute, as the layer sees it: projections, the rest of forward, gradients piece by piece.

`GatedMath` is `act(gate) * up` between two projections without bias, on the kernels of `fluid_hf.moe.experts`; what
differs from that is described by an `ExpertFormat` and computed by `fluid_hf.moe.general_experts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from fluid_hf.moe.activation import Activation
from fluid_hf.moe.experts import (
    ExpertWeights,
    Piece,
    PieceGradients,
    Projected,
    finish_piece,
    project_piece,
    starts_early,
)

__all__ = ["ExpertFormat", "ExpertGradients", "ExpertMath", "GatedMath"]

Projections = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class ExpertFormat:
    """Arithmetic of experts that are not `act(gate) * up` between plain projections.

    Attributes:
        gate: from the first projection's output [S, N] to the input of the down projection [S, I]; differentiable.
        transposed: weights are [E, in, out] instead of [E, out, in].
        scale_input: the routing weight scales the expert's input instead of its output.
        norm: applied to each expert's output [S, H] before the routing weight; differentiable.
        extra: trainable parameters inside `gate` and `norm`, by name: every rank holds them whole.
    """

    gate: Callable[[torch.Tensor], torch.Tensor]
    transposed: bool = False
    scale_input: bool = False
    norm: Callable[[torch.Tensor], torch.Tensor] | None = None
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)


class ExpertGradients(Protocol):
    """Gradients of one backward pass: inputs piece by piece, then weights over all pieces."""

    def backward(
        self, projections: Projections, grad_RH: torch.Tensor, weights: Any, out: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """Input gradient of the next piece, written to `out`: of the rows [R, H] and of the routing weights [R, K]."""

    def weight_gradient(self, name: str) -> torch.Tensor:
        """Gradient of one of the parameters that `read` was given."""

    @property
    def held_bytes(self) -> int:
        """Bytes kept for the weight gradients."""


class ExpertMath(Protocol):
    """What a layer needs of its experts."""

    def read(self, parameters: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
        """The weights without autograd, in the type that is computed in."""

    def project(self, piece: Piece, weights: Any, keep: bool, early: bool = False) -> Projected:
        """First projection of each pair; with `keep`, what backward needs of it is there.

        `early`, if `starts_early` says so, there are places for more pairs than there are, or for fewer: their number
        is read on the device, and no memory is given back that was taken, but with the result.
        """

    def starts_early(self, rows_RH: torch.Tensor, weights: Any, top_k: int) -> bool:
        """Whether `project` may be called with `early`."""

    def finish(self, piece: Piece, projected: Projected, weights: Any, out_RH: torch.Tensor) -> None:
        """From the first projection to each row's weighted sum of expert outputs, written to `out_RH`."""

    def gradients(self, pieces: Sequence[Piece]) -> ExpertGradients:
        """Start a backward pass over these pieces."""


# Place among `ExpertWeights.first` by parameter name; `None` is the down projection.
_PLACE = {"gate_up": 0, "gate": 0, "up": 1, "down": None}


@dataclass(frozen=True)
class GatedMath:
    """`act(gate) * up` between two projections without bias.

    Attributes:
        act: activation of the gate.
        shared: whether kernels that move messages may hold some of the multiprocessors.
        exchanged: whether rows travel.
    """

    act: Activation
    shared: bool = False
    exchanged: bool = False

    def read(self, parameters: dict[str, torch.Tensor], dtype: torch.dtype) -> ExpertWeights:
        first = tuple([weight.detach() for name, weight in parameters.items() if name != "down"])
        return ExpertWeights(first, parameters["down"].detach()).to(dtype)

    def project(self, piece: Piece, weights: ExpertWeights, keep: bool, early: bool = False) -> Projected:
        return project_piece(piece, weights, self.act, keep, self.exchanged, early)

    def starts_early(self, rows_RH: torch.Tensor, weights: ExpertWeights, top_k: int) -> bool:
        return starts_early(rows_RH, weights, self.act, top_k)

    def finish(self, piece: Piece, projected: Projected, weights: ExpertWeights, out_RH: torch.Tensor) -> None:
        finish_piece(piece, projected, weights, self.act, out_RH)

    def gradients(self, pieces: Sequence[Piece]) -> ExpertGradients:
        return _GatedGradients(PieceGradients(pieces, self.shared), self.act)


@dataclass(frozen=True)
class _GatedGradients:
    pieces: PieceGradients
    act: Activation

    def backward(
        self,
        projections: Projections,
        grad_RH: torch.Tensor,
        weights: ExpertWeights,
        out: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        self.pieces.backward(projections, grad_RH, weights, self.act, out)

    def weight_gradient(self, name: str) -> torch.Tensor:
        return self.pieces.weight_gradient(_PLACE[name])

    @property
    def held_bytes(self) -> int:
        return self.pieces.held_bytes
