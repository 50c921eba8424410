"""What runs again in backward: parts of a layer that the user checkpoints, and what selective checkpointing counts."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from distributed import RankPool, rank_pool
from families import batch, relative_error, tiny_model
from moe_families import tiny_model as any_model
from test_equivalence import check, gradient_errors
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import fluid_hf
from fluid_hf import FluidConfig
from fluid_hf.nodes import apart

pool2 = rank_pool(2)

SAVED = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in SAVED else CheckpointPolicy.PREFER_RECOMPUTE


def selectively(model: Any) -> Any:
    """With the products of each layer saved and all else computed again."""
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    return model.train()


def run_selectively(rank: int, world: int, family: str, settings: dict[str, Any], steps: int) -> dict[str, float]:
    """Errors of the last step: what is promised between two ranks differs from step to step."""
    config = FluidConfig(**{"ep_size": 1, "sp_size": 1, **settings})
    plain, model = tiny_model(family).train(), selectively(fluid_hf.patch_model(tiny_model(family), config))
    errors: dict[str, float] = {}
    for step in range(steps):
        inputs = [{"input_ids": batch(other, 2, length=12 - 4 * step, step=step)} for other in range(world)]
        if config.sp_size > 1:
            inputs = inputs[:1] * world
        for given in inputs:
            given["labels"] = given["input_ids"]
        plain.zero_grad()
        model.zero_grad()
        losses = [plain(**given, use_cache=False).loss for given in inputs]
        torch.stack(losses).mean().backward()
        if config.sp_size > 1:
            shard = model.fluid.shard_batch(inputs[0])
            loss = model.fluid.sequence_loss(model(**shard).logits, shard["shift_labels"])
        else:
            loss = model(**inputs[rank], use_cache=False).loss
        loss.backward()
        model.fluid.finish_batch()
        model.fluid.reduce_gradients(model)
        errors[f"loss {step}"] = relative_error(loss, losses[rank])
    return errors | gradient_errors(model, plain, 1)


WAYS: list[dict[str, Any]] = [{"ep_size": 2}, {"ep_size": 2, "waves": 2}, {"ep_size": 2, "waves": 3}]
WAYS += [{"ep_size": 2, "overlap": False}, {"sp_size": 2}, {"sp_size": 2, "waves": 2}, {"sp_size": 2, "overlap": False}]


@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_selective_checkpointing(pool2: RankPool, settings: dict[str, Any]) -> None:
    for family in ("qwen2_moe", "qwen3_moe"):
        check(pool2.run(run_selectively, family, settings, 2))


def test_other_modes_go_on_seeing_what_is_computed() -> None:
    a, seen = torch.ones(4, 4), []

    def watch(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        seen.append(operation)
        return CheckpointPolicy.PREFER_RECOMPUTE

    caching, _ = create_selective_checkpoint_contexts(watch)
    with FlopCounterMode(display=False) as counter, caching:
        torch.mm(a, a)
        with apart():
            torch.mm(a, a)
        torch.mm(a, a)
    assert counter.get_total_flops() == 3 * 2 * 4**3
    assert seen == [torch.ops.aten.mm.default] * 2
    with FlopCounterMode(display=False) as counter, apart():
        torch.mm(a, a)
    assert counter.get_total_flops() == 2 * 4**3


def blocks_only(model: Any) -> None:
    kind = type(model.model.layers[0].block_sparse_moe)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, kind))


def experts_only(model: Any) -> None:
    for layer in model.model.layers:
        own = layer.mlp.experts.forward
        layer.mlp.experts.forward = functools.partial(checkpoint, own, use_reentrant=True)


def run_in_part(rank: int, world: int, name: str, change: Any, first: bool) -> dict[str, float]:
    """Errors of a patched model of which the user checkpoints a part, before or after patching."""
    plain, model = any_model(name).train(), any_model(name).train()
    if first and change:
        change(model)
    fluid_hf.patch_model(model, FluidConfig(ep_size=world))
    if change and not first:
        change(model)
    losses = [plain(input_ids=batch(other, 2), labels=batch(other, 2)).loss for other in range(world)]
    torch.stack(losses).mean().backward()
    loss = model(input_ids=batch(rank, 2), labels=batch(rank, 2)).loss
    loss.backward()
    model.fluid.finish_batch()
    model.fluid.reduce_gradients(model)
    errors = {"loss": relative_error(loss, losses[rank])}
    wanted = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        name = name.replace("_checkpoint_wrapped_module.", "")
        if "experts." not in name or "shared" in name:  # those are split; what they add to is not
            errors[name] = relative_error(parameter.grad, wanted[name])
    return errors


@pytest.mark.parametrize(
    ("name", "change", "first"),
    [
        ("granitemoeshared", blocks_only, False),
        ("granitemoeshared", blocks_only, True),
        ("qwen2_moe", experts_only, False),
        ("deepseek_v3", experts_only, False),
        ("granitemoeshared", None, False),
    ],
)
def test_parts_of_a_layer(pool2: RankPool, name: str, change: Any, first: bool) -> None:
    check(pool2.run(run_in_part, name, change, first))
