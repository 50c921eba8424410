"""Weight gradients of several pieces at once, against autograd, and what is held for them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from fluid_hf.moe.experts import ExpertWeights, Piece, PieceGradients, finish_piece, project_piece
from fluid_hf.moe.permutation import make_pair_plan

EXPERTS, TOP_K, HIDDEN, INNER = 3, 2, 8, 6
silu = torch.nn.functional.silu


def make_piece(rows: int, generator: torch.Generator) -> tuple[Piece, torch.Tensor]:
    index = torch.rand(rows, EXPERTS, generator=generator).argsort(1)[:, :TOP_K]
    plan = make_pair_plan(index, EXPERTS, rows * TOP_K)
    hidden = torch.randn(rows, HIDDEN, generator=generator, dtype=torch.float64)
    return Piece(hidden, torch.rand(rows, TOP_K, generator=generator, dtype=torch.float64), plan), index


def expected(piece: Piece, index: torch.Tensor, weights: ExpertWeights, grad: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of gate_up and down by autograd over a plain loop."""
    gate_up, down = weights.first[0].clone().requires_grad_(), weights.down.clone().requires_grad_()
    output = grad * 0 + 0 * (gate_up.sum() + down.sum())  # of both, also without a row
    for row in range(index.shape[0]):
        for slot in range(TOP_K):
            expert = int(index[row, slot])
            gate, up = (gate_up[expert] @ piece.rows_RH[row]).chunk(2)
            term = piece.weights_RK[row, slot] * (down[expert] @ (silu(gate) * up))
            output = output.index_add(0, torch.tensor([row]), term[None])
    return list(torch.autograd.grad((output * grad).sum(), [gate_up, down]))


@pytest.mark.parametrize("sizes", [(7,), (5, 0, 9)])
def test_weight_gradients_and_what_they_release(sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = ExpertWeights((random(EXPERTS, 2 * INNER, HIDDEN),), random(EXPERTS, HIDDEN, INNER))
    made = [make_piece(rows, generator) for rows in sizes]
    grads = PieceGradients([piece for piece, _ in made])
    wanted = [torch.zeros_like(weights.first[0]), torch.zeros_like(weights.down)]
    for piece, index in made:
        projected, grad = project_piece(piece, weights, silu), random(*piece.rows_RH.shape)
        first = projected.kept
        finish_piece(piece, projected, weights, silu, torch.empty_like(grad))
        grads.backward(first, grad, weights, silu, (torch.empty_like(grad), torch.empty_like(piece.weights_RK)))
        wanted = [w + e for w, e in zip(wanted, expected(piece, index, weights, grad), strict=True)]
        del projected, first, grad
    held = grads.held_bytes
    for_down = [weakref.ref(tensor) for tensor in (*grads._hidden, *grads._grads)]
    torch.testing.assert_close(grads.weight_gradient(None), wanted[1])
    gc.collect()
    assert all(ref() is None for ref in for_down) and grads.held_bytes < held
    torch.testing.assert_close(grads.weight_gradient(0), wanted[0])
