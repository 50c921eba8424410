"""Sequence parallelism around transformers' flash and flex attention, against `sdpa` in one process."""

from __future__ import annotations

from typing import Any

import moe_families
import pytest
import torch
from distributed import RankPool, rank_pool
from families import batch, relative_error, tiny_model
from sequence_cores import installed
from test_equivalence import check

import fluid_hf
from fluid_hf import FluidConfig

pool2 = rank_pool(2)

PACKED = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])


def run_core(
    rank: int, world: int, implementation: str, family: str, case: str, settings: dict[str, Any]
) -> dict[str, float]:
    """Relative errors of loss and of every gradient."""
    rows = 1 if case == "packed" else 2
    options = {"sliding_window": 5} if case == "window" else {}
    ids = batch(0, rows)
    whole = {"input_ids": ids, "labels": ids.clone()}
    if case == "packed":
        whole["position_ids"] = PACKED
    if case == "padded":
        keep = torch.ones_like(ids)
        keep[0, -3:] = 0
        whole["attention_mask"] = keep
        whole["labels"][keep == 0] = -100
    expected = tiny_model(family, attn_implementation="sdpa", **options)
    reference = expected(**whole, use_cache=False).loss
    reference.backward()
    model = tiny_model(family, **options)
    model.config._attn_implementation = implementation
    fluid_hf.patch_model(model, FluidConfig(ep_size=1, sp_size=world, **settings)).train()
    with installed(implementation, once=True):
        shard = model.fluid.shard_batch(whole)
        loss = model.fluid.sequence_loss(model(**shard).logits, shard["shift_labels"])
        loss.backward()
    model.fluid.finish_batch()
    model.fluid.reduce_gradients(model)
    grads = {name: parameter.grad for name, parameter in expected.named_parameters()}
    errors = {name: relative_error(parameter.grad, grads[name]) for name, parameter in model.named_parameters()}
    fluid_hf.unpatch_model(model)
    return {**errors, "loss": relative_error(loss, reference)}


@pytest.mark.parametrize(
    ("implementation", "family", "case", "settings"),
    [
        ("flash_attention_2", "mixtral", "", {"waves": 2}),
        ("flash_attention_2", "mixtral", "packed", {"waves": 2}),
        ("flash_attention_3", "qwen3_moe", "packed", {"overlap": False}),
        ("flash_attention_2", "mixtral", "padded", {"waves": 2}),
        ("flash_attention_2", "mixtral", "window", {"waves": 2}),
        ("flex_attention", "mixtral", "packed", {"waves": 2}),
        ("flex_attention", "qwen3_moe", "padded", {"overlap": False}),
    ],
)
def test_flash_and_flex(pool2: RankPool, implementation: str, family: str, case: str, settings: dict[str, Any]) -> None:
    check(pool2.run(run_core, implementation, family, case, settings))


def run_sinks(rank: int, world: int, family: str) -> dict[str, float]:
    """A learned sink for each query head: each rank's core has those of its heads."""
    models = [moe_families.tiny_model(family) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model.set_attn_implementation("eager")
    ids = batch(0, 2)
    expected, model = models
    reference = expected(input_ids=ids, labels=ids, use_cache=False).loss
    reference.backward()
    fluid_hf.patch_model(model, FluidConfig(ep_size=1, sp_size=world)).train()
    shard = model.fluid.shard_batch({"input_ids": ids, "labels": ids})
    loss = model.fluid.sequence_loss(model(**shard).logits, shard["shift_labels"])
    loss.backward()
    model.fluid.reduce_gradients(model)
    grads = {name: parameter.grad for name, parameter in expected.named_parameters()}
    found = [(name, parameter.grad) for name, parameter in model.named_parameters() if name.endswith(".sinks")]
    assert found and all(grads[name].norm() > 0 for name, _ in found)
    return {"loss": relative_error(loss, reference)} | {name: relative_error(grad, grads[name]) for name, grad in found}


@pytest.mark.parametrize("family", ["gpt_oss", "flint"])
def test_attention_sinks(pool2: RankPool, family: str) -> None:
    check(pool2.run(run_sinks, family))
