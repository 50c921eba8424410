"""Pieces of rows through the kernels, in every way that is measured to be faster somewhere, against plain products.

On a GPU, or on the CPU with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from families import relative_error
from test_gemm_kernels import AVAILABLE, DEVICE, MANY, kernels

from fluid_hf.moe import experts, permutation
from fluid_hf.moe.expert_math import GatedMath
from fluid_hf.moe.own_tokens import OwnTokens
from fluid_hf.moe.permutation import make_pair_plan

if AVAILABLE:
    from fluid_hf.moe import gemm_kernels, linear_kernels


def pieces_of(sizes: tuple[int, ...], dtype: torch.dtype) -> list[experts.Piece]:
    """Pieces in buffers of their own, the first one's rows without padding."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for size in sizes:
        index = torch.rand(size, 5, generator=generator).argsort(1)[:, :3]
        ids = torch.where(index < 4, index, -1)
        wide = torch.randn(size, 40 + 8 * bool(made), generator=generator).to(DEVICE, dtype)
        plan = make_pair_plan(ids.to(DEVICE), 4, int((ids >= 0).sum()))
        made.append(experts.Piece(wide[:, :40], torch.rand(size, 3, generator=generator).to(DEVICE, dtype), plan))
    return made


def early(piece: experts.Piece, weights: experts.ExpertWeights, keep: bool) -> tuple[experts.Piece, experts.Projected]:
    """A projection that was queued with more places than there are pairs, as of the rank's own tokens."""
    plan, math = piece.plan, GatedMath(torch.nn.functional.silu, exchanged=True)
    beyond = torch.full((MANY,), 10**6, dtype=torch.int32, device=DEVICE)
    own, tokens = OwnTokens(math, keep), (piece.rows_RH, piece.weights_RK)
    own.plan = plan._replace(
        pair_row_S=torch.cat([plan.pair_row_S.int(), beyond]),
        pair_slot_S=torch.cat([plan.pair_slot_S.int(), beyond]),
    )
    assert own.start_early(*tokens, weights, 1)
    own.start(*tokens, weights, lambda: plan, plan.num_pairs)
    started = own.take()
    assert started is not None
    return started


def gradients(
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    separate: bool,
    recompute: bool = False,
    own: bool = False,
    views: bool = False,
) -> list[torch.Tensor]:
    """Outputs, and gradients of rows, routing weights and weights.

    Args:
        views: separate gate and up are parts of one tensor.
        recompute: projections are computed again in backward.
        own: the first piece is projected as the rank's own tokens.
    """
    generator = torch.Generator().manual_seed(8)
    gate_up = torch.randn(4, 48, 40, generator=generator).to(DEVICE, dtype)
    down = torch.randn(4, 40, 24, generator=generator).to(DEVICE, dtype)
    first = (gate_up[:, :24], gate_up[:, 24:]) if separate else (gate_up,)
    first = first if views else tuple(weight.contiguous() for weight in first)
    weights, silu = experts.ExpertWeights(first, down), torch.nn.functional.silu
    pieces = pieces_of(sizes, dtype)
    grads, found, for_down = experts.PieceGradients(pieces), list[torch.Tensor](), []
    for index, piece in enumerate(pieces):
        if own and not index:
            piece, projected = early(piece, weights, not recompute)
        else:
            projected = experts.project_piece(piece, weights, silu, not recompute, exchanged=True)
        out = torch.empty(piece.rows_RH.shape, dtype=dtype, device=DEVICE)
        experts.finish_piece(piece, projected, weights, silu, out)
        output_grad = torch.randn(out.shape, generator=generator).to(DEVICE, dtype)
        grad_out = torch.empty_like(out), torch.zeros_like(piece.weights_RK)
        kept = experts.project_piece(piece, weights, silu, exchanged=True).kept if recompute else projected.kept
        grads.backward(kept, output_grad, weights, silu, grad_out)
        found += [out, *grad_out]
        for_down.append(weakref.ref(output_grad))
        del output_grad
    found.append(grads.weight_gradient(None))
    gc.collect()
    assert all(ref() is None for ref in for_down), "output gradients are released with the down projection's gradient"
    parts, held = [], grads.held_bytes
    for index in range(len(first)):
        assert grads.held_bytes == held + sum(tensor.nbytes for tensor in grads._inputs)
        parts.append(grads.weight_gradient(index))
        copies = len(first) == 2 and not index and not grads._by_index.wgrad_first
        assert bool(grads._inputs) == copies, "gate and up share one copy of the rows, released with the last of them"
    return [*found, torch.cat(parts, 1)]


def take(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pieces through the kernels, except in float64, by index as `way` says."""
    for module in (experts, permutation):
        monkeypatch.setattr(module, "use_kernels", lambda tensor: tensor.dtype != torch.float64)
    monkeypatch.setattr(gemm_kernels, "prefers_fused", lambda inner: way in ("fused", "rows copied", "forward"))
    monkeypatch.setattr(gemm_kernels, "prefers_gathered", lambda inner, top_k: way == "gathered")
    monkeypatch.setattr(gemm_kernels, "prefers_gathered_wgrad", lambda inner: way in ("fused", "rows copied"))
    monkeypatch.setattr(experts, "is_one_kernel", lambda *of: way == "rows copied")
    monkeypatch.setattr(experts, "_measured_faster", experts._measured_faster.__wrapped__)  # not what was found before


@kernels
@pytest.mark.gpu
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("sizes", [(9,), (11, 0, 6), (0, 7)])
@pytest.mark.parametrize("way", ["fused", "rows copied", "forward", "gathered", "copied"])
def test_pieces(sizes: tuple[int, ...], separate: bool, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, against the plain path in float64."""
    expected = gradients(sizes, torch.float64, separate)
    take(way, monkeypatch)
    for ours, theirs in zip(gradients(sizes, torch.float32, separate), expected, strict=True):
        if theirs.numel():
            assert relative_error(ours.double(), theirs) <= 1e-6


@kernels
@pytest.mark.gpu
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("ours", ["few pairs", "many pairs", "none", "all", "views"])
def test_pieces_of_which_torch_computes_some(ours: str, separate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Input gradients by products of either kind, which may differ from piece to piece; gate and up by one each."""
    sizes, views = (11, 0, 6), ours == "views"
    expected = gradients(sizes, torch.float64, separate)
    take("fused", monkeypatch)
    serves = {
        "few pairs": lambda pairs: pairs < 20,
        "many pairs": lambda pairs: pairs >= 20,
        "none": lambda pairs: False,
    }
    if not views:
        prefers = serves.get(ours, lambda pairs: True)
        monkeypatch.setattr(linear_kernels, "prefers_linear", lambda rows, weight: prefers(rows.shape[0]))
        monkeypatch.setattr(linear_kernels, "prefers_one_sum", lambda rows, weight: False)
    for found, theirs in zip(gradients(sizes, torch.float32, separate, views=views), expected, strict=True):
        if theirs.numel():
            assert relative_error(found.double(), theirs) <= 1e-6


@kernels
@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(9,), (11, 0, 6)])
@pytest.mark.parametrize("way", ["fused", "rows copied", "forward", "copied"])
def test_pieces_projected_early_or_again(sizes: tuple[int, ...], way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16, whose blocks the copy engine reads where it can: bit for bit as when projected once, in time."""
    expected = gradients(sizes, torch.float64, False)
    take(way, monkeypatch)
    monkeypatch.setattr(linear_kernels, "can_describe", lambda weight: weight.dtype != torch.float64)
    plain = gradients(sizes, torch.float16, False)
    for ours, theirs in zip(plain, expected, strict=True):
        assert not theirs.numel() or relative_error(ours.double(), theirs) <= 1e-2
    for recompute, own in ((True, False), (False, True), (True, True)):
        for ours, theirs in zip(gradients(sizes, torch.float16, False, recompute, own), plain, strict=True):
            assert torch.equal(ours, theirs)


@kernels
@pytest.mark.gpu
@pytest.mark.parametrize("first", [0, 1])
def test_output_gradients_of_any_stride(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a row, or none, that was cut from a wider tensor: its stride may be a multiple of 16 bytes where H is none."""
    generator = torch.Generator().manual_seed(3)
    random = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)  # noqa: E731
    sizes, weights, silu = (first, 7, 6), (random(2, 16, 10), random(2, 10, 8)), torch.nn.functional.silu
    wide, outputs = [random(size, 16) for size in sizes], random(13, 10)
    ids = [torch.randint(0, 2, (size, 2), generator=generator) for size in sizes]

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        held = experts.ExpertWeights((weights[0].to(dtype),), weights[1].to(dtype))
        cut = wide[0].flip(1).to(dtype)[:, :10]
        assert cut.is_contiguous() and cut.stride(0) == 16
        grads_RH = cut, *outputs.to(dtype).split(sizes[1:])
        pieces = [
            experts.Piece(rows[:, :10], rows[:, 10:12], make_pair_plan(of.to(DEVICE), 2, of.numel()))
            for rows, of in zip((rows.to(dtype) for rows in wide), ids, strict=True)
        ]
        grads = experts.PieceGradients(pieces)
        for piece, grad_RH in zip(pieces, grads_RH, strict=True):
            kept = experts.project_piece(piece, held, silu).kept
            out = torch.empty(grad_RH.shape, dtype=dtype, device=DEVICE), torch.zeros_like(piece.weights_RK)
            grads.backward(kept, grad_RH, held, silu, out)
        return grads.weight_gradient(None)

    expected = gradient(torch.float64)
    take("fused", monkeypatch)
    assert relative_error(gradient(torch.float32).double(), expected) <= 1e-6
