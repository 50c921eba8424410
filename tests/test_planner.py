"""Number of waves chosen by the planner, and the cost model behind it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fluid_hf.comm.tournament import plan_waves
from fluid_hf.overlap.cost_model import (
    Hardware,
    LayerSizes,
    backward_seconds,
    expected_rows,
    forward_seconds,
    hardware_of,
)
from fluid_hf.overlap.planner import choose_waves, possible_waves

GPU = Hardware(flops=6.5e14, memory=2.8e12, link=44e9)
MIXTRAL = LayerSizes(8192, 2, 8, 8, 4096, 14336)
QWEN3 = LayerSizes(8192, 8, 128, 8, 2048, 768)


def test_one_rank_has_nothing_to_overlap() -> None:
    assert possible_waves(1) == [1]
    assert choose_waves(dataclasses.replace(QWEN3, ep_size=1), GPU, training=True) == 1


@pytest.mark.parametrize(("ranks", "waves"), [(2, [1, 2, 3, 4, 5, 6, 7, 8]), (4, [1, 2, 3, 6]), (3, [1, 2, 3, 6])])
def test_possible_waves_are_what_the_tournament_plans(ranks: int, waves: list[int]) -> None:
    assert possible_waves(ranks) == waves
    assert [len(plan_waves(0, ranks, count)[0]) for count in waves] == waves


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sizes", [MIXTRAL, QWEN3])
def test_several_waves_where_communication_is_long(sizes: LayerSizes, training: bool) -> None:
    assert choose_waves(sizes, GPU, training=training) > 1


@pytest.mark.parametrize("sizes", [dataclasses.replace(QWEN3, tokens=256), dataclasses.replace(QWEN3, tokens=0)])
def test_one_wave_where_launches_cost_more_than_they_hide(sizes: LayerSizes) -> None:
    assert choose_waves(sizes, GPU, training=True) == 1


def test_one_wave_on_a_fast_link() -> None:
    assert choose_waves(MIXTRAL, dataclasses.replace(GPU, link=1e15, latency=0.0), training=True) == 1


@pytest.mark.parametrize("sizes", [MIXTRAL, QWEN3])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_choice_is_near_the_fastest(sizes: LayerSizes, ranks: int) -> None:
    sizes = dataclasses.replace(sizes, ep_size=ranks)
    times = {w: forward_seconds(sizes, GPU, w) + backward_seconds(sizes, GPU, w) for w in possible_waves(ranks)}
    assert times[choose_waves(sizes, GPU, training=True)] <= 1.05 * min(times.values())


@pytest.mark.parametrize("waves", [1, 2, 4])
def test_predictions_keep_their_bounds(waves: int) -> None:
    """Never shorter than the arithmetic alone or the bytes alone; longer on a slower link."""
    for sizes in (MIXTRAL, QWEN3):
        gemm = 6 * sizes.pairs * sizes.hidden * sizes.inner / GPU.flops
        link = sizes.rows * sizes.hidden * 2 / GPU.link
        assert forward_seconds(sizes, GPU, waves) >= max(gemm, link)
        assert backward_seconds(sizes, GPU, waves) >= max(2 * gemm, link)
        slow = dataclasses.replace(GPU, link=GPU.link / 10)
        assert forward_seconds(sizes, slow, waves) > forward_seconds(sizes, GPU, waves)


def test_expected_rows() -> None:
    # 2 experts in 2 ranks, 1 per token: half of the tokens go away. All experts chosen: every token goes everywhere.
    assert expected_rows(10, 1, 2, 2) == 5
    assert expected_rows(10, 4, 4, 4) == 30


def test_hardware_of_a_cpu_needs_no_measurement() -> None:
    assert hardware_of(torch.device("cpu"), 0.0, 0.0).link > 0
