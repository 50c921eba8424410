"""Grouped GEMM against a plain einsum over pairs and its autograd gradients."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fluid_hf.moe import grouped_gemm
from fluid_hf.moe.grouped_gemm import grouped_dgrad, grouped_linear, grouped_wgrad, is_one_kernel


def offsets_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32)


def experts_of(counts: list[int]) -> torch.Tensor:
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def test_hand_written_case() -> None:
    # Expert 0 computes x0 + 2 x1 on one pair, expert 1 computes 10 x0 + 20 x1 on two.
    weight = torch.tensor([[[1.0, 2.0]], [[10.0, 20.0]]])
    inputs = torch.tensor([[1.0, 1.0], [0.0, 1.0], [2.0, 0.0]])
    offsets = offsets_of([1, 2])
    assert grouped_linear(inputs, weight, offsets).tolist() == [[3.0], [20.0], [20.0]]
    grads = torch.tensor([[1.0], [1.0], [2.0]])
    assert grouped_dgrad(grads, weight, offsets).tolist() == [[1.0, 2.0], [10.0, 20.0], [20.0, 40.0]]
    # Expert 0: 1 * (1, 1); expert 1: 1 * (0, 1) + 2 * (2, 0).
    assert grouped_wgrad([grads], [inputs], [offsets]).tolist() == [[[1.0, 1.0]], [[4.0, 1.0]]]


# Pairs of each of 4 experts: all busy; first, middle, last without pairs; one has all; one pair; none.
COUNTS = [[3, 1, 2, 4], [0, 2, 3, 1], [2, 0, 0, 5], [4, 1, 2, 0], [0, 0, 6, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("counts", COUNTS)
def test_one_piece_against_autograd(counts: list[int]) -> None:
    torch.manual_seed(0)
    experts, offsets = experts_of(counts), offsets_of(counts)
    weight = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(sum(counts), 3, dtype=torch.float64, requires_grad=True)
    grads = torch.randn(sum(counts), 5, dtype=torch.float64)
    expected = torch.einsum("sm,snm->sn", inputs, weight[experts])
    dgrad, wgrad = torch.autograd.grad(expected, (inputs, weight), grads)
    plain, fixed = inputs.detach(), weight.detach()
    torch.testing.assert_close(grouped_linear(plain, fixed, offsets), expected.detach())
    torch.testing.assert_close(grouped_dgrad(grads, fixed, offsets), dgrad)
    found = grouped_wgrad([grads], [plain], [offsets])
    torch.testing.assert_close(found, wgrad)
    assert all(found[expert].eq(0).all() for expert, count in enumerate(counts) if count == 0)


def pieces(dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Gradients, inputs and offsets of three pieces, the last one empty, and the weight gradient of autograd."""
    torch.manual_seed(1)
    counts = [[2, 0, 3], [1, 4, 0], [0, 0, 0]]
    grads = [torch.randn(sum(count), 8).to(dtype) for count in counts]
    inputs = [torch.randn(sum(count), 16).to(dtype) for count in counts]
    weight = torch.zeros(3, 8, 16, dtype=torch.float64, requires_grad=True)
    total = torch.zeros((), dtype=torch.float64)
    for grad, input, count in zip(grads, inputs, counts, strict=True):
        output = torch.einsum("sm,snm->sn", input.double(), weight[experts_of(count)])
        total = total + (output * grad.double()).sum()
    (expected,) = torch.autograd.grad(total, weight)
    return grads, inputs, [offsets_of(count) for count in counts], expected


def test_several_pieces_add_up() -> None:
    grads, inputs, offsets, expected = pieces(torch.float64)
    torch.testing.assert_close(grouped_wgrad(grads, inputs, offsets), expected)
    # Without the second piece, expert 1 has no pairs and the others differ.
    rest = grouped_wgrad(grads[::2], inputs[::2], offsets[::2])
    assert rest[1].eq(0).all() and not torch.allclose(rest[0], expected[0])


def test_torch_kernel_gives_the_same_as_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    # The branch that CUDA takes, run on the CPU through the same torch function.
    monkeypatch.setattr(grouped_gemm, "_use_grouped_mm", lambda *tensors: True)
    grads, inputs, offsets, expected = pieces(torch.bfloat16)
    torch.testing.assert_close(grouped_wgrad(grads, inputs, offsets).double(), expected, rtol=2e-2, atol=2e-2)
    for grad, input, ends in zip(grads[:2], inputs[:2], offsets[:2], strict=True):
        weight = torch.randn(3, 8, 16).bfloat16()
        taken = weight[torch.bucketize(torch.arange(len(input)), ends, right=True)].double()
        output = torch.einsum("sm,snm->sn", input.double(), taken)
        torch.testing.assert_close(grouped_linear(input, weight, ends).double(), output, rtol=2e-2, atol=2e-2)
        dgrad = torch.einsum("sn,snm->sm", grad.double(), taken)
        torch.testing.assert_close(grouped_dgrad(grad, weight, ends).double(), dgrad, rtol=2e-2, atol=2e-2)


def test_experts_without_pairs_are_zero_where_torch_leaves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaves_them(left: torch.Tensor, right: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        """As on Blackwell: what the memory held."""
        weight = torch.zeros(len(offs), left.shape[0], right.shape[1], dtype=left.dtype)
        starts = [0, *offs.tolist()]
        for expert, (low, high) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
            product = left[:, low:high].float() @ right[low:high].float()
            weight[expert] = product if high > low else float("nan")
        return weight

    grads, inputs, offsets, _ = pieces(torch.bfloat16)
    expected = torch.stack(
        [grads[1][low:high].float().t() @ inputs[1][low:high].float() for low, high in ((0, 1), (1, 5), (5, 5))]
    )
    monkeypatch.setattr(grouped_gemm, "_use_grouped_mm", lambda *tensors: True)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", leaves_them)
    assert grouped_wgrad(grads[1:2], inputs[1:2], offsets[1:2])[2].isnan().all()
    monkeypatch.setattr(grouped_gemm, "_writes_all", lambda device: False)
    found = grouped_wgrad(grads[1:2], inputs[1:2], offsets[1:2])
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
    assert found[2].eq(0).all()


def test_where_torch_writes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (device.index, 0))
    asked = grouped_gemm._writes_all.__wrapped__
    assert asked(torch.device("cpu")) and asked(torch.device("cuda", 9)) and not asked(torch.device("cuda", 10))


def test_any_number_of_pairs_takes_torchs_kernel_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the loop over the experts reads the offsets on the host, which tensors without values refuse."""
    monkeypatch.setattr(grouped_gemm, "_writes_all", lambda device: True)
    with FakeTensorMode():
        grads, even, odd = (torch.empty(5, width, dtype=torch.bfloat16, device="cuda") for width in (8, 16, 12))
        ends = torch.empty(3, dtype=torch.int32, device="cuda")
        assert grouped_wgrad([grads], [even], [ends]).shape == (3, 8, 16)
        with pytest.raises(DataDependentOutputException):
            grouped_wgrad([grads], [odd], [ends])


def test_where_torchs_kernel_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (device.index, 0))
    hopper, ampere = torch.device("cuda", 9), torch.device("cuda", 8)
    asked = is_one_kernel.__wrapped__  # keeps nothing of this device
    assert asked(torch.bfloat16, hopper, 64, 24) and not asked(torch.bfloat16, hopper, 64, 12)
    assert not asked(torch.float16, hopper, 64) and not asked(torch.bfloat16, ampere, 64)
    assert not asked(torch.bfloat16, torch.device("cpu"), 64)


def test_no_pairs() -> None:
    weight, none = torch.full((2, 4, 3), float("nan")), offsets_of([0, 0])
    assert grouped_linear(torch.empty(0, 3), weight, none).shape == (0, 4)
    assert grouped_dgrad(torch.empty(0, 4), weight, none).shape == (0, 3)
    found = grouped_wgrad([torch.empty(0, 4)], [torch.empty(0, 3)], [none])
    assert found.shape == (2, 4, 3) and found.eq(0).all()


def test_type_is_kept() -> None:
    weight, offsets = torch.randn(2, 4, 3).bfloat16(), offsets_of([1, 1])
    inputs, grads = torch.randn(2, 3).bfloat16(), torch.randn(2, 4).bfloat16()
    found = (grouped_linear(inputs, weight, offsets), grouped_dgrad(grads, weight, offsets))
    assert [tensor.dtype for tensor in (*found, grouped_wgrad([grads], [inputs], [offsets]))] == [torch.bfloat16] * 3
