"""Gated activation with the routing weight folded in: hand-written values, and torch's autograd in float64."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn import functional
from transformers.activations import ACT2FN

from fluid_hf.comm.peer_exchange import PeerExchange
from fluid_hf.errors import ConfigError
from fluid_hf.moe.activation import Activation, glu_backward, glu_forward, is_silu
from fluid_hf.moe.expert_math import ExpertFormat
from fluid_hf.moe.expert_parallel import expert_parallel
from fluid_hf.moe.general_experts import GeneralMath
from fluid_hf.moe.layer_context import LayerContext
from fluid_hf.overlap.wgrad import WgradScheduler

ACTIVATIONS = {
    "silu": functional.silu,
    "silu module": torch.nn.SiLU(),
    "silu of transformers": ACT2FN["silu"],
    "gelu": functional.gelu,
    "gelu tanh": functools.partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


def test_hand_written_case() -> None:
    # relu(gate) = (1, 0) and up = (2, 3), so h = (2, 0); the routing weight is 0.5.
    gate, up, weight = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0, 3.0]]), torch.tensor([0.5])
    assert glu_forward(gate, up, weight, functional.relu).tolist() == [[1.0, 0.0]]
    grads = glu_backward(torch.tensor([[4.0, 5.0]]), gate, up, weight, functional.relu)
    grad_gate, grad_up, output, grad_weight = (tensor.tolist() for tensor in grads)
    assert grad_gate == [[4.0, 0.0]]  # grad * weight * up * relu'(gate): 4 * 0.5 * 2 * 1, and 0
    assert grad_up == [[2.0, 0.0]]  # grad * weight * relu(gate): 4 * 0.5 * 1, and 0
    assert output == [[1.0, 0.0]]
    assert grad_weight == [8.0]  # <grad, h>: 4 * 2 + 5 * 0


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_against_autograd_in_float64(name: str) -> None:
    act: Activation = ACTIVATIONS[name]
    torch.manual_seed(0)
    gate, up = (torch.randn(7, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.rand(7, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(7, 5, dtype=torch.float64)
    expected = weight[:, None] * act(gate) * up
    gradients = torch.autograd.grad(expected, (gate, up, weight), grad)
    plain = (gate.detach(), up.detach(), weight.detach())
    torch.testing.assert_close(glu_forward(*plain, act), expected.detach())
    grad_gate, grad_up, output, grad_weight = glu_backward(grad, *plain, act)
    torch.testing.assert_close((grad_gate, grad_up, grad_weight), gradients)
    torch.testing.assert_close(output, expected.detach())
    assert not any(tensor.requires_grad for tensor in (grad_gate, grad_up, output, grad_weight))


@pytest.mark.parametrize("act", [torch.nn.SiLU(inplace=True), torch.nn.ELU(inplace=True)], ids=["silu", "elu"])
def test_activation_in_place_leaves_what_backward_reads(act: Activation) -> None:
    torch.manual_seed(0)
    plain = *torch.randn(2, 7, 5, dtype=torch.float64).unbind(0), torch.rand(7, dtype=torch.float64)
    gate = plain[0].clone()
    same = functional.silu if is_silu(act) else functional.elu
    torch.testing.assert_close(glu_forward(*plain, act), glu_forward(*plain, same))
    grad = torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(glu_backward(grad, *plain, act), glu_backward(grad, *plain, same))
    assert torch.equal(plain[0], gate)


def test_experts_without_a_gate_take_an_activation_in_place() -> None:
    torch.manual_seed(0)
    x, first, down = torch.randn(5, 8), torch.randn(4, 6, 8), torch.randn(4, 8, 6)
    index, found = torch.tensor([[0, 3]]).repeat(5, 1), []
    for act in (torch.nn.SiLU(inplace=True), functional.silu):
        context = LayerContext(PeerExchange(None, 0, 1), 4, act, WgradScheduler("layer"))
        context.math = GeneralMath(ExpertFormat(gate=act))
        weights = {"first": first.clone().requires_grad_(), "down": down.clone().requires_grad_()}
        tokens = x.clone().requires_grad_()
        y = expert_parallel(tokens, index, torch.ones(5, 2), lambda weights=weights: weights, context)  # type: ignore[misc]
        y.sum().backward()  # type: ignore[union-attr]
        found.append((y, tokens.grad, *(weight.grad for weight in weights.values())))
    torch.testing.assert_close(*found)


def test_activation_that_does_not_say_that_it_is_in_place() -> None:
    gate, up, weight = torch.ones(2, 3), torch.ones(2, 3), torch.ones(2)
    with pytest.raises(ConfigError, match=r"^act \(.*relu_.*\) must not write to its input"):
        glu_forward(gate, up, weight, torch.relu_)
    with torch.inference_mode():  # where nothing is kept
        assert glu_forward(gate.clone(), up, weight, torch.relu_).tolist() == [[1.0] * 3] * 2


def test_gradient_of_the_routing_weight_needs_no_routing_weight() -> None:
    # dw = <grad, act(gate) * up> also where w is 0, where dividing the output by w would give nothing.
    gate, up, grad = torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0, -1.0]]), torch.tensor([[1.0, 10.0]])
    *others, grad_weight = glu_backward(grad, gate, up, torch.zeros(1), functional.relu)
    assert grad_weight.tolist() == [6.0 - 10.0]
    assert all(tensor.eq(0).all() for tensor in others)


def test_bfloat16_is_computed_in_float32() -> None:
    # In units of 1/128, the spacing of bfloat16 from 1 to 2: 129 * 130 / 128 = 131.0156, times 1.5 is 196.52: 197.
    # Rounded between the steps it would be 131 * 1.5 = 196.5, a tie that goes to the even 196.
    gate, up, weight = torch.tensor([[129 / 128]]), torch.tensor([[130 / 128]]), torch.tensor([1.5])
    found = glu_forward(gate.bfloat16(), up.bfloat16(), weight.bfloat16(), functional.relu)
    assert found.dtype == torch.bfloat16 and found.tolist() == [[197 / 128]]
    # The gradient of the routing weight sums 256 + 1 + 1: 258 in float32, 256 in bfloat16 (8 bits).
    ones = torch.ones(1, 3).bfloat16()
    grads = glu_backward(torch.tensor([[256.0, 1.0, 1.0]]).bfloat16(), ones, ones, torch.ones(1), functional.relu)
    assert [tensor.dtype for tensor in grads] == [torch.bfloat16] * 3 + [torch.float32]
    assert grads[3].tolist() == [258.0]


def test_no_pairs() -> None:
    none = torch.empty(0, 4)
    assert glu_forward(none, none, torch.empty(0), functional.silu).shape == (0, 4)
    shapes = [tuple(tensor.shape) for tensor in glu_backward(none, none, none, torch.empty(0), functional.gelu)]
    assert shapes == [(0, 4), (0, 4), (0, 4), (0,)]


def test_which_activations_are_silu() -> None:
    assert [name for name, act in ACTIVATIONS.items() if is_silu(act)] == [
        "silu",
        "silu module",
        "silu of transformers",
    ]
