"""Parts of sequence-parallel attention that somebody changed, and heads that need whole sequences."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from distributed import RankPool, rank_pool
from families import batch, relative_error, tiny_model
from peft import LNTuningConfig, get_peft_model
from test_equivalence import check
from transformers import Qwen3MoeForSequenceClassification, Qwen3MoeForTokenClassification

import fluid_hf
from fluid_hf import FluidConfig
from fluid_hf.errors import ConfigError, UnsupportedModelError
from fluid_hf.models.attention import find_attention

pool2 = rank_pool(2)


class Doubling(ModelHook):
    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        return 2 * output


def of_each(layer: Any, change: str) -> None:
    """Change a part of one attention layer."""
    if change in ("q_proj", "o_proj", "k_norm"):
        part = getattr(layer, change)
        part.forward = functools.partial(lambda own, x: 2 * own(x), part.forward)
    elif change == "accelerate":
        add_hook_to_module(layer.v_proj, Doubling())
    elif change == "class of q_norm":
        base = type(layer.q_norm)
        layer.q_norm.__class__ = type("Halved", (base,), {"forward": lambda self, x: base.forward(self, x) / 2})
    elif change == "backward hook":
        layer.register_full_backward_hook(lambda module, inputs, outputs: tuple(1.5 * grad for grad in inputs))


def run_changed(rank: int, world: int, change: str, first: bool) -> dict[str, float]:
    """Errors of the loss and of gradients with a change made before or after patching."""
    plain, model = tiny_model("qwen3_moe").train(), tiny_model("qwen3_moe").train()
    config = FluidConfig(ep_size=1, sp_size=world)
    if not first:
        fluid_hf.patch_model(model, config)
    for each in (plain, model):
        for layer in each.model.layers:
            of_each(layer.self_attn, change)
        if change == "LN tuning":
            get_peft_model(each, LNTuningConfig(target_modules=["q_norm"], task_type="CAUSAL_LM"))
            each.get_input_embeddings().weight.requires_grad_(True)
    if first:
        fluid_hf.patch_model(model, config)
    ids = batch(0, 2)
    expected = plain(input_ids=ids, labels=ids, use_cache=False).loss
    expected.backward()
    shard = model.fluid.shard_batch({"input_ids": ids, "labels": ids})
    loss = model.fluid.sequence_loss(model(**shard).logits, shard["shift_labels"])
    loss.backward()
    model.fluid.finish_batch()
    model.fluid.reduce_gradients(model)
    grads = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.grad is not None}
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    common = [name for name in grads if name in found]
    assert any("q_norm" in name for name in common) and any("embed_tokens" in name for name in common)
    return {"loss": relative_error(loss, expected)} | {n: relative_error(found[n], grads[n]) for n in common}


CHANGES = ("q_proj", "o_proj", "k_norm", "accelerate", "class of q_norm", "backward hook", "LN tuning")


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_is_called(pool2: RankPool, change: str, first: bool) -> None:
    check(pool2.run(run_changed, change, first))


def run_types(rank: int, world: int) -> list[bool]:
    """Whether loss and rounded gradients are those of a float32 model where some projections are kept in 16 bits."""
    ids, results = batch(0, 2), []
    for kept in ((), ("q_proj",), ("k_proj.weight", "o_proj"), ("v_proj.bias",)):
        model = fluid_hf.patch_model(tiny_model("qwen2_moe"), FluidConfig(ep_size=1, sp_size=world)).train()
        for name, parameter in model.named_parameters():
            if any(part in name for part in kept):
                parameter.data = parameter.data.bfloat16()
        shard = model.fluid.shard_batch({"input_ids": ids, "labels": ids})
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.fluid.sequence_loss(model(**shard).logits, shard["shift_labels"])
        loss.backward()
        grads = [parameter.grad for parameter in model.parameters()]
        assert all(grad.dtype == p.dtype for grad, p in zip(grads, model.parameters(), strict=True))
        results.append([loss, *[grad.bfloat16() for grad in grads]])
        fluid_hf.unpatch_model(model)
    return [all(map(torch.equal, found, results[0])) for found in results[1:]]


def test_under_autocast_each_projection_may_have_its_own_type(pool2: RankPool) -> None:
    """As where only some are trained, in float32: autocast gives transformers' layer all of them in its type."""
    assert pool2.run(run_types) == [[True] * 3] * 2


@pytest.mark.parametrize("kind", [Qwen3MoeForSequenceClassification, Qwen3MoeForTokenClassification])
def test_heads_that_need_whole_sequences_are_refused(kind: Any) -> None:
    config = tiny_model("qwen3_moe").config
    config.pad_token_id, own = 0, type("RewardModel", (kind,), {})
    for each in (kind, own):
        with pytest.raises(
            UnsupportedModelError, match=rf"{each.__name__} has the head of {kind.__name__}.*set sp_size 1"
        ):
            find_attention(each(config), 2)


def run_labels(rank: int, world: int) -> str:
    model = fluid_hf.patch_model(tiny_model("qwen3_moe"), FluidConfig(ep_size=1, sp_size=world))
    with pytest.raises(ConfigError) as raised:
        model.fluid.shard_batch({"input_ids": batch(0, 2), "labels": torch.tensor([0, 1])})
    return str(raised.value)


def test_labels_are_the_next_tokens(pool2: RankPool) -> None:
    for text in pool2.run(run_labels):
        assert text.startswith("labels (shape (2,)) must be the next tokens of input_ids (shape (2, 12)); set sp_size")
