"""Patched models on 1, 2 and 4 ranks against the unpatched model in one process on the concatenated batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import RankPool, rank_pool
from families import FAMILIES, batch, relative_error, tiny_model

import fluid_hf
from fluid_hf import FluidConfig
from fluid_hf.checkpoint.gather import gather_experts

pool2 = rank_pool(2)
pool4 = rank_pool(4)

TOLERANCE = 1e-5


def run_model(
    rank: int, world: int, family: str, ep_size: int, checkpointing: str = "", **settings: Any
) -> dict[str, float]:
    """Worst relative errors of loss, logits and gradients of one rank."""
    disable = settings.pop("disable_scheduler", False)
    rows = [1 + (other % 3) for other in range(world)]  # different batch sizes per rank
    batches = [batch(other, rows[other]) for other in range(world)]
    tokens = sum(ids.shape[0] * (ids.shape[1] - 1) for ids in batches)
    expected = tiny_model(family)
    joint = torch.cat(batches)
    reference = expected(input_ids=joint, labels=joint, num_items_in_batch=tokens)
    reference.loss.backward()

    model = tiny_model(family)
    fluid_hf.patch_model(model, FluidConfig(ep_size=ep_size, **settings))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.train()
    if disable:
        model.fluid.scheduler.disable()
    output = model(input_ids=batches[rank], labels=batches[rank], num_items_in_batch=tokens)
    output.loss.backward()
    model.fluid.finish_batch()
    model.fluid.reduce_gradients(model)

    start = sum(rows[:rank])
    errors = {"logits": relative_error(output.logits, reference.logits[start : start + rows[rank]])}
    total = output.loss.detach().clone()
    if world > 1:
        torch.distributed.all_reduce(total)
    errors["loss"] = relative_error(total, reference.loss)
    errors.update(gradient_errors(model, expected, world))
    fluid_hf.unpatch_model(model)
    return errors


def gradient_errors(model: torch.nn.Module, expected: torch.nn.Module, world: int) -> dict[str, float]:
    reference = {name: parameter.grad for name, parameter in expected.named_parameters()}
    errors = {}
    inside = tuple(model.fluid.layers) if model.fluid.groups.ep_size > 1 else ()
    for name, parameter in model.named_parameters():
        if not (inside and name.startswith(inside)):
            errors[name] = relative_error(parameter.grad * world, reference[name])
    for name, layer in model.fluid.layers.items() if inside else ():
        for parameter in layer.parameters():  # gather the gradients the way weights are gathered
            parameter.data = parameter.grad * world
        for weight, gradient in gather_experts(layer, model.fluid, to_all=True).items():
            errors[f"{name}.{weight}"] = relative_error(gradient, reference[f"{name}.{weight}"])
    assert len(errors) == len(reference)
    return errors


WAYS = [
    {},
    {"overlap": False},
    {"wgrad": "off"},
    {"wgrad": "cross_layer"},
    {"waves": 3},
    {"recompute": True},
    {"disable_scheduler": True},
]


def check(results: list[dict[str, float]]) -> None:
    for rank, errors in enumerate(results):
        name = max(errors, key=lambda key: errors[key])
        assert errors[name] <= TOLERANCE, f"rank {rank}: {name} is off by {errors[name]:.2e}"


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_process(family: str, way: dict[str, Any]) -> None:
    check([run_model(0, 1, family, 1, **way)])


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks(pool2: RankPool, family: str, way: dict[str, Any]) -> None:
    check(pool2.run(run_model, family, 2, **way))


@pytest.mark.parametrize("ep_size", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_four_ranks(pool4: RankPool, family: str, ep_size: int) -> None:
    for way in ({}, {"overlap": False}, {"wgrad": "off", "waves": 3}, {"wgrad": "cross_layer", "waves": 2}):
        check(pool4.run(run_model, family, ep_size, **way))


@pytest.mark.parametrize("checkpointing", ["reentrant", "non_reentrant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing(pool2: RankPool, family: str, checkpointing: str) -> None:
    for way in ({}, {"recompute": True}, {"overlap": False}, {"wgrad": "cross_layer"}):
        check(pool2.run(run_model, family, 2, checkpointing=checkpointing, **way))


def run_generate(rank: int, world: int, family: str) -> bool:
    prompt = batch(rank, 1, length=5 + rank)
    expected = tiny_model(family).generate(prompt, max_new_tokens=4, do_sample=False)
    model = fluid_hf.patch_model(tiny_model(family), FluidConfig(ep_size=world))
    output = model.generate(prompt, max_new_tokens=4, do_sample=False)
    fluid_hf.unpatch_model(model)
    return torch.equal(output, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate(pool2: RankPool, family: str) -> None:
    assert pool2.run(run_generate, family) == [True, True]


def run_two_models(rank: int, world: int) -> list[float]:
    """Two patched models in one process do not mix."""
    ids = batch(rank, 2)
    losses = []
    models = [
        fluid_hf.patch_model(tiny_model(family), FluidConfig(ep_size=world)) for family in ("mixtral", "qwen3_moe")
    ]
    outputs = [model(input_ids=ids, labels=ids) for model in models]
    for output, model in zip(outputs, models, strict=True):
        output.loss.backward()
        stats = model.fluid.finish_batch()
        assert stats.inside == 6 and stats.outside == 0  # 2 layers x (gate, up, down)
    for output, family in zip(outputs, ("mixtral", "qwen3_moe"), strict=True):
        losses.append(relative_error(output.loss, tiny_model(family)(input_ids=ids, labels=ids).loss))
    for model in models:
        fluid_hf.unpatch_model(model)
    return losses


def test_two_models_coexist(pool2: RankPool) -> None:
    for losses in pool2.run(run_two_models):
        assert max(losses) <= TOLERANCE


def run_dropout(rank: int, world: int) -> tuple[float, bool]:
    """Error of the loss with dropout in the shared expert and its gate, as of LoRA; whether the block is bound."""
    losses = []
    for patched in (False, True):
        model = tiny_model("qwen2_moe")
        if patched:
            fluid_hf.patch_model(model, FluidConfig(ep_size=world))
        for layer in model.model.layers:
            for part in (layer.mlp.shared_expert_gate, layer.mlp.shared_expert.down_proj):
                part.register_forward_hook(lambda module, given, out: torch.nn.functional.dropout(out, 0.5))
        torch.manual_seed(rank)
        losses.append(model(input_ids=batch(rank, 2), labels=batch(rank, 2)).loss)
    bound = bool(model.fluid.bound_blocks)
    fluid_hf.unpatch_model(model)
    return relative_error(losses[1], losses[0]), bound


def test_dropout_draws_in_the_order_of_the_block(pool2: RankPool) -> None:
    for error, bound in pool2.run(run_dropout):
        assert bound and error < TOLERANCE
