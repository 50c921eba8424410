"""Experts of any `ExpertFormat`: biases, transposed weights, no gate, gates of their own, a norm after each expert.

In plain PyTorch on the grouped GEMMs. The gate and the norm are the model's own functions, differentiated by autograd
on each piece. Weights keep the layout in which they are stored.

Legend: R rows, K experts per token, S pairs, H hidden, N outputs of the first projection, I inputs of the down
projection, E experts held here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fluid_hf.moe.activation import activated
from fluid_hf.moe.expert_math import ExpertFormat, Projections
from fluid_hf.moe.experts import Piece, Projected
from fluid_hf.moe.grouped_gemm import grouped_dgrad, grouped_linear, grouped_wgrad
from fluid_hf.moe.permutation import PairPlan, expand_rows, reduce_pairs, sum_dtype

__all__ = ["GeneralMath", "GeneralWeights"]

ONES = 8  # columns of ones that a bias gradient multiplies: rows of 16 bytes, which the grouped GEMM needs


@dataclass(frozen=True)
class GeneralWeights:
    """Weights of the experts held here, without autograd.

    Attributes:
        first: first projection, in one or more parts along its outputs: each [E, n, H], or [E, H, n] if transposed.
        down: down projection [E, H, I], or [E, I, H] if transposed.
        first_bias, down_bias: [E, N] and [E, H], or `None`.
    """

    first: tuple[torch.Tensor, ...]
    down: torch.Tensor
    first_bias: torch.Tensor | None
    down_bias: torch.Tensor | None


@dataclass(frozen=True)
class GeneralMath:
    """The arithmetic of a format, for parameters named as follows.

    `first` or `first.0`, `first.1` (its outputs in two parts), `down`; `first_bias` and `down_bias`, or `biases` (both
    side by side); then those of `format.extra`.
    """

    format: ExpertFormat

    def read(self, parameters: dict[str, torch.Tensor], dtype: torch.dtype) -> GeneralWeights:
        plain = {
            name: weight.detach().to(dtype) for name, weight in parameters.items() if name not in self.format.extra
        }
        first = tuple(weight for name, weight in plain.items() if name.partition(".")[0] == "first")
        biases = plain.get("first_bias"), plain.get("down_bias")
        if "biases" in plain:
            outputs = sum(weight.shape[2 if self.format.transposed else 1] for weight in first)
            biases = plain["biases"][:, :outputs], plain["biases"][:, outputs:]
        return GeneralWeights(first, plain["down"], *biases)

    def project(self, piece: Piece, weights: GeneralWeights, keep: bool, early: bool = False) -> Projected:
        inputs_SH = self.inputs(piece)
        parts = [self.linear(inputs_SH, weight, piece.plan) for weight in weights.first]
        first_SN = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return Projected((_add_bias(first_SN, weights.first_bias, piece.plan),))

    def starts_early(self, rows_RH: torch.Tensor, weights: GeneralWeights, top_k: int) -> bool:
        return False

    def finish(self, piece: Piece, projected: Projected, weights: GeneralWeights, out_RH: torch.Tensor) -> None:
        hidden_SI = activated(self.format.gate, projected.kept[0])
        output_SH = _add_bias(self.linear(hidden_SI, weights.down, piece.plan), weights.down_bias, piece.plan)
        if self.format.norm is not None:
            output_SH = self.format.norm(output_SH)
        if not self.format.scale_input:
            output_SH = _scale(output_SH, piece.pair_weights_S)
        reduce_pairs([output_SH], piece.plan, out_RH)

    def gradients(self, pieces: Sequence[Piece]) -> GeneralGradients:
        return GeneralGradients(self, pieces)

    def inputs(self, piece: Piece) -> torch.Tensor:
        """What the experts are given: the row of each pair [S, H]."""
        pairs_SH = expand_rows(piece.rows_RH, piece.plan)
        return _scale(pairs_SH, piece.pair_weights_S) if self.format.scale_input else pairs_SH

    def linear(self, input: torch.Tensor, weight: torch.Tensor, plan: PairPlan) -> torch.Tensor:
        """A projection without its bias."""
        grouped = grouped_dgrad if self.format.transposed else grouped_linear
        return grouped(input, weight, plan.offsets_E)

    def dgrad(self, grad: torch.Tensor, weight: torch.Tensor, plan: PairPlan) -> torch.Tensor:
        """Gradient of `linear` with respect to its input."""
        grouped = grouped_linear if self.format.transposed else grouped_dgrad
        return grouped(grad, weight, plan.offsets_E)


class GeneralGradients:
    """Input gradients piece by piece, and weight gradients over all pieces at once.

    Args:
        math: the arithmetic.
        pieces: all pieces of the layer, in the order in which `backward` will be called.
    """

    def __init__(self, math: GeneralMath, pieces: Sequence[Piece]) -> None:
        self._math, self._pieces = math, pieces
        self._first: list[torch.Tensor] = []  # gradients of the first projection [S, N]
        self._hidden: list[torch.Tensor] = []  # inputs of the down projection [S, I]
        self._output: list[torch.Tensor] = []  # gradients of the down projection's output [S, H]
        self._widths: list[int] = []
        self._extra: dict[str, torch.Tensor] = {}

    def backward(
        self,
        projections: Projections,
        grad_RH: torch.Tensor,
        weights: GeneralWeights,
        out: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Input gradient of the next piece, and the gradients of extra parameters."""
        math, piece = self._math, self._pieces[len(self._first)]
        plan = piece.plan
        self._widths = [weight.shape[2 if math.format.transposed else 1] for weight in weights.first]
        leaf_SN = projections[0].detach().requires_grad_()
        with torch.enable_grad():
            hidden_SI = activated(math.format.gate, leaf_SN)
        grad_output, grad_hidden, grad_weight_S = self._through_down(piece, grad_RH, hidden_SI.detach(), weights)
        grad_first = self._differentiate(hidden_SI, leaf_SN, grad_hidden)
        parts = grad_first.split(self._widths, dim=-1)
        pairs = [math.dgrad(g.contiguous(), w, plan) for g, w in zip(parts, weights.first, strict=True)]
        if math.format.scale_input:
            total = sum(pairs[1:], pairs[0])
            grad_weight_S = _dot(total, expand_rows(piece.rows_RH, plan))
            pairs = [_scale(total, piece.pair_weights_S)]
        self._first.append(grad_first)
        self._hidden.append(hidden_SI.detach())
        self._output.append(grad_output)
        reduce_pairs(pairs, plan, out[0])
        flat = torch.zeros(out[1].numel(), dtype=out[1].dtype, device=out[1].device)
        flat[plan.pair_slot_S.long()] = grad_weight_S.to(flat.dtype)
        out[1].copy_(flat.view(out[1].shape))

    def _through_down(
        self, piece: Piece, grad_RH: torch.Tensor, hidden_SI: torch.Tensor, weights: GeneralWeights
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of the down projection's output, of its input, and of the routing weights."""
        math, plan, weight_S = self._math, piece.plan, piece.pair_weights_S
        grad_SH = expand_rows(grad_RH, plan)
        if math.format.norm is not None:
            output_SH = _add_bias(math.linear(hidden_SI, weights.down, plan), weights.down_bias, plan)
            leaf_SH = output_SH.detach().requires_grad_()
            with torch.enable_grad():
                normed_SH = math.format.norm(leaf_SH)
            grad_weight = _dot(grad_SH, normed_SH.detach())
            scaled = grad_SH if math.format.scale_input else _scale(grad_SH, weight_S)
            grad_output = self._differentiate(normed_SH, leaf_SH, scaled)
            return grad_output, math.dgrad(grad_output, weights.down, plan), grad_weight
        # dw = <dOut, out> without the output: <dOut W, hidden> + <dOut, bias>
        grad_hidden = math.dgrad(grad_SH, weights.down, plan)
        if math.format.scale_input:
            return grad_SH, grad_hidden, weight_S
        grad_weight = _dot(grad_hidden, hidden_SI)
        if weights.down_bias is not None:
            grad_weight = grad_weight + _dot(grad_SH, _of_pairs(weights.down_bias, plan))
        return _scale(grad_SH, weight_S), _scale(grad_hidden, weight_S), grad_weight

    def _differentiate(self, output: torch.Tensor, input: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """Gradient of `input`; those of the extra parameters are added up."""
        extra = {name: p for name, p in self._math.format.extra.items() if p.requires_grad}
        found = torch.autograd.grad(output, [input, *extra.values()], grad, allow_unused=True)
        for name, gradient in zip(extra, found[1:], strict=True):
            if gradient is not None:
                self._extra[name] = self._extra[name] + gradient if name in self._extra else gradient
        assert found[0] is not None
        return found[0]

    def weight_gradient(self, name: str) -> torch.Tensor:
        """Gradient of one of the parameters that `GeneralMath.read` was given."""
        kind, _, part = name.partition(".")
        if name in self._math.format.extra:
            extra = self._math.format.extra[name]
            return self._extra.get(name, torch.zeros_like(extra)).to(extra.dtype)
        if kind == "first":
            grads = self._first if not part else [g.split(self._widths, dim=-1)[int(part)] for g in self._first]
            return self._wgrad(grads, [self._math.inputs(piece) for piece in self._pieces])
        if name == "down":
            return self._wgrad(self._output, self._hidden)
        wanted = {"first_bias": [self._first], "down_bias": [self._output], "biases": [self._first, self._output]}
        return torch.cat([self._bias_gradient(grads) for grads in wanted[name]], dim=1)

    @property
    def held_bytes(self) -> int:
        """Bytes kept for the weight gradients."""
        tensors = [*self._first, *self._hidden, *self._output, *(piece.rows_RH for piece in self._pieces)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _wgrad(self, grads: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        if self._math.format.transposed:
            grads, inputs = inputs, grads
        left, right = ([tensor.contiguous() for tensor in tensors] for tensors in (grads, inputs))
        return grouped_wgrad(left, right, [piece.plan.offsets_E for piece in self._pieces])

    def _bias_gradient(self, grads: Sequence[torch.Tensor]) -> torch.Tensor:
        """Sum over each expert's pairs, as a product with ones: in a fixed order, unlike atomic adds."""
        ones = [g.new_ones(g.shape[0], ONES) for g in grads]
        return grouped_wgrad(grads, ones, [piece.plan.offsets_E for piece in self._pieces])[:, :, 0]


def _of_pairs(per_expert: torch.Tensor, plan: PairPlan) -> torch.Tensor:
    """Each pair's row of a tensor with one row per expert."""
    pair = torch.arange(plan.num_pairs, dtype=plan.offsets_E.dtype, device=plan.offsets_E.device)
    return per_expert.index_select(0, torch.searchsorted(plan.offsets_E, pair, right=True))


def _add_bias(output: torch.Tensor, bias: torch.Tensor | None, plan: PairPlan) -> torch.Tensor:
    return output if bias is None else output + _of_pairs(bias, plan)


def _scale(pairs: torch.Tensor, weight_S: torch.Tensor) -> torch.Tensor:
    wide = sum_dtype(pairs.dtype)
    return (pairs.to(wide) * weight_S[:, None].to(wide)).to(pairs.dtype)


def _dot(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    wide = sum_dtype(left.dtype)
    return (left.to(wide) * right.to(wide)).sum(-1)
