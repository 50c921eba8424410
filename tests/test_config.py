"""Settings, rank arithmetic, the planner, and the weight gradient scheduler on its own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fluid_hf import ConfigError, FluidConfig, WgradPendingError
from fluid_hf.overlap.planner import choose_waves
from fluid_hf.overlap.wgrad import WgradScheduler, WgradWork, wgrad_token
from fluid_hf.process_groups import expert_data_parallel_ranks, expert_parallel_ranks, resolve_ep_size


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ep_size": 0}, r"ep_size \(0\)"),
        ({"ep_size": "2"}, r"ep_size \('2'\)"),
        ({"ep_size": True}, r"ep_size \(True\)"),
        ({"waves": -1}, r"waves \(-1\)"),
        ({"sp_size": 2}, r"sp_size \(2\) must be 1"),
        ({"overlap": 1}, r"overlap \(1\)"),
        ({"recompute": None}, r"recompute \(None\)"),
        ({"wgrad": "late"}, r"wgrad \('late'\) must be one of 'off', 'layer'"),
        ({"waves": 2, "overlap": False}, r"waves \(2\) needs overlap"),
        ({"ep_sise": 2}, r"unknown key 'ep_sise'.*did you mean 'ep_size'"),
        ({"wave": 2}, r"unknown key 'wave'.*did you mean 'waves'"),
    ],
)
def test_bad_values_name_the_field_and_the_value(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FluidConfig.from_dict(values)


def test_round_trips(tmp_path: Path) -> None:
    config = FluidConfig(ep_size=4, wgrad="off", waves=3, recompute=True)
    assert FluidConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, "fluid": {"ep_size": 2}}))
    assert FluidConfig.from_json(path) == FluidConfig(ep_size=2)
    path.write_text("{}")
    assert FluidConfig.from_json(path) == FluidConfig()
    with pytest.raises(ConfigError, match="must be a JSON object"):
        FluidConfig.from_dict([("ep_size", 2)])  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.ep_size = 2  # type: ignore[misc]


def test_ep_size() -> None:
    assert resolve_ep_size(None, 8, 12) == 4 and resolve_ep_size(None, 1, 60) == 1 and resolve_ep_size(2, 4, 8) == 2
    with pytest.raises(
        ConfigError, match=r"num_experts \(60\) must be divisible by ep_size \(8\); use ep_size 1 or 2 or 4"
    ):
        resolve_ep_size(8, 8, 60)
    with pytest.raises(ConfigError, match=r"world size \(4\) must be divisible by ep_size \(3\)"):
        resolve_ep_size(3, 4, 6)


def test_ranks_of_groups() -> None:
    assert expert_parallel_ranks(4, 2) == [[0, 1], [2, 3]]
    assert expert_data_parallel_ranks(4, 2) == [[0, 2], [1, 3]]


def test_planner() -> None:
    few = choose_waves(expected_tokens=64, top_k=2, num_experts=8, ep_size=2)
    many = choose_waves(expected_tokens=65536, top_k=8, num_experts=64, ep_size=8)
    assert few == 1 and many > 1
    assert choose_waves(expected_tokens=10**6, top_k=8, num_experts=8, ep_size=1) == 1
    tokens = [choose_waves(expected_tokens=n, top_k=2, num_experts=8, ep_size=4) for n in range(0, 9000, 500)]
    assert tokens == sorted(tokens)


def backward(scheduler: WgradScheduler, in_window: bool = True) -> list[torch.Tensor]:
    """A parameter whose gradient 2 comes through a token; returns what a post-accumulate hook saw."""
    parameter = torch.nn.Parameter(torch.ones(3))
    seen: list[torch.Tensor] = []
    parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    work = WgradWork({"w": lambda: torch.full((3,), 2.0)}, 12, lambda: in_window)
    token = wgrad_token(parameter, lambda: scheduler.take(work, "w"))
    scheduler.add(work)
    token.sum().backward()
    return seen


@pytest.mark.parametrize("policy", ["layer", "off"])
@pytest.mark.parametrize("enabled", [True, False])
def test_gradient_is_complete_when_backward_returns(policy: str, enabled: bool) -> None:
    scheduler = WgradScheduler(policy)
    scheduler.enable() if enabled else scheduler.disable()
    (seen,) = backward(scheduler)
    assert seen.tolist() == [2.0] * 3
    assert scheduler.held_bytes == 0
    stats = scheduler.finish_batch()
    assert (stats.inside, stats.outside, stats.peak_bytes) == (1, 0, 12)


def test_statistics_and_two_schedulers() -> None:
    first, second = WgradScheduler("layer"), WgradScheduler("layer")
    backward(first, in_window=False)
    backward(second)
    backward(second)
    assert first.finish_batch().outside == 1
    stats = second.finish_batch()
    assert (stats.inside, stats.share_inside) == (2, 1.0)
    assert second.finish_batch().inside == 0


def test_pending_weight_gradients_raise() -> None:
    scheduler = WgradScheduler("layer")
    scheduler.add(WgradWork({"w": lambda: torch.zeros(1)}, 4, lambda: True))
    with pytest.raises(WgradPendingError, match=r"pending \(1\) must be 0"):
        scheduler.finish_batch()
    assert scheduler.finish_batch().peak_bytes == 0
