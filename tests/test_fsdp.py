"""FSDP2 around a patched model whose experts it may shard (`ep_size` 1), or leaves alone."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import RankPool, rank_pool
from families import batch, relative_error, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import AutoModelForCausalLM

import fluid_hf
from fluid_hf import ConfigError, FluidConfig

pool2 = rank_pool(2)


def sharded_model(world: int, ep_size: int) -> Any:
    """A patched model of which FSDP shards all but what is split already."""
    model = fluid_hf.patch_model(tiny_model("qwen2_moe"), FluidConfig(ep_size=ep_size, timeout_seconds=30))
    mesh, experts = init_device_mesh("cpu", (world,)), model.fluid.layers.values()
    ignored = {parameter for layer in experts for parameter in layer.parameters()} if ep_size > 1 else None
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh, ignored_params=ignored)
    return model


def run_unpatch(rank: int, world: int, ep_size: int, trained: bool) -> None:
    model, ids = fluid_hf.patch_model(tiny_model("qwen2_moe"), FluidConfig(ep_size=ep_size)), batch(rank, 2)
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    try:
        loss = model(input_ids=ids, labels=ids).loss
        if trained:
            loss.backward()
    except ConfigError:  # which is what experts in shares do
        assert ep_size > 1
    fluid_hf.unpatch_model(model)


def test_experts_that_are_sharded_are_not_unpatched(pool2: RankPool) -> None:
    """The experts of before would come back, as they were."""
    for ep_size, trained in ((1, False), (1, True), (2, False)):
        for message in pool2.expect("ConfigError", run_unpatch, ep_size, trained, timeout=60):
            assert "must not be sharded by FSDP in unpatch_model" in message and "save_pretrained" in message


def run_save(rank: int, world: int, ep_size: int, folder: str) -> None:
    model, ids = sharded_model(world, ep_size), batch(rank, 2)
    fluid_hf.save_pretrained(model, f"{folder}/before")
    with torch.no_grad():
        model(input_ids=ids)  # after which the outermost module's weights are whole
    fluid_hf.save_pretrained(model, f"{folder}/after")


@pytest.mark.parametrize("ep_size", [1, 2])
def test_sharded_weights_are_saved_whole(pool2: RankPool, tmp_path: Path, ep_size: int) -> None:
    pool2.run(run_save, ep_size, str(tmp_path), timeout=60)
    expected = tiny_model("qwen2_moe").state_dict()
    for folder in ("before", "after"):
        found = AutoModelForCausalLM.from_pretrained(tmp_path / folder).state_dict()
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def run_steps(rank: int, world: int, ep_size: int) -> list[float]:
    """Errors of the gradients' norm and of the loss after it, over steps of two backward passes and clipping."""
    reference, model = tiny_model("qwen2_moe"), sharded_model(world, ep_size)
    optimizers = [torch.optim.SGD(trained.parameters(), lr=0.5) for trained in (reference, model)]
    errors = []
    for step in range(3):
        for part in range(2):
            batches = [batch(other, 1 + other, step=10 * step + part) for other in range(world)]
            losses = [reference(input_ids=ids, labels=ids).loss for ids in batches]
            torch.stack(losses).mean().backward()
            loss = model(input_ids=batches[rank], labels=batches[rank]).loss
            loss.backward()
            errors.append(relative_error(loss, losses[rank]))
        model.fluid.reduce_gradients(model)
        wanted = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        errors.append(relative_error(model.fluid.clip_grad_norm_(model, 0.5), wanted))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        model.fluid.finish_batch()
    return errors


@pytest.mark.parametrize("ep_size", [1, 2])
def test_loop_beside_fsdp(pool2: RankPool, ep_size: int) -> None:
    for errors in pool2.run(run_steps, ep_size, timeout=60):
        assert len(errors) == 9 and max(errors) < 1e-5


def run_part_of_the_ranks(rank: int, world: int) -> None:
    model, ids = fluid_hf.patch_model(tiny_model("qwen2_moe"), FluidConfig(ep_size=1)), batch(rank, 2)
    fully_shard(model, mesh=init_device_mesh("cpu", (world, 1), mesh_dim_names=("others", "shard"))["shard"])
    model(input_ids=ids, labels=ids).loss.backward()
    model.fluid.reduce_gradients(model)


def test_fsdp_over_some_of_the_ranks_is_refused(pool2: RankPool) -> None:
    for message in pool2.expect("ConfigError", run_part_of_the_ranks, timeout=60):
        assert "must have all 2 ranks" in message


def run_flattened(rank: int, world: int, whole: bool, clip: bool) -> None:
    model, ids = fluid_hf.patch_model(tiny_model("qwen2_moe"), FluidConfig(ep_size=1)), batch(rank, 2)
    cpu = torch.device("cpu")
    around: Any = FullyShardedDataParallel(model, use_orig_params=whole, device_id=cpu)
    around(input_ids=ids, labels=ids).loss.backward()
    if clip:
        model.fluid.clip_grad_norm_(around, 1.0)
    else:
        model.fluid.reduce_gradients(model)


def test_gradients_of_flattened_parameters_are_not_reduced_again(pool2: RankPool) -> None:
    """FullyShardedDataParallel: ranks have other pieces of them, in tensors that do not tell."""
    for whole, clip in ((True, False), (False, True)):
        for message in pool2.expect("ConfigError", run_flattened, whole, clip, timeout=60):
            assert "must not be sharded by FullyShardedDataParallel in reduce_gradients and clip_grad_norm_" in message


def run_whole_parameters(rank: int, world: int) -> list[str]:
    """Names of parameters that are still there, whole, when FSDP has sharded the model."""
    model = fluid_hf.patch_model(tiny_model("qwen2_moe"), FluidConfig(ep_size=1))
    before = {name: weakref.ref(parameter) for name, parameter in model.named_parameters()}
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (world,)))
    gc.collect()
    return [name for name, find in before.items() if find() is not None]


def test_nothing_keeps_what_is_sharded_in_memory(pool2: RankPool) -> None:
    assert pool2.run(run_whole_parameters) == [[], []]
