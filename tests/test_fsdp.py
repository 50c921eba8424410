"""FSDP2 around a patched model whose experts it may shard (`ep_size` 1), or leaves alone."""

from __future__ import annotations

from typing import Any

from distributed import RankPool, rank_pool
from families import batch, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fluid_hf
from fluid_hf import FluidConfig

pool2 = rank_pool(2)


def sharded_model(world: int, ep_size: int) -> Any:
    """A patched model of which FSDP shards all but what is split already."""
    model = fluid_hf.patch_model(tiny_model("qwen2_moe"), FluidConfig(ep_size=ep_size, timeout_seconds=30))
    mesh, experts = init_device_mesh("cpu", (world,)), model.fluid.layers.values()
    ignored = {parameter for layer in experts for parameter in layer.parameters()} if ep_size > 1 else None
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh, ignored_params=ignored)
    return model


def run_unpatch(rank: int, world: int, trained: bool) -> None:
    model, ids = sharded_model(world, 1), batch(rank, 2)
    loss = model(input_ids=ids, labels=ids).loss
    if trained:
        loss.backward()
    fluid_hf.unpatch_model(model)


def test_experts_that_are_sharded_are_not_unpatched(pool2: RankPool) -> None:
    """The experts of before would come back, as they were."""
    for trained in (False, True):
        for message in pool2.expect("ConfigError", run_unpatch, trained, timeout=60):
            assert "must not be sharded by FSDP in unpatch_model" in message and "save_pretrained" in message
