"""Rows sent before their counts are known: what goes when, and that results depend on none of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import RankPool, rank_pool
from families import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from fluid_hf import ExpertParallelExperts
from fluid_hf.comm.call_form import NUM_WORDS
from fluid_hf.comm.head_start import EarlyRows, HeadStart, message_bounds, needed_messages
from fluid_hf.errors import RoutingError
from fluid_hf.moe.layer import WaveChoice
from fluid_hf.moe.routing_plan import ROOM

pool2 = rank_pool(2)

E, H, INNER, K = 6, 8, 10, 2
TOKENS = [(9, 5), (9, 7), (0, 30), (40, 0), (40, 3), (0, 0), (3, 3), (100, 100), (100, 100)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 6))
def test_messages_cover_all_rows_once(rows: int, early: int, waves: int) -> None:
    messages = max(2, waves)
    bounds = [message_bounds(rows, early, index, messages) for index in range(messages)]
    assert [low for low, _ in bounds] == [0, *(high for _, high in bounds[:-1])]
    assert bounds[0][1] == early and bounds[-1][1] == max(rows, early)
    ends = [rows * (wave + 1) // waves for wave in range(waves)]
    needed = needed_messages(rows, early, messages, ends)
    assert needed == sorted(needed) and needed[-1] == messages
    for end, count in zip(ends, needed, strict=True):
        assert bounds[count - 1][1] >= end, "a wave waits for all of its rows"
        assert count == 1 or count == messages or bounds[count - 2][1] < end, "and for no message more"


def test_a_promise_is_the_first_wave_and_a_little() -> None:
    start = HeadStart()
    assert start.begin(2, 64) == EarlyRows(0, 0, 0)
    start.promise(2, 64, sent=640, received=65)
    assert start.begin(2, 64) == EarlyRows(330, 34, 69)
    assert start.begin(3, 64) == start.begin(2, 128) == EarlyRows(0, 0, 0), "others have promises of their own"
    assert start.padding(2, 64) == (0, 0) and start.padding(3, 64) == start.padding(2, 128) == (330 * 64, 34 * 64)
    start.promise(3, 64, sent=3, received=0)
    assert start.begin(2, 64) == EarlyRows(0, 0, 0) and start.padding(2, 64) == (64, 0), "only of the last call"
    start.forget()
    assert start.begin(2, 64) == EarlyRows(0, 0, 0)


def tokens_of(step: int, rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    tokens = TOKENS[step][rank]
    picks = [torch.randperm(E, generator=generator)[:K] for _ in range(tokens)]
    return {
        "x": torch.randn(tokens, H, generator=generator),
        "index": torch.stack(picks) if tokens else torch.zeros(0, K, dtype=torch.int64),
        "w": torch.rand(tokens, K, generator=generator),
        "dy": torch.randn(tokens, H, generator=generator),
    }


def one_rank() -> ExpertParallelExperts:
    torch.manual_seed(0)
    return ExpertParallelExperts(E, H, INNER)


def shared(full: ExpertParallelExperts, rank: int, waves: int) -> ExpertParallelExperts:
    layer = ExpertParallelExperts(E, H, INNER, group=dist.group.WORLD, waves=waves)
    held = slice(rank * E // 2, (rank + 1) * E // 2)
    layer.gate_up_proj.data = full.gate_up_proj.data[held].clone()
    layer.down_proj.data = full.down_proj.data[held].clone()
    return layer


def run(layer: ExpertParallelExperts, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    x, w = given["x"].clone().requires_grad_(), given["w"].clone().requires_grad_()
    layer.zero_grad()
    y = layer(x, given["index"], w)
    y.backward(given["dy"])
    return [y.detach(), *(t.grad.clone() for t in (x, w, layer.gate_up_proj, layer.down_proj))]  # type: ignore[union-attr]


def run_changing_tokens(rank: int, world: int, waves: int) -> list[str]:
    """What differs from one rank, and from a layer without promises, over calls with very different token counts."""
    full = one_rank()
    layer, wrong = shared(full, rank, waves), []
    for step in range(len(TOKENS)):
        parts = [tokens_of(step, other) for other in range(2)]
        expected = run(full, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        mine = slice(0, TOKENS[step][0]) if rank == 0 else slice(TOKENS[step][0], None)
        held = slice(rank * E // 2, (rank + 1) * E // 2)
        found = run(layer, parts[rank])
        for name, ours, theirs in zip("y dx dw gate_up down".split(), found, expected, strict=True):
            part = theirs[mine] if name in ("y", "dx", "dw") else theirs[held]
            if relative_error(ours, part) > 1e-5:
                wrong.append(f"step {step}: {name}")
        fresh = run(shared(full, rank, waves), parts[rank])
        if not all(torch.equal(a, b) for a, b in zip(found, fresh, strict=True)):
            wrong.append(f"step {step}: bits")
    return wrong


@pytest.mark.parametrize("waves", [1, 2, 3])
def test_results_do_not_depend_on_promises(pool2: RankPool, waves: int) -> None:
    assert pool2.run(run_changing_tokens, waves) == [[], []]


def run_watching(rank: int, world: int) -> list[int]:
    """Bytes of rows that were sent before the counts were read, in each of three calls."""
    layer = shared(one_rank(), rank, 2)
    exchange, early = layer.context.exchange, list[int]()
    read = exchange.read_counts
    count_bytes = (1 + ROOM + NUM_WORDS) * 4  # the peer's rows, pairs of the waves, and what must be equal, as int32

    def watch(*args: Any) -> Any:
        early.append(exchange.bytes_sent - before - count_bytes)
        return read(*args)

    exchange.read_counts = watch  # type: ignore[method-assign]
    given = tokens_of(7, rank)
    for _ in range(3):
        before = exchange.bytes_sent
        layer(given["x"], given["index"], given["w"])
    rows = sum(int((row // (E // 2) != rank).any()) for row in given["index"])
    stride = -(-(H * 4 + 8 + K * 4) // 16) * 16
    return [*early, (-(-rows // 2) + rows // 64) * stride]


def test_rows_leave_before_the_counts_are_known(pool2: RankPool) -> None:
    for first, second, third, expected in pool2.run(run_watching):
        assert first == 0 and second == third == expected > 0


def run_after_an_error(rank: int, world: int) -> bool:
    """A router gives something wrong on one rank; the next calls are right again, with other waves and types too."""
    full = one_rank()
    layer, given = shared(full, rank, 2), tokens_of(7, rank)
    run(layer, given)
    bad = copy.copy(given)
    if rank == 1:
        bad["w"] = given["w"].clone()
        bad["w"][0, 0] = float("nan")
    try:
        run(layer, bad)
        return False
    except RoutingError:
        pass
    expected = run(shared(full, rank, 2), given)
    found = run(layer, given)
    layer.wave_choice = WaveChoice(3)
    run(layer, tokens_of(6, rank))
    with torch.autocast("cpu", torch.bfloat16):
        layer(given["x"], given["index"], given["w"])
    layer.wave_choice = WaveChoice(2)
    again = run(layer, given)
    return all(
        torch.equal(a, b) and relative_error(c, b) < 1e-5 for a, b, c in zip(found, expected, again, strict=True)
    )


def test_after_an_error_nothing_is_promised(pool2: RankPool) -> None:
    assert pool2.run(run_after_an_error) == [True, True]
