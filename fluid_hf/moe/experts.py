"""The experts' arithmetic on one piece of rows: forward, input and weight gradients. No communication, no autograd.

Legend: R rows, K experts per token, S pairs, H hidden, I intermediate, E experts held here. A piece is a set of rows
that is computed at once: the rank's own tokens, or the rows of one wave.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from fluid_hf.kernels import kernel_module, use_kernels
from fluid_hf.moe.activation import Activation, glu_backward, glu_forward, is_silu
from fluid_hf.moe.grouped_gemm import grouped_dgrad, grouped_linear, grouped_wgrad, is_one_kernel
from fluid_hf.moe.joint_order import JointOrder
from fluid_hf.moe.permutation import PairPlan, expand_rows, reduce_pairs

if TYPE_CHECKING:  # needs Triton
    from fluid_hf.moe.linear_kernels import Places

__all__ = ["ExpertWeights", "Piece", "PieceGradients", "Projected", "finish_piece", "project_piece", "starts_early"]


class ExpertWeights(NamedTuple):
    """Weights of the experts held here, without autograd.

    Attributes:
        first: gate and up projections: `[gate_up [E, 2I, H]]`, or `[gate [E, I, H], up [E, I, H]]`.
        down: down projection [E, H, I].
    """

    first: tuple[torch.Tensor, ...]
    down: torch.Tensor

    def to(self, dtype: torch.dtype) -> ExpertWeights:
        """The same weights in another type (copies of those without it: each may have its own, under autocast)."""
        if self.down.dtype == dtype and all([weight.dtype == dtype for weight in self.first]):
            return self
        return ExpertWeights(tuple(weight.to(dtype) for weight in self.first), self.down.to(dtype))


class Piece(NamedTuple):
    """Rows [R, H] (any row stride), routing weights [R, K] and where their pairs go."""

    rows_RH: torch.Tensor
    weights_RK: torch.Tensor
    plan: PairPlan

    @property
    def pair_weights_S(self) -> torch.Tensor:
        """Routing weight of each pair."""
        return self.weights_RK.reshape(-1).index_select(0, self.plan.pair_slot_S)


class Projected(NamedTuple):
    """First projection of a piece's pairs.

    Attributes:
        kept: gate and up pre-activations in the layout of `ExpertWeights.first`: [S, 2I], or two of [S, I].
        hidden_SI: input of the down projection, where the same kernel made it; `kept` is then empty unless asked for.
        copied_SH: the pairs' rows, if an early projection copied them.
    """

    kept: tuple[torch.Tensor, ...]
    hidden_SI: torch.Tensor | None = None
    copied_SH: torch.Tensor | None = None

    def first_pairs(self, num_pairs: int) -> Projected:
        """Without the places that were kept for more pairs than there are, and without the copied rows."""
        hidden = self.hidden_SI[:num_pairs] if self.hidden_SI is not None else None
        return Projected(tuple(tensor[:num_pairs] for tensor in self.kept), hidden)


class ByIndex(NamedTuple):
    """Which products gather their rows inside the GEMM, instead of having them copied to the pairs.

    Attributes:
        forward: the first projection and, in backward, the gradient of the down projection's input.
        fused: the first projection also computes the activation.
        wgrad_first: the weight gradient of the first projection.
        wgrad_down: that of the down projection.
    """

    forward: bool
    fused: bool
    wgrad_first: bool
    wgrad_down: bool


_BY_COPY = ByIndex(False, False, False, False)


def reads_by_index(rows_RH: torch.Tensor, weights: ExpertWeights, act: Activation, top_k: int) -> ByIndex:
    """What is done by index, from what was measured to be faster."""
    if not (use_kernels(rows_RH) and is_silu(act) and weights.down.is_contiguous()):
        return _BY_COPY
    if not all([weight.is_contiguous() for weight in weights.first]):
        return _BY_COPY
    return _measured_faster(rows_RH.dtype, rows_RH.device, weights.down.shape, top_k)


@functools.lru_cache(maxsize=64)
def _measured_faster(dtype: torch.dtype, device: torch.device, down: torch.Size, top_k: int) -> ByIndex:
    """`reads_by_index` for the sizes of a model, of which a call asks many times; `down` is [E, H, I]."""
    gemm_kernels = kernel_module("gemm_kernels")
    inner = down[2]
    if dtype == torch.float32 and not gemm_kernels.serves_float32(down):
        return _BY_COPY
    fused = gemm_kernels.prefers_fused(inner)
    forward = fused or gemm_kernels.prefers_gathered(inner, top_k)
    wgrad_down = gemm_kernels.prefers_gathered_wgrad(inner)
    # Gate and up share the copy, and torch's kernel mostly gains more than it takes (Qwen3-30B at EP1 lost 2%).
    wgrad_first = wgrad_down and not is_one_kernel(dtype, device, *down[1:])
    return ByIndex(forward, fused, wgrad_first, wgrad_down)


def starts_early(rows_RH: torch.Tensor, weights: ExpertWeights, act: Activation, top_k: int) -> bool:
    """Whether `project_piece` takes more or fewer places than there are pairs, whose number it reads on the device."""
    return reads_by_index(rows_RH, weights, act, top_k).forward or _projects_early(rows_RH, weights)


def _projects_early(rows_RH: torch.Tensor, weights: ExpertWeights) -> bool:
    """Of rows that are copied: as fast by our kernel as by torch's.

    torch's would not do: it ends the process where an offset is beyond its rows, and gives memory back that it works
    in, where a message could then arrive before it has run.
    """
    if not use_kernels(rows_RH) or not all([weight.is_contiguous() for weight in weights.first]):
        return False
    return all([kernel_module("linear_kernels").can_describe(weight) for weight in weights.first])


def _own_linear(pairs_SH: torch.Tensor, weight: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    return kernel_module("linear_kernels").gathered_linear(pairs_SH, None, offsets_E, weight, False)  # type: ignore[no-any-return]


def project_piece(
    piece: Piece,
    weights: ExpertWeights,
    act: Activation,
    keep: bool = True,
    exchanged: bool = False,
    early: bool = False,
) -> Projected:
    """Gate and up pre-activations.

    Args:
        keep: they are there for backward.
        exchanged: other pieces of the call travel: all are computed as those that are `early` (see `starts_early`).
    """
    plan, first = piece.plan, weights.first
    by_index = reads_by_index(piece.rows_RH, weights, act, piece.weights_RK.shape[1])
    if not by_index.forward:
        pairs_SH = expand_rows(piece.rows_RH, plan, early)
        product = _own_linear if exchanged and _projects_early(piece.rows_RH, weights) else grouped_linear
        projections = tuple([product(pairs_SH, weight, plan.offsets_E) for weight in first])
        return Projected(projections, copied_SH=pairs_SH if early else None)
    gemm_kernels = kernel_module("gemm_kernels")
    places = plan.pair_row_S, plan.pair_slot_S, plan.offsets_E
    if by_index.fused:
        return Projected(*gemm_kernels.gated_linear(piece.rows_RH, *places, first, piece.weights_RK, keep))
    gathered_linear = kernel_module("linear_kernels").gathered_linear
    kept = [gathered_linear(piece.rows_RH, plan.pair_row_S, plan.offsets_E, weight, False) for weight in first]
    return Projected(tuple(kept))


def finish_piece(
    piece: Piece, projected: Projected, weights: ExpertWeights, act: Activation, out_RH: torch.Tensor
) -> None:
    """From the first projection to each row's weighted sum of expert outputs, written to `out_RH`."""
    hidden_SI, projections = projected.hidden_SI, projected.kept
    if hidden_SI is None and use_kernels(projections[0]) and is_silu(act):
        row_kernels = kernel_module("row_kernels")
        hidden_SI = row_kernels.glu_forward(projections, piece.weights_RK, piece.plan.pair_slot_S)
    elif hidden_SI is None:
        gate_SI, up_SI = _split(projections)
        hidden_SI = glu_forward(gate_SI, up_SI, piece.pair_weights_S, act)
    output_SH = _linear(hidden_SI, weights.down, piece.plan.offsets_E, False)
    reduce_pairs([output_SH], piece.plan, out_RH)


class PieceGradients:
    """Input gradients piece by piece, and weight gradients over all pieces at once.

    The weight gradients need all pairs sorted by expert, across pieces. With several pieces the activation kernel
    writes its results at the joint place, where the piece's input gradients read them too (a second time at the
    piece's own if they are torch's products); rows are read by the joint order, or copied straight to it, once for
    gate and up.

    Args:
        pieces: all pieces of the layer, in the order in which `backward` will be called.
        shared: whether kernels that move messages may hold some of the multiprocessors.
    """

    def __init__(self, pieces: Sequence[Piece], shared: bool = False) -> None:
        self._pieces, self._shared = pieces, shared
        self._grads: list[torch.Tensor] = []
        self._first: list[tuple[torch.Tensor, ...]] = []
        self._hidden: list[torch.Tensor] = []
        self._inputs: list[torch.Tensor] = []
        self._asked = 0  # gradients of the first projection
        self._joint: JointOrder | None = None
        self._grad_pairs: torch.Tensor | None = None
        self._by_index = _BY_COPY

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
        places = None
        if use_kernels(grad_SI) and is_silu(act):
            by_place = len(self._pieces) > 1 and _are_ours(projections, weights.first)
            first, places = self._activation_kernel(piece, grad_RH, grad_SI, projections, out[1], by_place)
        else:
            first = self._activation(piece, grad_SI, projections, act, out[1])
        del grad_SI
        self._grads.append(grad_RH)
        if len(self._pieces) == 1:  # as they are for the weight gradient too
            self._grad_pairs = pairs_SH
        del pairs_SH
        reduce_pairs(_input_gradients(first, weights.first, piece.plan.offsets_E, places), piece.plan, out[0])

    def _through_down(
        self, piece: Piece, grad_RH: torch.Tensor, weights: ExpertWeights, act: Activation
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gradient of the down projection's input; and of its output, where that was copied to the pairs."""
        plan = piece.plan
        by_index = reads_by_index(grad_RH, weights, act, piece.weights_RK.shape[1])
        self._by_index = by_index
        if not by_index.forward:
            pairs_SH = expand_rows(grad_RH, plan)
            return grouped_dgrad(pairs_SH, weights.down, plan.offsets_E), pairs_SH
        gathered_linear = kernel_module("linear_kernels").gathered_linear
        return gathered_linear(grad_RH, plan.pair_row_S, plan.offsets_E, weights.down, True), None

    def weight_gradient(self, index: int | None) -> torch.Tensor:
        """Gradient of `ExpertWeights.first[index]`, or of the down projection for `None`; once each.

        What only the down projection's gradient needs is released with it: the largest of these tensors would
        otherwise stand beside the gradient of the first projection. A copy of the rows is made for the first one that
        needs it, and released with the last.
        """
        if index is None:
            return self._down_gradient()
        if self._by_index.wgrad_first:
            return self._gathered(self._pieces[0].rows_RH, 0, self._first[0][index])
        inputs, joint = self._inputs, self._joint
        if not inputs and joint is not None:
            inputs = [joint.expand([piece.rows_RH for piece in self._pieces], self._pieces, 0)]
        elif not inputs:
            inputs = [expand_rows(piece.rows_RH, piece.plan) for piece in self._pieces]
        self._asked += 1
        self._inputs = inputs if self._asked < len(self._first[0]) else []
        offsets = [joint.offsets_E] if joint is not None else [piece.plan.offsets_E for piece in self._pieces]
        return grouped_wgrad([first[index] for first in self._first], inputs, offsets)

    def _down_gradient(self) -> torch.Tensor:
        grads, hidden, kept = self._grads, self._hidden, self._grad_pairs
        self._grads, self._hidden, self._grad_pairs = [], [], None
        if self._by_index.wgrad_down:
            return self._gathered(grads[0], 1, hidden[0])
        if self._joint is not None:
            output = self._joint.expand(grads, self._pieces, 1)
            return grouped_wgrad([output], hidden[:1], [self._joint.offsets_E])
        outputs = (
            [kept] if kept is not None else [expand_rows(g, p.plan) for g, p in zip(grads, self._pieces, strict=True)]
        )
        return grouped_wgrad(outputs, hidden, [piece.plan.offsets_E for piece in self._pieces])

    def _gathered(self, first: torch.Tensor, which: int, other: torch.Tensor) -> torch.Tensor:
        """Weight gradient of which one operand are the pieces' rows (`which` 0) or output gradients (1), by index.

        `first` is the first piece's; the others are found by their addresses.
        """
        wgrad_kernels = kernel_module("wgrad_kernels")
        joint, plan = self._joint, self._pieces[0].plan
        if joint is None or joint.addresses is None:
            return wgrad_kernels.gathered_wgrad(
                first, plan.pair_row_S, 0, other, plan.offsets_E, which == 1, self._shared
            )
        where_S = joint.addresses[which]
        return wgrad_kernels.gathered_wgrad(
            first, where_S, joint.unit, other, joint.offsets_E, which == 1, self._shared
        )

    @property
    def held_bytes(self) -> int:
        """Bytes kept for the weight gradients."""
        tensors = [*self._grads, *self._hidden, *self._inputs, *[piece.rows_RH for piece in self._pieces]]
        for first in self._first:
            tensors += first
        return sum([tensor.nbytes for tensor in tensors])

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
        self,
        piece: Piece,
        grad_RH: torch.Tensor,
        grad_SI: torch.Tensor,
        projections: tuple[torch.Tensor, ...],
        out_RK: torch.Tensor,
        by_place: bool,
    ) -> tuple[tuple[torch.Tensor, ...], Places | None]:
        """Gradients of the projections: those of this piece, or with `by_place` of all so far and where its own are."""
        row_kernels, slots, index = kernel_module("row_kernels"), piece.plan.pair_slot_S, len(self._grads)
        own = None if by_place else tuple([torch.empty_like(projection) for projection in projections])
        if own is not None and len(self._pieces) == 1:
            self._hidden.append(grad_SI)  # it turns into the down projection's input
            self._first.append(own)
            row_kernels.glu_backward(grad_SI, projections, piece.weights_RK, slots, out_RK, own, grad_SI)
            return own, None
        if self._joint is None:
            self._joint = JointOrder(self._pieces, grad_RH if self._by_index.wgrad_down else None)
            pairs = self._joint.num_pairs
            self._hidden.append(grad_SI.new_empty(pairs, grad_SI.shape[1]))
            self._first.append(tuple([p.new_empty(pairs, p.shape[1]) for p in projections]))
        rows = self._pieces[0].rows_RH, piece.rows_RH
        outputs = self._grads[0] if self._grads else grad_RH, grad_RH
        joint = self._joint.places(index, self._first[0], rows, outputs)
        grads = own, self._hidden[0], joint
        row_kernels.glu_backward(grad_SI, projections, piece.weights_RK, slots, out_RK, *grads)
        return (self._first[0], self._joint.rows_of(index)) if own is None else (own, None)


def _are_ours(projections: tuple[torch.Tensor, ...], weights: tuple[torch.Tensor, ...]) -> bool:
    """Whether the input gradients through the first projection are products of `linear_kernels`, which find rows."""
    if not all([weight.is_contiguous() for weight in weights]):
        return False
    linear_kernels = kernel_module("linear_kernels")
    if len(projections) == 2 and linear_kernels.prefers_one_sum(projections[0], weights[0]):
        return True
    return all([linear_kernels.prefers_linear(*pair) for pair in zip(projections, weights, strict=True)])


def _input_gradients(
    grads: tuple[torch.Tensor, ...],
    weights: tuple[torch.Tensor, ...],
    offsets_E: torch.Tensor,
    places: Places | None,
) -> list[torch.Tensor]:
    """Gradients of the pairs' rows through the first projection, to be added: of gate and up together, or of each."""
    pairs = list(zip(grads, weights, strict=True))
    if len(grads) == 2 and use_kernels(grads[0]) and all(weight.is_contiguous() for weight in weights):
        linear_kernels = kernel_module("linear_kernels")
        if linear_kernels.prefers_one_sum(*pairs[0]):
            return [linear_kernels.gathered_linear(grads[0], None, offsets_E, weights[0], True, pairs[1], places)]
    if places is not None:
        gathered_linear = kernel_module("linear_kernels").gathered_linear
        return [gathered_linear(grad, None, offsets_E, weight, True, None, places) for grad, weight in pairs]
    return [_linear(grad, weight, offsets_E, True) for grad, weight in pairs]


def _linear(input_SM: torch.Tensor, weight: torch.Tensor, offsets_E: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Projection of pairs."""
    if use_kernels(input_SM) and weight.is_contiguous():
        linear_kernels = kernel_module("linear_kernels")
        if linear_kernels.prefers_linear(input_SM, weight):
            return linear_kernels.gathered_linear(input_SM, None, offsets_E, weight, transposed)  # type: ignore[no-any-return]
    return (grouped_dgrad if transposed else grouped_linear)(input_SM, weight, offsets_E)


def _split(projections: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    if len(projections) == 2:
        return projections[0], projections[1]
    gate_SI, up_SI = projections[0].chunk(2, dim=-1)
    return gate_SI, up_SI
