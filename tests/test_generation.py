"""`generate` of patched models with options that a rank which goes on after its end runs out of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import RankPool, rank_pool
from families import batch, tiny_model
from transformers import GenerationConfig, StaticCache

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
