"""`generate` of patched models with options that a rank which goes on after its end runs out of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import RankPool, rank_pool
from families import batch, tiny_model
from transformers import GenerationConfig, StaticCache
from transformers.generation import BaseStreamer

import fluid_hf
from fluid_hf import FluidConfig

pool2 = rank_pool(2)

PLAIN = {"do_sample": False, "pad_token_id": 0}


def patched(family: str, **settings: Any) -> Any:
    return fluid_hf.patch_model(tiny_model(family, **settings).eval(), FluidConfig(ep_size=2, timeout_seconds=20))


def run_assisted(rank: int, world: int, split: bool, tokens: list[int]) -> bool:
    """Rank 0's assistant drafts what the model says itself, and so ends in fewer steps."""
    model, whole = patched("qwen3_moe"), tiny_model("qwen3_moe").eval()
    if split:
        assistant = patched("mixtral", seed=3)
    else:
        assistant = tiny_model("qwen3_moe").eval() if rank == 0 else tiny_model("mixtral", seed=3).eval()
    prompt = batch(rank, 1, length=5 + 3 * rank)
    said = model.generate(prompt, assistant_model=assistant, max_new_tokens=tokens[rank], **PLAIN)
    expected = whole.generate(prompt, max_new_tokens=tokens[rank], **PLAIN)
    return torch.equal(said, expected)


@pytest.mark.parametrize(("split", "tokens"), [(False, [12, 12]), (False, [4, 12]), (True, [4, 12]), (True, [12, 4])])
def test_a_rank_that_has_finished_keeps_drafting(pool2: RankPool, split: bool, tokens: list[int]) -> None:
    assert pool2.run(run_assisted, split, tokens, timeout=120) == [True, True]


def options(way: str, rank: int, model: Any, prompt: torch.Tensor, tokens: int) -> dict[str, Any]:
    """Keyword arguments of `generate` with the option given in a way of its own."""
    room = prompt.shape[1] + tokens
    return {
        "keyword": lambda: {"cache_implementation": "static", "max_new_tokens": tokens},
        "length": lambda: {"cache_implementation": "static", "max_length": room},
        "cache": lambda: {"past_key_values": StaticCache(config=model.config, max_cache_len=room), "max_length": room},
        "config": lambda: {
            "generation_config": GenerationConfig(cache_implementation="static", max_new_tokens=tokens, **PLAIN)
        },
        "one rank": lambda: {"max_new_tokens": tokens} | ({} if rank else {"cache_implementation": "static"}),
        "roomy": lambda: {
            "past_key_values": StaticCache(config=model.config, max_cache_len=40),
            "max_new_tokens": tokens,
        },
        "chunks": lambda: {"prefill_chunk_size": 3, "max_new_tokens": tokens},
        "chunks of one rank": lambda: {"max_new_tokens": tokens} | ({"prefill_chunk_size": 3} if rank else {}),
    }[way]()


def run_option(rank: int, world: int, way: str, tokens: list[int], lengths: list[int]) -> bool:
    model, whole = patched("qwen3_moe"), tiny_model("qwen3_moe").eval()
    prompt = batch(rank, 1, length=lengths[rank])
    given = options(way, rank, model, prompt, tokens[rank])
    said = model.generate(prompt, **given, **({} if way == "config" else PLAIN))
    return torch.equal(said, whole.generate(prompt, max_new_tokens=tokens[rank], **PLAIN))


@pytest.mark.parametrize("way", ["keyword", "length", "cache", "config", "one rank"])
def test_a_static_cache_with_too_little_room_is_refused(pool2: RankPool, way: str) -> None:
    for message in pool2.expect("ConfigError", run_option, way, [4, 9], [5, 8], timeout=60):
        room = 5 if way == "cache" else 4  # one's own may keep the last token's place, which it needs not
        assert f"static cache of rank 0 (room for {room} new tokens) must hold the steps of all ranks (9)" in message


@pytest.mark.parametrize("way", ["keyword", "cache"])
def test_a_static_cache_with_equal_steps(pool2: RankPool, way: str) -> None:
    assert pool2.run(run_option, way, [6, 6], [5, 8]) == [True, True]


def test_a_static_cache_with_room_for_other_ranks(pool2: RankPool) -> None:
    assert pool2.run(run_option, "roomy", [4, 9], [5, 8]) == [True, True]


@pytest.mark.parametrize("way", ["chunks", "chunks of one rank"])
def test_prompts_in_unlike_numbers_of_chunks_are_refused(pool2: RankPool, way: str) -> None:
    for message in pool2.expect("ConfigError", run_option, way, [4, 4], [5, 8], timeout=60):
        assert "prefill_chunk_size must give all ranks equally many chunks, but rank 0 has" in message


def test_prompts_in_equally_many_chunks(pool2: RankPool) -> None:
    assert pool2.run(run_option, "chunks", [4, 9], [7, 8]) == [True, True]


def run_alone(rank: int, world: int) -> None:
    model = patched("qwen3_moe")
    model.fluid.control.wait_at_most(2)
    try:
        if rank == 0:
            model.generate(batch(0, 1), max_new_tokens=2, **PLAIN)
    finally:
        torch.distributed.barrier()


def test_generate_on_one_rank_only(pool2: RankPool) -> None:
    with pytest.raises(AssertionError, match="generate of a patched model must be called on all 2 ranks"):
        pool2.run(run_alone, timeout=60)


def ended(kind: str, model: Any, rank: int) -> list[torch.Tensor]:
    """What a rank that ends early says, streams and keeps, and what it says in the next turn."""
    streamed: list[torch.Tensor] = []

    class Streamer(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            streamed.append(value.flatten())

        def end(self) -> None:
            pass

    prompt = batch(rank, 1, length=5 + 3 * rank)
    way: dict[str, Any] = {
        "sample": lambda: {"streamer": Streamer()},
        "static": lambda: {"past_key_values": StaticCache(config=model.config, max_cache_len=60)},
        "beams": lambda: {"num_beams": 2},
        "lookup": lambda: {"prompt_lookup_num_tokens": 2, "streamer": Streamer()},
        "early exit": lambda: {"assistant_early_exit": 1},
        "guided": lambda: {"guidance_scale": 1.5},
    }[kind]()
    end = {} if rank else {"eos_token_id": END}
    said = model.generate(prompt, max_new_tokens=12, return_dict_in_generate=True, **way, **end, **PLAIN)
    cache, found = said.past_key_values, [said.sequences, torch.cat([torch.tensor([0]), *streamed])]
    found.append(torch.as_tensor(cache.get_seq_length()).clone())
    if kind != "beams":  # which keeps two
        turn = torch.cat([said.sequences, batch(7, 1, length=3)], 1)
        found.append(model.generate(turn, past_key_values=cache, max_new_tokens=4, **PLAIN))
    return found


END = list(range(3, 40))  # a token among them comes early


def run_ended(rank: int, world: int, kind: str) -> tuple[int, bool]:
    found, wanted = (ended(kind, model, rank) for model in (patched("qwen3_moe"), tiny_model("qwen3_moe").eval()))
    same = len(found) == len(wanted) and all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    return wanted[0].shape[1] - 5 - 3 * rank, same


@pytest.mark.parametrize("kind", ["sample", "static", "beams", "lookup", "early exit", "guided"])
def test_a_rank_that_has_finished_keeps_no_token_of_the_steps_of_others(pool2: RankPool, kind: str) -> None:
    (early, same), other = pool2.run(run_ended, kind, timeout=120)
    assert early < 10 and other[0] == 12
    assert same and other[1]


def run_guided_alone(rank: int, world: int) -> None:
    patched("qwen3_moe").generate(batch(0, 1), guidance_scale=1.5 if rank else None, max_new_tokens=2, **PLAIN)


def test_guidance_on_some_ranks_is_refused(pool2: RankPool) -> None:
    for message in pool2.expect("ConfigError", run_guided_alone, timeout=60):
        assert "but rank 0 runs it 1 and rank 1 2 times" in message


def run_continuous(rank: int, world: int) -> None:
    model = patched("qwen3_moe")
    try:
        model.init_continuous_batching(GenerationConfig(max_new_tokens=2, **PLAIN))  # as generate_batch does
    finally:
        fluid_hf.unpatch_model(model)
        assert "init_continuous_batching" not in vars(model)


def test_continuous_batching_is_refused(pool2: RankPool) -> None:
    for message in pool2.expect("ConfigError", run_continuous, timeout=60):
        assert "continuous batching (generate_batch" in message
