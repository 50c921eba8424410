"""Number of waves chosen by the planner."""

from __future__ import annotations

import inspect

import pytest

from fluid_hf.comm.tournament import num_rounds
from fluid_hf.overlap import planner
from fluid_hf.overlap.planner import choose_waves


@pytest.fixture(autouse=True)
def fixed_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule is tested, not the measured numbers."""
    monkeypatch.setattr(planner, "MIN_PAIRS_PER_EXPERT", 256)
    monkeypatch.setattr(planner, "MAX_WAVES", 4)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "ranks", "waves"),
    [
        (1024, 2, 8, 1, 1),  # nobody to exchange with
        (0, 2, 8, 4, 1),  # at least one wave
        (2047, 2, 8, 2, 1),  # 2047 * 2 * 1 / 8 = 511.75 pairs per local expert from elsewhere: one wave of 256
        (2048, 2, 8, 2, 1),  # 512, but two ranks have one round
        (1024, 2, 8, 4, 3),  # 1024 * 2 * 3 / 8 = 768: three
        (1023, 2, 8, 4, 2),  # 767.25: two
        (2**20, 2, 8, 4, 3),  # no more waves than the 3 rounds of 4 ranks
        (2**20, 2, 8, 3, 3),  # 3 ranks have 3 rounds too
        (2**20, 8, 128, 8, 4),  # 7 rounds, but never more than MAX_WAVES
        (4096, 8, 128, 8, 4),  # 4096 * 8 * 7 / 128 = 1792 = 7 * 256
        (2048, 8, 128, 8, 3),  # 896 = 3.5 * 256
        (1024, 1, 128, 8, 1),  # 56
    ],
)
def test_waves(tokens: int, top_k: int, experts: int, ranks: int, waves: int) -> None:
    assert choose_waves(expected_tokens=tokens, top_k=top_k, num_experts=experts, ep_size=ranks) == waves


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 16])
def test_more_tokens_never_mean_fewer_waves(ranks: int) -> None:
    waves = [choose_waves(expected_tokens=n, top_k=4, num_experts=48, ep_size=ranks) for n in range(0, 20000, 97)]
    assert waves == sorted(waves)
    assert waves[0] == 1 and waves[-1] == min(4, num_rounds(ranks))


def test_arguments_are_named() -> None:
    kinds = {parameter.kind for parameter in inspect.signature(choose_waves).parameters.values()}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}
