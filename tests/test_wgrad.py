"""Weight gradients as autograd nodes: when they run, what hooks see, what is counted, and what is left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo import compiled_autograd

from fluid_hf import ExpertParallelExperts
from fluid_hf.errors import GradientError, WgradPendingError
from fluid_hf.overlap.wgrad import WgradScheduler, WgradStats, WgradWork, wgrad_token

HELD = 100  # bytes each layer says it holds


class Window:
    """Whether the input gradients of a layer are in flight, and what happened in which order."""

    def __init__(self) -> None:
        self.open = False
        self.events: list[str] = []


class Arrive(torch.autograd.Function):
    """Backward: the input gradients have arrived."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, window: Window) -> torch.Tensor:
        ctx.window = window
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.window.open = False
        ctx.window.events.append("arrive")
        return grads[0], None


class Linear(torch.autograd.Function):
    """`x @ weight.T`. Backward: dgrad, hand the weight gradient over, send."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        scheduler: WgradScheduler,
        window: Window,
        works: list[WgradWork],
        token: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.scheduler, ctx.window, ctx.works = scheduler, window, works
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, window = grads[0], ctx.window

        def compute() -> torch.Tensor:
            window.events.append("wgrad")
            return grad.t() @ x

        window.events.append("dgrad")
        work = WgradWork({"weight": compute}, HELD, lambda: window.open)
        ctx.works.append(work)
        ctx.scheduler.add(work)
        window.open = True
        window.events.append("send")
        return grad @ weight, None, None, None, None, grad.new_empty(0)


def layer(x: torch.Tensor, weight: torch.Tensor, scheduler: WgradScheduler, window: Window) -> torch.Tensor:
    """A linear layer whose weight gradient goes through a token created between arrival and computation."""
    arrived = Arrive.apply(x, window)
    works: list[WgradWork] = []
    token = wgrad_token(weight, lambda: scheduler.take(works.pop(), "weight"))
    result: torch.Tensor = Linear.apply(arrived, weight.detach(), scheduler, window, works, token)
    return result


def parameter(seed: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_()


SETTINGS = {"enabled": ("layer", True), "disabled": ("layer", False), "off": ("off", True)}


def scheduler_of(setting: str) -> WgradScheduler:
    policy, enabled = SETTINGS[setting]
    scheduler = WgradScheduler(policy)
    scheduler.enable() if enabled else scheduler.disable()
    return scheduler


@pytest.mark.parametrize("setting", SETTINGS)
def test_order_of_events(setting: str) -> None:
    scheduler, window = scheduler_of(setting), Window()
    layer(tokens(), parameter(0), scheduler, window).sum().backward()
    deferred = ["dgrad", "send", "wgrad", "arrive"]
    at_once = ["dgrad", "wgrad", "send", "arrive"]
    assert window.events == (deferred if setting == "enabled" else at_once)
    assert scheduler.defers == (setting == "enabled")
    stats = scheduler.finish_batch()
    assert (stats.inside, stats.outside) == ((1, 0) if setting == "enabled" else (0, 1))


@pytest.mark.parametrize("setting", SETTINGS)
def test_gradients_are_complete_when_backward_returns(setting: str) -> None:
    first, second, scheduler = parameter(0), parameter(1), scheduler_of(setting)
    x = tokens()
    seen: list[tuple[str, torch.Tensor]] = []

    def record(name: str) -> Callable[[torch.Tensor], None]:
        def hook(tensor: torch.Tensor) -> None:
            assert tensor.grad is not None
            seen.append((name, tensor.grad.clone()))

        return hook

    first.register_post_accumulate_grad_hook(record("first"))
    second.register_post_accumulate_grad_hook(record("second"))
    layer(layer(x, first, scheduler, Window()).tanh(), second, scheduler, Window()).square().sum().backward()
    assert scheduler.held_bytes == 0
    scheduler.finish_batch()
    plain_x = x.detach().requires_grad_()
    copies = [weight.detach().requires_grad_() for weight in (first, second)]
    loss = ((plain_x @ copies[0].t()).tanh() @ copies[1].t()).square().sum()
    expected = torch.autograd.grad(loss, (plain_x, *copies))
    assert x.grad is not None and first.grad is not None and second.grad is not None
    torch.testing.assert_close((x.grad, first.grad, second.grad), expected)
    assert [name for name, _ in seen] == ["second", "first"]
    torch.testing.assert_close([grad for _, grad in seen], [expected[2], expected[1]])


@pytest.mark.parametrize("setting", SETTINGS)
def test_hook_of_a_shared_weight_sees_the_sum_once(setting: str) -> None:
    weight, scheduler, x = parameter(0), scheduler_of(setting), tokens()
    seen: list[torch.Tensor] = []
    weight.register_post_accumulate_grad_hook(lambda tensor: seen.append(tensor.grad.clone()))
    layer(layer(x, weight, scheduler, Window()), weight, scheduler, Window()).sum().backward()
    plain = weight.detach().requires_grad_()
    (expected,) = torch.autograd.grad((x.detach() @ plain.t() @ plain.t()).sum(), plain)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], expected)


def test_gradients_accumulate_over_backward_passes() -> None:
    weight, scheduler = parameter(0), WgradScheduler("layer")
    for _ in range(3):
        layer(tokens(), weight, scheduler, Window()).sum().backward()
    # The gradient of sum(x @ w.T) is the sum of the rows of x, for each row of w; three times.
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, 3 * tokens().detach().sum(0).expand(3, 3))
    assert scheduler.finish_batch().inside == 3


def work(held_bytes: int, in_window: bool = True, names: str = "a") -> WgradWork:
    return WgradWork({name: lambda: torch.zeros(1) for name in names}, held_bytes, lambda: in_window)


def test_statistics() -> None:
    scheduler = WgradScheduler("layer")
    # Held: 100, 150, then 50 once the first has run, 90, and at last 0. Three of four inside.
    works = [work(100), work(50, in_window=False), work(40, names="ab")]
    scheduler.add(works[0])
    scheduler.add(works[1])
    assert scheduler.held_bytes == 150
    scheduler.take(works[0], "a")
    assert scheduler.held_bytes == 50
    scheduler.add(works[2])
    scheduler.take(works[2], "b")
    assert scheduler.held_bytes == 90  # held until the last of a layer's weights has run
    scheduler.take(works[2], "a")
    scheduler.take(works[1], "a")
    assert scheduler.held_bytes == 0
    stats = scheduler.finish_batch()
    assert stats == WgradStats(inside=3, outside=1, peak_bytes=150)
    assert stats.share_inside == 0.75
    assert scheduler.finish_batch() == WgradStats()  # counted anew
    assert WgradStats().share_inside == 0


def test_peak_of_layers_that_run_in_turn() -> None:
    scheduler = WgradScheduler("layer")
    layer(layer(tokens(), parameter(0), scheduler, Window()), parameter(1), scheduler, Window()).sum().backward()
    # The second layer's gradient is computed before the first layer's backward hands its own over.
    assert scheduler.finish_batch() == WgradStats(inside=2, outside=0, peak_bytes=HELD)


def test_weight_gradients_that_nobody_asked_for_are_pending() -> None:
    weight, scheduler, x = parameter(0), WgradScheduler("layer"), tokens()
    output = layer(layer(x, weight, scheduler, Window()), weight, scheduler, Window())
    (grad,) = torch.autograd.grad(output.sum(), [x])
    torch.testing.assert_close(grad, torch.ones_like(grad) @ weight.detach() @ weight.detach())
    with pytest.raises(WgradPendingError, match=r"weight gradients pending \(2\) must be 0 .*loss\.backward\(\)"):
        scheduler.finish_batch()
    assert scheduler.held_bytes == 0
    assert scheduler.finish_batch() == WgradStats()  # the error is raised once, the next batch starts clean
    layer(x, weight, scheduler, Window()).sum().backward()
    assert scheduler.finish_batch().inside == 1
    torch.autograd.grad(layer(x, weight, scheduler, Window()).sum(), [x])
    scheduler.reset()  # the remedy after a pass that raised
    layer(x, weight, scheduler, Window()).sum().backward()
    assert scheduler.finish_batch() == WgradStats(inside=1, outside=0, peak_bytes=HELD)


def test_partial_backward_passes_with_the_scheduler_disabled() -> None:
    # The remedy named by the error.
    scheduler, x = WgradScheduler("layer"), tokens()
    output = layer(x, parameter(0), scheduler, Window())
    scheduler.disable()
    torch.autograd.grad(output.sum(), [x])
    scheduler.enable()
    assert scheduler.finish_batch().outside == 1


def test_two_schedulers_do_not_mix() -> None:
    first, second, x = WgradScheduler("layer"), WgradScheduler("layer"), tokens()
    window = Window()
    output = layer(layer(x, parameter(0), first, window), parameter(1), second, Window())
    first.disable()
    assert second.defers and not first.defers
    output.sum().backward()
    assert window.events == ["dgrad", "wgrad", "send", "arrive"]
    assert first.finish_batch() == WgradStats(inside=0, outside=1, peak_bytes=HELD)
    assert second.finish_batch() == WgradStats(inside=1, outside=0, peak_bytes=HELD)
    torch.autograd.grad(layer(x, parameter(1), second, Window()).sum(), [x])
    first.finish_batch()  # what is left with one is not left with the other
    with pytest.raises(WgradPendingError, match=r"pending \(1\)"):
        second.finish_batch()


def test_token_keeps_no_weight_alive() -> None:
    weight = parameter(0)
    token = wgrad_token(weight, lambda: torch.zeros(3, 3))
    assert token.numel() == 0 and token.requires_grad and not token._is_view()
    assert token.untyped_storage().nbytes() == 0
    assert not wgrad_token(weight.detach(), lambda: torch.zeros(3, 3)).requires_grad


def test_compiled_autograd_is_refused() -> None:
    """It would compile the exchange frame by frame, until it fails on one rank or does not end."""
    experts, x = ExpertParallelExperts(4, 8, 6), torch.randn(3, 8, requires_grad=True)
    index, weights = torch.tensor([[0, 1], [1, 2], [3, 0]]), torch.full((3, 2), 0.5)
    loss = experts(x, index, weights).sum()
    match = r"compiled autograd \(on\) must be off in a backward pass"
    with pytest.raises(GradientError, match=match), compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    experts(x, index, weights).sum().backward()
    assert x.grad is not None and all(weight.grad is not None for weight in experts.parameters())
