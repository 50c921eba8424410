"""Settings and their messages, and the arithmetic of ranks and groups."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fluid_hf import ExpertParallelExperts
from fluid_hf.config import FluidConfig
from fluid_hf.errors import ConfigError
from fluid_hf.overlap.wgrad import WgradScheduler
from fluid_hf.process_groups import (
    ParallelGroups,
    create_groups,
    expert_data_parallel_ranks,
    expert_parallel_ranks,
    resolve_ep_size,
)

FIELDS = ["ep_size", "sp_size", "overlap", "wgrad", "waves", "recompute", "nccl_max_ctas", "timeout_seconds"]
CHANGED: dict[str, Any] = {"ep_size": 4, "overlap": True, "wgrad": "off", "waves": 3, "recompute": True}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ep_size": 0}, r"^ep_size \(0\) must be a positive integer"),
        ({"ep_size": -2}, r"^ep_size \(-2\) must be a positive integer"),
        ({"ep_size": 2.0}, r"^ep_size \(2\.0\) must be a positive integer"),
        ({"ep_size": "2"}, r"^ep_size \('2'\) must be a positive integer"),
        ({"ep_size": True}, r"^ep_size \(True\) must be a positive integer"),
        ({"nccl_max_ctas": 0}, r"^nccl_max_ctas \(0\) must be a positive integer"),
        ({"waves": 0}, r"^waves \(0\) must be a positive integer"),
        ({"waves": "auto"}, r"^waves \('auto'\) must be a positive integer"),
        ({"waves": False}, r"^waves \(False\) must be a positive integer"),
        ({"sp_size": 0}, r"^sp_size \(0\) must be a positive integer"),
        ({"sp_size": True}, r"^sp_size \(True\) must be a positive integer"),
        ({"sp_size": "2"}, r"^sp_size \('2'\) must be a positive integer"),
        ({"overlap": 1}, r"^overlap \(1\) must be true or false"),
        ({"overlap": None}, r"^overlap \(None\) must be true or false"),
        ({"recompute": "true"}, r"^recompute \('true'\) must be true or false"),
        ({"recompute": 0}, r"^recompute \(0\) must be true or false"),
        ({"wgrad": "late"}, r"^wgrad \('late'\) must be one of 'off', 'layer'"),
        ({"wgrad": False}, r"^wgrad \(False\) must be one of"),
        ({"wgrad": None}, r"^wgrad \(None\) must be one of"),
        ({"waves": 2, "overlap": False}, r"^waves \(2\) needs overlap \(false\) to be true; leave waves out or set"),
    ],
)
def test_bad_values_name_the_field_and_the_value(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FluidConfig(**values)
    with pytest.raises(ValueError, match=message):  # a ConfigError is a ValueError too
        FluidConfig.from_dict(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"waves": 0}, r"^waves \(0\) must be a positive integer"),
        ({"waves": -1}, r"^waves \(-1\) must be a positive integer"),
        ({"waves": 2.0}, r"^waves \(2\.0\) must be a positive integer"),
        ({"waves": 2, "overlap": False}, r"^waves \(2\) needs overlap \(false\) to be true"),
        ({"recompute": 1}, r"^recompute \(1\) must be true or false"),
        ({"num_experts": 0}, r"^num_experts \(0\) must be a positive integer\."),
        ({"hidden_size": 8.0}, r"^hidden_size \(8\.0\) must be a positive integer\."),
        ({"intermediate_size": -6}, r"^intermediate_size \(-6\) must be a positive integer\."),
        ({"act": "silu"}, r"^act \('silu'\) must be a function of a tensor"),
        ({"group": torch.distributed.GroupMember.NON_GROUP_MEMBER}, r"^group \(.*\) must be a process group that this"),
    ],
)
def test_arguments_of_the_plain_module_are_checked_alike(values: dict[str, Any], message: str) -> None:
    sizes = {"num_experts": 4, "hidden_size": 8, "intermediate_size": 6}
    with pytest.raises(ConfigError, match=message):
        ExpertParallelExperts(**{**sizes, **values})
    with pytest.raises(ConfigError, match=r"^wgrad \('late'\) must be one of 'off', 'layer'"):
        WgradScheduler("late")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("ep_sise", "ep_size"), ("sp", "sp_size"), ("wave", "waves"), ("over_lap", "overlap"), ("Wgrad", "wgrad")],
)
def test_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key '{key}' .*did you mean '{nearest}'") as caught:
        FluidConfig.from_dict({"ep_size": 2, key: 1})
    assert all(field in str(caught.value).partition("Valid:")[2] for field in FIELDS)


@pytest.mark.parametrize("block", [None, 3, "ep_size", [["ep_size", 2]]])
def test_block_that_is_no_object(block: Any, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"fluid": block}))
    for build in (lambda: FluidConfig.from_dict(block), lambda: FluidConfig.from_json(path)):
        with pytest.raises(ConfigError, match="must be a JSON object with keys ep_size"):
            build()


def test_defaults() -> None:
    assert [field.name for field in dataclasses.fields(FluidConfig)] == FIELDS
    assert FluidConfig().to_dict() == {
        "ep_size": None,
        "sp_size": None,
        "overlap": True,
        "wgrad": "layer",
        "waves": None,
        "recompute": False,
        "nccl_max_ctas": None,
        "timeout_seconds": 600.0,
    }
    assert FluidConfig.from_dict({}) == FluidConfig()


@pytest.mark.parametrize("values", [{}, CHANGED, {"overlap": False}, {"ep_size": 1, "sp_size": 1}])
def test_round_trip(values: dict[str, Any], tmp_path: Path) -> None:
    config = FluidConfig(**values)
    block = json.loads(json.dumps(config.to_dict()))
    assert FluidConfig.from_dict(block) == config
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, "fluid": block}))
    assert FluidConfig.from_json(path) == FluidConfig.from_json(str(path)) == config
    assert {name: block[name] for name in values} == values


def test_json_without_the_block(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"train_batch_size": 8}')
    assert FluidConfig.from_json(path) == FluidConfig()


def test_frozen_and_keyword_only() -> None:
    config = FluidConfig(ep_size=4)
    for name in FIELDS:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, name, 2)
    assert config == FluidConfig(ep_size=4) and hash(config) == hash(FluidConfig(ep_size=4))
    with pytest.raises(TypeError, match="positional"):
        FluidConfig(4)  # type: ignore[misc]
    with pytest.raises(ConfigError, match=r"ep_size \(0\)"):
        dataclasses.replace(config, ep_size=0)


@pytest.mark.parametrize(
    ("asked", "world", "experts", "resolved"),
    [(None, 1, 60, 1), (None, 8, 12, 4), (None, 6, 4, 2), (None, 4, 7, 1), (2, 4, 8, 2), (1, 8, 7, 1), (8, 8, 64, 8)],
)
def test_ep_size(asked: int | None, world: int, experts: int, resolved: int) -> None:
    assert resolve_ep_size(asked, world, experts) == resolved


@pytest.mark.parametrize(
    ("asked", "world", "experts", "message"),
    [
        # Divisors of both: of 4 and 8, of 8 and 60, of 2 and 8, of 6 and 9.
        (3, 4, 8, r"^world size \(4\) must be divisible by ep_size \(3\); use ep_size 1 or 2 or 4\.$"),
        (8, 8, 60, r"^num_experts \(60\) must be divisible by ep_size \(8\); use ep_size 1 or 2 or 4\.$"),
        (4, 2, 8, r"^world size \(2\) must be divisible by ep_size \(4\); use ep_size 1 or 2\.$"),
        (2, 6, 9, r"^num_experts \(9\) must be divisible by ep_size \(2\); use ep_size 1 or 3\.$"),
    ],
)
def test_ep_size_that_does_not_fit(asked: int, world: int, experts: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_ep_size(asked, world, experts)


def test_ranks_of_groups() -> None:
    assert expert_parallel_ranks(4, 2) == [[0, 1], [2, 3]]
    assert expert_data_parallel_ranks(4, 2) == [[0, 2], [1, 3]]
    assert expert_parallel_ranks(6, 3) == [[0, 1, 2], [3, 4, 5]]
    assert expert_data_parallel_ranks(6, 3) == [[0, 3], [1, 4], [2, 5]]
    assert expert_parallel_ranks(4, 4) == expert_data_parallel_ranks(4, 1) == [[0, 1, 2, 3]]
    assert expert_parallel_ranks(4, 1) == expert_data_parallel_ranks(4, 4) == [[0], [1], [2], [3]]


def test_groups_without_torch_distributed() -> None:
    assert create_groups(1) == ParallelGroups(1, 0, None, None, 1)
    with pytest.raises(ConfigError, match=r"ep_size \(2\) needs torch.distributed.*use ep_size 1"):
        create_groups(2)


@pytest.mark.parametrize(("text", "reason"), [(None, "No such file"), ('{"fluid": ', "Expecting value")])
def test_json_that_cannot_be_read(text: str | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=rf"DeepSpeed configuration \(.*ds.json\) must be a JSON file .*{reason}"):
        FluidConfig.from_json(path)
