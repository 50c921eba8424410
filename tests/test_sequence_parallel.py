"""Sequence-parallel models on 2 and 4 ranks against the unpatched model in one process on the whole sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import RankPool, rank_pool
from families import FAMILIES, batch, relative_error, tiny_model
from test_equivalence import check, gradient_errors

import fluid_hf
from fluid_hf import FluidConfig

pool2 = rank_pool(2)
pool4 = rank_pool(4)

PACKED = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])


def whole_batch(group: int, *, packed: bool, mask: str, length: int) -> dict[str, torch.Tensor]:
    ids = batch(group, 2, length=length)
    inputs = {"input_ids": ids, "labels": ids.clone()}
    inputs["labels"][:, :2] = -100
    if packed:
        inputs["position_ids"] = PACKED[:, :length].expand(2, -1)
    if mask:
        keep = torch.ones_like(ids)
        keep[0, -3:] = mask == "left"
        keep[0, :3] = mask == "right"
        inputs["attention_mask"] = keep
        inputs["labels"][keep == 0] = -100
    return inputs


def run_model(
    rank: int,
    world: int,
    family: str,
    sp_size: int,
    *,
    ep_size: int = 1,
    packed: bool = False,
    mask: str = "",
    attn: str = "sdpa",
    length: int = 12,
    checkpointing: str = "",
    model_args: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, float]:
    """Relative errors of logits, loss, every gradient and their norm on one rank."""
    options = {"attn_implementation": attn, **(model_args or {})}
    batches = [whole_batch(group, packed=packed, mask=mask, length=length) for group in range(world // sp_size)]
    expected = tiny_model(family, **options)
    references = [expected(**inputs, use_cache=False) for inputs in batches]
    mean = sum(reference.loss for reference in references) / len(references)
    mean.backward()

    model = fluid_hf.patch_model(
        tiny_model(family, **options), FluidConfig(ep_size=ep_size, sp_size=sp_size, **settings)
    )
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    model.train()
    group, place = divmod(rank, sp_size)
    shard = model.fluid.shard_batch(batches[group])
    output = model(**shard)
    loss = model.fluid.sequence_loss(output.logits, shard["shift_labels"])
    loss.backward()
    model.fluid.finish_batch()
    model.fluid.reduce_gradients(model)

    piece = shard["input_ids"].shape[1]
    logits = references[group].logits[:, place * piece : (place + 1) * piece]
    found = output.logits[:, : logits.shape[1]]
    if mask:  # what padding attends to is nobody's business
        keep = batches[group]["attention_mask"][:, place * piece : (place + 1) * piece].bool()
        found, logits = found[keep], logits[keep]
    errors = {"logits": relative_error(found, logits), "loss": relative_error(loss, references[group].loss)}
    if ep_size == 1:
        norms = [torch.stack([p.grad.norm() for p in m.parameters()]).norm() for m in (model, expected)]
        errors["grad_norm"] = relative_error(*norms)
        grads = {name: p.grad for name, p in expected.named_parameters()}
        errors |= {name: relative_error(p.grad, grads[name]) for name, p in model.named_parameters()}
    else:
        errors |= gradient_errors(model, expected, 1)
    fluid_hf.unpatch_model(model)
    return errors


KV_HEADS = (1, 2, 4)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks(pool2: RankPool, family: str, overlap: bool) -> None:
    for heads in KV_HEADS:
        for packed in (False, True):
            way = {"overlap": overlap, "packed": packed, "model_args": {"num_key_value_heads": heads}}
            check(pool2.run(run_model, family, 2, **way))


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_four_ranks(pool4: RankPool, family: str, overlap: bool) -> None:
    for heads in KV_HEADS:
        way = {"overlap": overlap, "packed": heads == 2, "model_args": {"num_key_value_heads": heads}}
        check(pool4.run(run_model, family, 4, **way))
