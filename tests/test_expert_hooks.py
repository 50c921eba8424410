"""Hooks on a module of experts see what they see in the unpatched model, whenever they were registered."""

from __future__ import annotations

from typing import Any

import moe_families
import pytest
import torch
from distributed import RankPool, rank_pool
from families import batch, errors_by_name, relative_error, tiny_model
from test_remote_code import build as build_listed
from torch import nn

import fluid_hf
from fluid_hf import FluidConfig

pool2 = rank_pool(2)
FAMILIES = ("qwen3_moe", "qwen2_moe")


def watch(model: nn.Module) -> tuple[list[Any], list[int]]:
    """Hooks of every kind on the first layer's experts; their handles, and the number of arguments that they saw."""
    experts = model.get_submodule("model.layers.0.mlp.experts")
    seen: list[int] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, index, weights = args
        seen.append(len(args))
        return (hidden * 1.5, index, weights), kwargs

    handles = [
        experts.register_forward_pre_hook(before, with_kwargs=True),
        experts.register_forward_hook(lambda _, args, result: result * 2.0),
        experts.register_full_backward_hook(lambda _, inputs, outputs: (inputs[0] * 3.0, *inputs[1:])),
    ]
    return handles, seen


def gradients(model: Any, rank: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss, and gradients of what all ranks hold."""
    model.zero_grad()
    ids = batch(rank, 2)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if ".experts." not in n}


def run_watched(rank: int, world: int, family: str, before: bool) -> dict[str, float]:
    plain, model = tiny_model(family), tiny_model(family)
    own = model.get_submodule("model.layers.0.mlp.experts")
    watch(plain)
    if before:
        handles, seen = watch(model)
    fluid_hf.patch_model(model, FluidConfig(ep_size=world))
    if not before:
        handles, seen = watch(model)
    (wanted_loss, wanted), (loss, found) = gradients(plain, rank), gradients(model, rank)
    for name in wanted:
        torch.distributed.all_reduce(wanted[name])
        torch.distributed.all_reduce(found[name])
    assert seen == [3]
    for handle in handles:
        handle.remove()
    unwatched = tiny_model(family)
    errors = {
        "loss": abs(loss - wanted_loss),
        "unwatched": abs(gradients(model, rank)[0] - gradients(unwatched, rank)[0]),
    }
    model.fluid.finish_batch()
    late, _ = watch(model)
    fluid_hf.unpatch_model(model)
    assert not own._forward_hooks and not own._forward_pre_hooks and not own._backward_hooks and late
    return {**errors, **errors_by_name(found, wanted)}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_on_experts(pool2: RankPool, family: str, before: bool) -> None:
    for errors in pool2.run(run_watched, family, before):
        assert max(errors.values()) < 1e-5, errors


def test_hooks_of_before_are_there_again() -> None:
    model = tiny_model("qwen3_moe")
    handles, seen = watch(model)
    fluid_hf.unpatch_model(fluid_hf.patch_model(model, FluidConfig(ep_size=1)))
    gradients(model, 0)
    assert seen == [3]
    for handle in handles:
        handle.remove()
    gradients(model, 0)
    assert seen == [3]


def run_gradient_hooks(rank: int, world: int, kind: str) -> None:
    model = tiny_model("qwen3_moe")
    getattr(model.get_parameter("model.layers.1.mlp.experts.down_proj"), kind)(lambda _: None)
    fluid_hf.patch_model(model, FluidConfig(ep_size=world))


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_gradients_of_experts_are_refused(pool2: RankPool, kind: str) -> None:
    for message in pool2.expect("UnsupportedModelError", run_gradient_hooks, kind):
        assert "model.layers.1.mlp.experts.down_proj has hooks on its gradient" in message


@pytest.mark.parametrize("kind", ["list", "dbrx"])
def test_hooks_on_gradients_of_experts_that_are_stored_otherwise_are_refused(kind: str) -> None:
    """Other parameters hold these, split or not."""
    model = moe_families.tiny_model(kind) if kind == "dbrx" else build_listed("hit_loop")
    weight = next(p for name, p in reversed([*model.named_parameters()]) if ".experts." in name)
    handle = weight.register_hook(lambda _: None)
    with pytest.raises(fluid_hf.UnsupportedModelError, match="has hooks on its gradient") as caught:
        fluid_hf.patch_model(model, FluidConfig(ep_size=1))
    assert "set ep_size 1" not in str(caught.value)
    handle.remove()
    fluid_hf.patch_model(model, FluidConfig(ep_size=1))


@pytest.mark.parametrize(("family", "kind"), [("llama4", "Experts"), ("dbrx", "Experts"), ("dbrx", "ExpertGLU")])
def test_hooks_on_experts_that_are_called_otherwise_are_refused(family: str, kind: str) -> None:
    model = moe_families.tiny_model(family)
    experts = next(module for module in model.modules() if type(module).__name__.endswith(kind))
    experts.register_forward_hook(lambda *_: None)
    with pytest.raises(fluid_hf.UnsupportedModelError, match="has hooks, which would be called with other arguments"):
        fluid_hf.patch_model(model, FluidConfig(ep_size=1))


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_full_backward_hook"])
def test_hooks_on_the_activation_count_in_both_passes(kind: str) -> None:
    """Its derivative is known; with a hook that changes what it gives, that of the hook is not."""
    hooks: dict[str, Any] = {
        "register_forward_hook": lambda module, args, output: 2 * output,
        "register_full_backward_hook": lambda module, grads, _: tuple(2 * grad for grad in grads),
    }
    gradients = []
    for patched in (False, True):
        model = tiny_model("qwen3_moe")
        getattr(model.get_submodule("model.layers.1.mlp.experts.act_fn"), kind)(hooks[kind])
        if patched:
            fluid_hf.patch_model(model, FluidConfig(ep_size=1))
        ids = batch(0, 2)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert relative_error(gradients[1], gradients[0]) <= 1e-5


def test_a_forward_of_its_own_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3_moe")
    model.get_submodule("model.layers.0.mlp.experts").forward = lambda *_: None
    heard: list[str] = []
    monkeypatch.setattr("fluid_hf.models.expert_hooks.logger.warning_once", heard.append)
    fluid_hf.patch_model(model, FluidConfig(ep_size=1))
    assert len(heard) == 1 and "Qwen3MoeExperts itself is not called" in heard[0]
