"""Training loops without DeepSpeed: loss scaling, weight decay and clipping as in one process; what ranks share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import RankError, RankPool, fresh_ranks, rank_pool
from families import batch, relative_error, tiny_model

import fluid_hf
from fluid_hf import CollectiveError, FluidConfig
from fluid_hf.control import ControlGroup

pool2 = rank_pool(2)
pool4 = rank_pool(4)

EXPERT = 3  # of the four: on the last rank of an expert-parallel group


def worst_change(model: Any, reference: Any) -> float:
    """Largest relative error of the weights of the unpatched model."""
    expected = dict(reference.named_parameters())
    return max(relative_error(p, expected[name]) for name, p in fluid_hf.unpatch_model(model).named_parameters())


def joint_loss(model: Any, batches: list[torch.Tensor]) -> torch.Tensor:
    losses = [model(input_ids=ids, labels=ids).loss for ids in batches]
    return torch.stack(losses).mean()


def run_scaled(rank: int, world: int, ep_size: int, bad: float, clip: bool) -> tuple[list[tuple[float, ...]], float]:
    """Of each of three steps the loss scale and whether the step was skipped, here and in one process; the worst
    weight."""
    reference, model = tiny_model("qwen3_moe"), tiny_model("qwen3_moe")
    fluid_hf.patch_model(model, FluidConfig(ep_size=ep_size, timeout_seconds=30))
    scales, found = [torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2)], []
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (reference, model)]
    experts = {"alone": reference.model.layers[0].mlp.experts, "here": model.model.layers[0].mlp.experts.experts}
    for step in range(3):
        batches = [batch(other, 2, step=step) for other in range(world)]
        scales[0].scale(joint_loss(reference, batches)).backward()
        scales[1].scale(model(input_ids=batches[rank], labels=batches[rank]).loss).backward()
        if step == 1:
            experts["alone"].down_proj.grad[EXPERT, 0, 0] = bad
            if rank == ep_size - 1:  # of the first expert-parallel group only
                experts["here"].w2.grad[-1, 0, 0] = bad
        model.fluid.reduce_gradients(model)
        for scaler, optimizer in zip(scales, optimizers, strict=True):
            scaler.unscale_(optimizer)
        if clip:
            norms = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0), model.fluid.clip_grad_norm_(model, 1.0)
            assert norms[0].isfinite() == norms[1].isfinite() == (step != 1)
        for scaler, optimizer in zip(scales, optimizers, strict=True):
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        model.fluid.finish_batch()
        found.append(tuple(scaler.get_scale() for scaler in scales))
    return found, worst_change(model, reference)


@pytest.mark.parametrize(("bad", "clip"), [(float("inf"), True), (float("nan"), False)])
def test_an_overflow_in_the_experts_of_one_rank_skips_the_step_on_all(pool2: RankPool, bad: float, clip: bool) -> None:
    for scales, error in pool2.run(run_scaled, 2, bad, clip):
        assert scales == [(1024.0, 1024.0), (512.0, 512.0), (512.0, 512.0)] and error < 1e-5


def test_an_overflow_in_one_of_two_expert_parallel_groups(pool4: RankPool) -> None:
    for scales, error in pool4.run(run_scaled, 2, float("inf"), True):
        assert scales == [(1024.0, 1024.0), (512.0, 512.0), (512.0, 512.0)] and error < 1e-5


def run_unused(rank: int, world: int, ep_size: int) -> float:
    """Worst weight after three steps of AdamW with parts that no rank, or only the last one, uses."""
    reference, model = tiny_model("qwen3_moe"), tiny_model("qwen3_moe")
    for built in (reference, model):
        built.unused, built.seldom = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        for module in (built.unused, built.seldom):
            torch.nn.init.ones_(module.weight)
            torch.nn.init.ones_(module.bias)
    fluid_hf.patch_model(model, FluidConfig(ep_size=ep_size, timeout_seconds=30))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-4) for m in (reference, model)]
    for step in range(3):
        batches = [batch(other, 2, step=step) for other in range(world)]
        (joint_loss(reference, batches) + reference.seldom(torch.ones(4)).sum() / world).backward()
        loss = model(input_ids=batches[rank], labels=batches[rank]).loss
        (loss + model.seldom(torch.ones(4)).sum() if rank == world - 1 else loss).backward()
        model.fluid.reduce_gradients(model)
        assert model.unused.weight.grad is None and model.seldom.weight.grad is not None
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        model.fluid.finish_batch()
    return worst_change(model, reference)


def run_built(rank: int, world: int, when: str) -> list[str]:
    """What is warned of in three steps with an optimizer that was built before or after the model was patched."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("fluid_hf.state")
    logger.addHandler(handler)
    model = tiny_model("qwen3_moe")
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    fluid_hf.patch_model(model, FluidConfig(ep_size=1 if when == "early, not split" else 2, timeout_seconds=30))
    late = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        ids = batch(rank, 2, step=step)
        model(input_ids=ids, labels=ids).loss.backward()
        model.fluid.reduce_gradients(model)
        if when != "skipped":  # as loss scaling does
            (early if when.startswith("early") else late).step()
        late.zero_grad()
        model.fluid.finish_batch()
    logger.removeHandler(handler)
    return said


@pytest.mark.parametrize(("when", "warnings"), [("early", 1), ("early, not split", 0), ("late", 0), ("skipped", 0)])
def test_an_optimizer_that_was_built_too_early_is_warned_of(pool2: RankPool, when: str, warnings: int) -> None:
    """It holds the experts of before: they would not be trained."""
    for said in pool2.run(run_built, when):
        assert len([line for line in said if "build it after patch_model" in line]) == warnings


@pytest.mark.parametrize("ep_size", [1, 2])
def test_what_no_rank_uses_does_not_decay(pool2: RankPool, ep_size: int) -> None:
    assert max(pool2.run(run_unused, ep_size)) < 1e-5


def run_frozen_on_one(rank: int, world: int, frozen: str) -> None:
    model = fluid_hf.patch_model(tiny_model("qwen3_moe"), FluidConfig(ep_size=world, timeout_seconds=30))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(rank == 0 or frozen not in name)
    ids = batch(rank, 2)
    model(input_ids=ids, labels=ids).loss.backward()
    try:
        model.fluid.reduce_gradients(model)
    finally:
        fluid_hf.unpatch_model(model)


@pytest.mark.parametrize(("frozen", "named"), [("lm_head", "lm_head.weight"), ("layers.1.mlp.experts", "and that of")])
def test_a_parameter_frozen_on_some_ranks_only_is_named_on_all(pool2: RankPool, frozen: str, named: str) -> None:
    for message in pool2.expect("RankMismatchError", run_frozen_on_one, frozen, timeout=60):
        assert "requires_grad" in message and frozen in message and named in message


class Around(torch.nn.Module):
    """A head on a model, which is a part of it or not: a teacher, say."""

    def __init__(self, model: Any, held: bool) -> None:
        super().__init__()
        self.head = torch.nn.Linear(96, 1)
        self.models = torch.nn.ModuleList([model]) if held else (model,)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.models[0](input_ids=ids).logits).mean()


def run_wrapped(rank: int, world: int, held: bool, ignored: bool, first: bool) -> None:
    """A patched model under DistributedDataParallel that is not told of it: around its owner, or before patching."""
    model = tiny_model("qwen3_moe")
    around = Around(model, held)
    if first:
        around = torch.nn.parallel.DistributedDataParallel(around)
    fluid_hf.patch_model(model, FluidConfig(ep_size=world, timeout_seconds=30))
    if ignored:
        around._ddp_params_and_buffers_to_ignore = [name for name, _ in around.named_parameters() if "experts" in name]
    if not first:
        around = torch.nn.parallel.DistributedDataParallel(around)
    try:
        for _ in range(2):
            around(batch(rank, 2)).backward()
    finally:
        fluid_hf.unpatch_model(model)


@pytest.mark.parametrize("first", [False, True])
def test_ddp_around_the_owner_of_split_experts_is_refused(pool2: RankPool, first: bool) -> None:
    for message in pool2.expect("ConfigError", run_wrapped, True, False, first, timeout=60):
        assert "DistributedDataParallel" in message and "reduce_gradients" in message


@pytest.mark.parametrize(("held", "ignored"), [(False, False), (True, True)])
def test_ddp_that_leaves_split_experts_alone_is_none_of_ours(pool2: RankPool, held: bool, ignored: bool) -> None:
    pool2.run(run_wrapped, held, ignored, False, timeout=60)


def run_two_in_one(rank: int, world: int, frozen: bool, clip: bool) -> None:
    """Two patched models in one module, of which one is told to reduce or clip all."""
    models = [fluid_hf.patch_model(tiny_model("qwen3_moe"), FluidConfig(ep_size=world)) for _ in range(2)]
    models[1].requires_grad_(not frozen)
    both, ids = torch.nn.ModuleList(models), batch(rank, 2)
    torch.stack([model(input_ids=ids, labels=ids).loss for model in models]).sum().backward()
    try:
        if clip:
            models[0].fluid.clip_grad_norm_(both, 1.0)
        else:
            models[0].fluid.reduce_gradients(both)
    finally:
        for model in models:
            fluid_hf.unpatch_model(model)


@pytest.mark.parametrize("clip", [False, True])
def test_experts_that_another_model_has_split_are_not_taken_for_equal(pool2: RankPool, clip: bool) -> None:
    for message in pool2.expect("ConfigError", run_two_in_one, False, clip, timeout=60):
        assert "1.model.layers.0.mlp.experts" in message and "every patched model" in message
    pool2.run(run_two_in_one, True, clip, timeout=60)  # a teacher has no gradients


def run_order(rank: int, world: int, ep_size: int, order: str) -> None:
    """The steps of a loop in an order; `skip` is a backward pass that rank 1 does not make."""
    model = fluid_hf.patch_model(tiny_model("qwen3_moe"), FluidConfig(ep_size=ep_size, timeout_seconds=30))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    ids = batch(rank, 2)

    def backward() -> None:
        scaler.scale(model(input_ids=ids, labels=ids).loss).backward()

    steps = {
        "backward": backward,
        "skip": lambda: backward() if rank == 0 else None,
        "reduce": lambda: model.fluid.reduce_gradients(model),
        "clip": lambda: model.fluid.clip_grad_norm_(model, 1.0),
        "norm": lambda: model.fluid.clip_grad_norm_(model, float("inf")),
        "unscale": lambda: scaler.unscale_(optimizer),
        "step": optimizer.step,
        "clear": optimizer.zero_grad,
        "zero": lambda: optimizer.zero_grad(set_to_none=False),
    }
    try:
        for name in order.split():
            steps[name]()
    finally:
        fluid_hf.unpatch_model(model)


@pytest.mark.parametrize("ep_size", [1, 2])
def test_gradients_are_reduced_once_and_then_clipped(pool2: RankPool, ep_size: int) -> None:
    for order in (
        "reduce reduce",
        "reduce clip step reduce",
        "reduce unscale reduce",
        "clip reduce",
        "clip step reduce",
    ):
        for message in pool2.expect("GradientError", run_order, ep_size, f"backward {order}", timeout=60):
            assert "must be of a backward pass since reduce_gradients or clip_grad_norm_ was called last" in message


def test_orders_of_a_loop_that_are_right(pool2: RankPool) -> None:
    """Accumulation, either way to clear, a norm that is only looked at, nothing to reduce, a rank without a batch."""
    accumulated = "backward backward reduce clip step"
    for clear in ("clear", "zero"):
        pool2.run(run_order, 2, f"{accumulated} {clear} {accumulated} {clear} backward norm reduce", timeout=60)
    pool2.run(run_order, 1, "reduce clear reduce backward reduce clear skip reduce step zero skip reduce", timeout=60)


def run_frozen_later(rank: int, world: int, ep_size: int) -> None:
    """Gradients of parameters that were frozen are reduced once, after the pass that made them."""
    model: Any = fluid_hf.patch_model(tiny_model("qwen3_moe"), FluidConfig(ep_size=ep_size, timeout_seconds=30))
    ids, (frozen, other) = batch(rank, 2), model.model.layers
    model(input_ids=ids, labels=ids).loss.backward()
    frozen.requires_grad_(False)
    own = [parameter.grad.clone() for parameter in frozen.parameters()]
    model.fluid.reduce_gradients(model)
    first = [parameter.grad.clone() for parameter in frozen.parameters()]
    assert not any(map(torch.equal, own, first))
    for _ in range(2):
        other.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        model.fluid.reduce_gradients(model)
        now: Any = [parameter.grad for parameter in frozen.parameters()]
        assert all(map(torch.equal, now, first))
    fluid_hf.unpatch_model(model)


@pytest.mark.parametrize("ep_size", [1, 2])
def test_gradients_of_what_was_frozen_since(pool2: RankPool, ep_size: int) -> None:
    pool2.run(run_frozen_later, ep_size, timeout=60)


def run_other_weights(rank: int, world: int, ep_size: int, which: str) -> None:
    """A step of ranks that have built the same model, but for some weights."""
    model = fluid_hf.patch_model(tiny_model("qwen3_moe"), FluidConfig(ep_size=ep_size, timeout_seconds=30))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if rank == world - 1 and which == "rounded":
                parameter.copy_(parameter.bfloat16())
            elif rank == world - 1 and which in name:
                parameter.copy_(torch.randn_like(parameter))
    ids = batch(rank, 2)
    try:
        model(input_ids=ids, labels=ids).loss.backward()
        model.fluid.reduce_gradients(model)
    finally:
        fluid_hf.unpatch_model(model)


@pytest.mark.parametrize(("ep_size", "which"), [(2, "lm_head.weight"), (1, "layers.1.mlp.experts"), (1, "norm")])
def test_ranks_that_have_built_other_weights(pool2: RankPool, ep_size: int, which: str) -> None:
    """Nobody sends those of the first rank to all, as DeepSpeed and DistributedDataParallel do."""
    for message in pool2.expect("RankMismatchError", run_other_weights, ep_size, which, timeout=60):
        assert which in message.partition(" must be equal on all ranks")[0] and "torch.manual_seed" in message


def test_weights_that_may_differ(pool2: RankPool, pool4: RankPool) -> None:
    """Roundings; experts that are split; of those that some ranks share, these ranks' must be the same."""
    pool2.run(run_other_weights, 2, "rounded", timeout=60)
    pool2.run(run_other_weights, 2, "layers.1.mlp.experts", timeout=60)
    for message in pool4.expect("RankMismatchError", run_other_weights, 2, "layers.1.mlp.experts", timeout=60):
        assert "weights of model.layers.1.mlp.experts" in message


def message_of(call: Callable[[], Any]) -> str:
    with pytest.raises(CollectiveError) as caught:
        call()
    return str(caught.value)


def run_anew(rank: int, world: int, folder: str) -> list[tuple[float, list[str]]]:
    """Groups that are destroyed under a patched model and made anew, with it unpatched before or not."""
    found = []
    for turn, unpatched in enumerate((False, True, False)):
        reference, model = tiny_model("qwen3_moe"), tiny_model("qwen3_moe")
        fluid_hf.patch_model(model, FluidConfig(ep_size=world, timeout_seconds=30))
        ids = batch(rank, 2)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        model.fluid.reduce_gradients(model)
        error = relative_error(loss, reference(input_ids=ids, labels=ids).loss)
        if unpatched:
            fluid_hf.unpatch_model(model)
        dist.barrier()
        dist.destroy_process_group()
        dist.init_process_group("gloo", init_method=f"file://{folder}/{turn}", rank=rank, world_size=world)
        calls: list[Callable[[], Any]] = []
        if not unpatched:
            calls = [partial(model.fluid.reduce_gradients, model), model.fluid.metrics]
            calls.append(partial(fluid_hf.unpatch_model, model))
        found.append((error, [message_of(call) for call in calls]))
    return found


def test_process_groups_that_are_made_anew(pool2: RankPool, tmp_path: Path) -> None:
    """As in a notebook; DeepSpeed hands out groups that torch.distributed has destroyed."""
    for found in pool2.run(run_anew, str(tmp_path), timeout=90):
        assert max(error for error, _ in found) < 1e-5
        assert [len(messages) for _, messages in found] == [3, 0, 3]
        assert all("process group (destroyed)" in message for _, messages in found for message in messages)


def run_patch_alone(rank: int, world: int) -> None:
    ControlGroup.__init__.__defaults__ = (1.0, "")  # seconds instead of minutes
    if rank == 1:
        fluid_hf.patch_model(tiny_model("qwen3_moe"), FluidConfig(ep_size=world))


def test_patching_on_one_rank_only() -> None:
    with fresh_ranks(2) as pool, pytest.raises(RankError) as caught:
        pool.run(run_patch_alone, timeout=60)
    (failure,) = caught.value.failures.values()
    assert failure.kind == "CollectiveError" and "patch_model must be called on all 2 ranks" in failure.message
