"""`unpatch_model` of an engine that DeepSpeed built: the experts that were trained come back, on every rank."""

from __future__ import annotations

import pytest
import torch
from distributed import RankPool, rank_pool
from families import relative_error, tiny_model
from test_deepspeed import settings, train

import fluid_hf
from fluid_hf import FluidConfig

pool2 = rank_pool(2)


def run_unpatched_engine(rank: int, world: int, stage: int) -> list[float]:
    """Differences of the weights, after steps, from those of the unpatched model in one process's place."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    found: list[dict[str, torch.Tensor]] = []
    for patched in (False, True):
        model = tiny_model("qwen2_moe")
        if patched:
            fluid_hf.patch_model(model, FluidConfig(ep_size=world))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings(stage))
        train(engine, rank)
        if patched:
            assert fluid_hf.unpatch_model(engine) is engine
            found.append({name: value for name, value in model.named_parameters() if ".experts." in name})
        else:
            with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
                weights = {name: value.detach().clone() for name, value in model.named_parameters()}
            found.append({name: value for name, value in weights.items() if ".experts." in name})
    expected, ours = found
    assert list(expected) == list(ours) and len(ours) == 4, "two layers' experts, all of them, on every rank"
    return [relative_error(value, expected[name]) for name, value in ours.items()]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_engine_is_unpatched_with_the_trained_experts(pool2: RankPool, stage: int) -> None:
    for errors in pool2.run(run_unpatched_engine, stage):
        assert max(errors) <= 1e-5
