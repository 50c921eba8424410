"""Sequence-parallel models on 2 and 4 ranks against the unpatched model in one process on the whole sequences."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from distributed import RankPool, rank_pool
from families import FAMILIES, batch, errors_by_name, relative_error, tiny_model
from peft import LoraConfig, get_peft_model
from test_equivalence import check, gradient_errors
from transformers import OlmoConfig, OlmoForCausalLM

import fluid_hf
from fluid_hf import FluidConfig

pool2 = rank_pool(2)
pool4 = rank_pool(4)

PACKED = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])


def whole_batch(group: int, *, packed: bool, mask: str, length: int) -> dict[str, torch.Tensor]:
    ids = batch(group, 2, length=length)
    inputs = {"input_ids": ids, "labels": ids.clone()}
    inputs["labels"][:, : min(2, length - 1)] = -100
    if packed:
        inputs["position_ids"] = PACKED[:, :length].expand(2, -1)
    if mask:
        keep = torch.ones_like(ids)
        keep[0, -3:] = mask == "left"
        keep[0, :3] = mask == "right"
        if mask == "half":
            keep[:, length // 2 :] = 0
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
    if output.aux_loss is not None:
        loss = loss + model.config.router_aux_loss_coef * output.aux_loss
    loss.backward()
    model.fluid.finish_batch()
    model.fluid.reduce_gradients(model)
    assert model.fluid.metrics()["fluid/bytes_sent"] > 0, "attention's exchanges count"

    piece = shard["input_ids"].shape[1]
    logits = references[group].logits[:, place * piece : (place + 1) * piece]
    found = output.logits[:, : logits.shape[1]]
    if mask:  # what padding attends to is nobody's business
        keep = batches[group]["attention_mask"][:, place * piece : (place + 1) * piece].bool()
        found, logits = found[keep], logits[keep]
    if not logits.numel():
        found = logits = torch.ones(1)
    errors = {"logits": relative_error(found, logits), "loss": relative_error(loss, references[group].loss)}
    if ep_size == 1:
        norms = [torch.stack([p.grad.norm() for p in m.parameters()]).norm() for m in (model, expected)]
        errors["grad_norm"] = relative_error(*norms)
        wanted = {name: p.grad for name, p in expected.named_parameters()}
        errors |= errors_by_name({name: p.grad for name, p in model.named_parameters()}, wanted)
    else:
        errors |= gradient_errors(model, expected, 1)
    fluid_hf.unpatch_model(model)
    return errors


KV_HEADS = (1, 2, 4)
AUXILIARY = {"output_router_logits": True, "router_aux_loss_coef": 0.5}  # of whole sequences, without padding
WAYS = [{}, {"waves": 2}, {"waves": 4, "wgrad": "off"}, {"overlap": False}]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks(pool2: RankPool, family: str, way: dict[str, Any]) -> None:
    for heads in KV_HEADS:
        for packed in (False, True) if heads == 2 else (heads == 1,):
            check(pool2.run(run_model, family, 2, packed=packed, model_args={"num_key_value_heads": heads}, **way))


@pytest.mark.parametrize("family", FAMILIES)
def test_four_ranks(pool4: RankPool, family: str) -> None:
    for heads, way in itertools.product(KV_HEADS, ({}, {"waves": 2}, {"overlap": False})):
        model_args = {"num_key_value_heads": heads, "num_attention_heads": 8}
        check(pool4.run(run_model, family, 4, packed=heads == 2, model_args=model_args, **way))
    check(pool4.run(run_model, family, 4, length=4, waves=2))  # a token a rank


@pytest.mark.parametrize(
    "way",
    [
        {"mask": "right"},
        {"mask": "left", "waves": 2},
        {"attn": "eager", "mask": "left"},
        {"attn": "eager", "overlap": False, "packed": True},
        {"length": 11, "waves": 2},  # not divisible: filled up
        {"length": 2},  # a token a rank
        {"length": 2, "waves": 2},
        {"model_args": {"sliding_window": 5}},
        {"model_args": {"sliding_window": 5}, "attn": "eager", "packed": True, "waves": 2},
        {"ep_size": 2, "waves": 2},
        {"ep_size": 2, "mask": "half", "model_args": AUXILIARY},
        {"checkpointing": "non_reentrant", "mask": "right", "model_args": AUXILIARY, "length": 11},
        {"length": 11, "model_args": AUXILIARY},  # the loss leaves out what fills up
        {"checkpointing": "reentrant", "waves": 2, "ep_size": 2},
        {"checkpointing": "non_reentrant", "waves": 2, "ep_size": 2},
        {"checkpointing": "non_reentrant", "overlap": False},
    ],
    ids=str,
)
def test_masks_windows_lengths_and_checkpointing(pool2: RankPool, way: dict[str, Any]) -> None:
    check(pool2.run(run_model, "mixtral", 2, **way))


@pytest.mark.parametrize(("sp_size", "ep_size"), [(2, 1), (2, 2), (2, 4), (4, 4)])
def test_with_data_and_expert_parallelism(pool4: RankPool, sp_size: int, ep_size: int) -> None:
    check(pool4.run(run_model, "qwen3_moe", sp_size, ep_size=ep_size, waves=2))
    check(pool4.run(run_model, "qwen2_moe", sp_size, ep_size=ep_size, overlap=False))


def test_heads_that_do_not_group_evenly(pool2: RankPool) -> None:
    """6 query heads, 3 key/value heads: one of them belongs to the heads of both ranks."""
    model_args = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}
    for way in ({"overlap": False}, {"waves": 3}):
        check(pool2.run(run_model, "mixtral", 2, model_args=model_args, **way))


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_three_chunks_of_unequal_size(pool2: RankPool, kv_heads: int) -> None:
    model_args = {"num_attention_heads": 8, "num_key_value_heads": kv_heads, "hidden_size": 64}
    for family in ("mixtral", "qwen3_moe"):
        check(pool2.run(run_model, family, 2, model_args=model_args, packed=kv_heads == 2, waves=3))


def run_in_pieces(rank: int, world: int, family: str, **options: Any) -> dict[str, float]:
    """`run_model` with messages in two pieces, however small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fluid_hf.attention.planner.MIN_SECONDS_IN_PIECES", 0)
        return run_model(rank, world, family, 2, **options)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("kv_heads", KV_HEADS)
def test_one_chunk_in_pieces(pool2: RankPool, family: str, kv_heads: int) -> None:
    """Also with a key/value head of both ranks, biases, and an odd number of tokens."""
    model_args = {"num_key_value_heads": kv_heads}
    for way in ({}, {"packed": True}, {"wgrad": "off"}, {"length": 6}, {"length": 10, "checkpointing": "reentrant"}):
        check(pool2.run(run_in_pieces, family, model_args=model_args, waves=1, **way))


def dense_model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return OlmoForCausalLM(OlmoConfig(vocab_size=96, **sizes, num_key_value_heads=2, pad_token_id=0))


def run_other_layers(rank: int, world: int, lora: bool) -> dict[str, float]:
    """A dense model whose attention reads unlike the known forms, and projections with adapters."""
    models = [tiny_model("mixtral") if lora else dense_model() for _ in range(2)]
    if lora:
        torch.manual_seed(1)
        wanted = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
        models = [get_peft_model(model, wanted).base_model.model for model in models]
        models[1].load_state_dict(models[0].state_dict())
    model, expected = models
    fluid_hf.patch_model(model, FluidConfig(ep_size=1, sp_size=world))
    assert bool(model.fluid.sequence.overlapped) == lora
    whole = whole_batch(0, packed=False, mask="", length=12)
    loss = expected(**whole, use_cache=False).loss
    loss.backward()
    shard = model.fluid.shard_batch(whole)
    found = model.fluid.sequence_loss(model(**shard).logits, shard["shift_labels"])
    found.backward()
    model.fluid.reduce_gradients(model)
    grads = {name: p.grad for name, p in expected.named_parameters() if p.requires_grad}
    errors = {name: relative_error(p.grad, grads[name]) for name, p in model.named_parameters() if p.requires_grad}
    assert len(errors) == len(grads) > 0
    fluid_hf.unpatch_model(model)
    return {**errors, "loss": relative_error(found, loss)}


@pytest.mark.parametrize("lora", [True, False])
def test_layers_of_another_form(pool2: RankPool, lora: bool) -> None:
    check(pool2.run(run_other_layers, lora))


def run_evaluation(rank: int, world: int, family: str) -> dict[str, float]:
    """Whole sequences on every rank, pieces on request, generation, and the model as it was after unpatching."""
    expected, model = tiny_model(family).eval(), tiny_model(family).eval()
    before = [(name, type(m), m.__dict__.get("forward")) for name, m in model.named_modules()]
    fluid_hf.patch_model(model, FluidConfig(sp_size=world, ep_size=1))
    whole = whole_batch(0, packed=False, mask="right", length=12)
    reference = expected(**whole)
    errors = {"whole": relative_error(model(**whole).logits, reference.logits)}
    shard = model.fluid.shard_batch(whole)
    with torch.no_grad():
        logits = model(**shard).logits
    errors["sharded loss"] = relative_error(model.fluid.sequence_loss(logits, shard["shift_labels"]), reference.loss)
    prompt = whole["input_ids"][:, : 4 + rank]
    generated = [m.generate(prompt, max_new_tokens=4, do_sample=False) for m in (model, expected)]
    errors["generated"] = 0.0 if torch.equal(*generated) else 1.0
    fluid_hf.unpatch_model(model)
    assert before == [(name, type(m), m.__dict__.get("forward")) for name, m in model.named_modules()]
    assert all(m.config is model.config for m in model.modules() if hasattr(m, "q_proj"))
    errors["unpatched"] = relative_error(model(**whole).logits, reference.logits)
    return errors


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_generation_and_unpatching(pool2: RankPool, family: str) -> None:
    check(pool2.run(run_evaluation, family))


def run_wrong(rank: int, world: int, what: str) -> None:
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 24} if what == "heads" else {}
    if what == "rope":
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        heads = {"rope_parameters": rope, "head_dim": 8}
    model = tiny_model("mixtral", **heads)
    fluid_hf.patch_model(model, FluidConfig(ep_size=1, sp_size=3 if what == "world" else 2))
    model.train()
    try:
        whole = whole_batch(rank if what == "batches" else 0, packed=False, mask="", length=11)
        if what == "length":
            model.fluid.shard_batch(whole, pad_to_multiple=False)
        shard = model.fluid.shard_batch(whole)
        if what == "positions":
            model(input_ids=shard["input_ids"])
        if what == "labels":
            model(**shard, labels=shard["input_ids"]) if rank < 0 else model(
                input_ids=shard["input_ids"], position_ids=shard["position_ids"], labels=shard["input_ids"]
            )
        if what == "shapes":
            cut = slice(0, 6 - rank)
            model(input_ids=shard["input_ids"][:, cut], position_ids=shard["position_ids"][:, cut])
        if what == "packing":
            model(**shard, cu_seq_lens_q=torch.tensor([0, 4, 12]))
        if what == "mask":
            model(**shard, attention_mask=torch.ones(2, 1, 6, 6, dtype=torch.bool))
    finally:
        fluid_hf.unpatch_model(model)


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("heads", "ConfigError", "num_attention_heads (3) must be divisible by sp_size (2); use sp_size 3"),
        ("world", "ConfigError", "world size (2) must be divisible by sp_size (3); use sp_size 1 or 2"),
        ("rope", "UnsupportedModelError", "rope_type dynamic"),
        ("batches", "RankMismatchError", "give the same batch to all of them"),
        ("length", "ConfigError", "sequence length (11) must be divisible by sp_size (2); add 1 tokens"),
        ("positions", "ConfigError", "position_ids must be given"),
        ("labels", "ConfigError", "must come as shift_labels"),
        ("shapes", "RankMismatchError", "[2, 6], rank 1 has [2, 5]"),
        ("packing", "ConfigError", "cu_seq_lens_q cannot be cut"),
        ("mask", "ConfigError", "attention_mask must be 2-D"),
    ],
)
def test_wrong_use_raises_on_every_rank(pool2: RankPool, what: str, kind: str, message: str) -> None:
    for text in pool2.expect(kind, run_wrong, what):
        assert message in text


def run_schedule(rank: int, world: int, family: str, waves: int = 2) -> tuple[list[str], int, float]:
    model = fluid_hf.patch_model(tiny_model(family), FluidConfig(ep_size=1, sp_size=world, waves=waves)).train()
    shard = model.fluid.shard_batch(whole_batch(0, packed=False, mask="", length=12))
    with model.fluid.record_events() as events:
        logits = model(**shard).logits
        sent = model.fluid.sequence_exchange.bytes_sent
        model.fluid.sequence_loss(logits, shard["shift_labels"]).backward()
    stats = model.fluid.finish_batch()
    found = [event for name, event in events if name == "model.layers.1.self_attn"]
    fluid_hf.unpatch_model(model)
    return found, sent, stats.inside


SCHEDULE = [
    *("post heads 0", "post heads 1", "wait heads 0", "post results 0", "wait heads 1", "post results 1"),
    *("wait results 0", "wait results 1", "post result grads 1", "post result grads 0"),
    *("wait result grads 1", "post return 1", "wait result grads 0", "post return 0", "wgrad o", "wait return 1"),
    *("wait return 0", "wgrad q", "wgrad k", "wgrad v"),
]


def run_schedule_in_pieces(rank: int, world: int) -> tuple[list[str], int, float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fluid_hf.attention.planner.MIN_SECONDS_IN_PIECES", 0)
        return run_schedule(rank, world, "mixtral", waves=1)


def test_pieces_change_neither_events_nor_bytes(pool2: RankPool) -> None:
    for (found, sent, _), (expected, bytes_sent, _) in zip(
        pool2.run(run_schedule_in_pieces), pool2.run(run_schedule, "mixtral", 1), strict=True
    ):
        assert (found, sent) == (expected, bytes_sent)


def test_order_of_events_and_bytes(pool2: RankPool) -> None:
    for family in ("mixtral", "qwen3_moe"):
        for found, sent, inside in pool2.run(run_schedule, family):
            assert found == SCHEDULE
            tokens, layers, heads = 2 * 6, 2, 4 // 2 + 2 * 2 // 2 + 4 // 2  # q, k and v, results to the other rank
            assert sent == layers * tokens * heads * 8 * 4
            assert inside >= layers  # o_proj


def run_measured(rank: int, world: int) -> tuple[float, int, list[int], dict[str, float]]:
    """As on a device whose links are measured: the speed, the chunks of layers at it, and bytes that count."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fluid_hf.models.sequence_parallel.MEASURED", ("cpu",))
        errors = run_model(rank, world, "mixtral", 2)
        model = fluid_hf.patch_model(tiny_model("mixtral"), FluidConfig(ep_size=1, sp_size=world)).train()
        exchange, chunks = model.fluid.sequence_exchange, []
        shard = model.fluid.shard_batch(whole_batch(0, packed=False, mask="", length=12))
        model(**shard)
        speed, sent, layer = exchange.speed, exchange.bytes_sent, model.model.layers[0].self_attn.forward
        chunks.append(len(layer.context.plans))
        exchange.speed = 1e3
        model(**shard)
        chunks += layer.context.plans
        fluid_hf.unpatch_model(model)
    return speed, sent, chunks, errors


def test_the_speed_of_the_link_is_measured_once_and_agreed(pool2: RankPool) -> None:
    results = pool2.run(run_measured)
    check([errors for *_, errors in results])
    for speed, sent, chunks, _ in results:
        assert speed == results[0][0] and speed > 0
        assert chunks == [1, 1, 3], "one plan, of one chunk; a slow link is worth more of them"
        assert sent == 2 * 2 * 6 * (4 // 2 + 2 * 2 // 2 + 4 // 2) * 8 * 4, "what measures the link does not count"
