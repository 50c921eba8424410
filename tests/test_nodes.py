"""Several nodes: where groups lie, what `doctor` tells apart, and folders that not all ranks see."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trainer_script
from distributed import LAUNCH_ENV, ROOT, free_port, fresh_ranks
from families import tiny_model

import fluid_hf
from fluid_hf.commands.doctor_ranks import RankInfo, judge_ranks
from fluid_hf.control import ControlGroup
from fluid_hf.integrations import shared_folder
from fluid_hf.process_groups import crossing_groups, resolve_ep_size, tell_crossing_groups

TWO_OF_TWO = ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("hosts", "experts", "resolved"),
    [
        (["a"] * 8, 64, 8),
        (["a"] * 8 + ["b"] * 8, 64, 8),
        (["a"] * 6 + ["b"] * 6, 4, 2),  # of 4 ranks, the second group would be 4, 5 | 6, 7
        (["a", "b"] * 2, 8, 4),  # no two neighbours share a node
        (["a", "b", "c", "d"], 8, 4),  # one rank a node
        (["a"] * 4 + ["b"] * 4, 7, 1),
    ],
)
def test_groups_stay_inside_a_node_unless_asked(hosts: list[str], experts: int, resolved: int) -> None:
    assert resolve_ep_size(None, len(hosts), experts, hosts) == resolved
    assert resolve_ep_size(1, len(hosts), experts, hosts) == 1


def test_groups_that_cross(caplog: pytest.LogCaptureFixture) -> None:
    assert crossing_groups(TWO_OF_TWO, 2) == [] and crossing_groups(TWO_OF_TWO, 4) == [[0, 1, 2, 3]]
    assert crossing_groups(["a"] * 3 + ["b"] * 3, 2) == [[2, 3]]
    assert crossing_groups(["one process that plays all"], 8) == []
    with caplog.at_level(logging.WARNING):
        tell_crossing_groups(TWO_OF_TWO, ep_size=2, sp_size=2)
        tell_crossing_groups(TWO_OF_TWO, ep_size=4, sp_size=1)  # larger than a node: it is what was asked for
        assert not caplog.records
        tell_crossing_groups(["a"] * 3 + ["b"] * 3, ep_size=2, sp_size=1)
    assert "ep_size (2): ranks 2, 3 are on several nodes" in caplog.text


def test_doctor_says_which_sizes_stay_inside_a_node() -> None:
    found = {finding.name: finding.value for finding in judge_ranks([RankInfo(host) for host in TWO_OF_TWO])}
    assert found["ranks"] == "4 on 2 node(s): 2 + 2" and found["ep_size"] == "1 or 2 keeps rows inside a node"
    assert "ep_size" not in {finding.name for finding in judge_ranks([RankInfo("a")] * 2)}


def test_doctor_under_two_launchers(tmp_path: Path) -> None:
    """Two agents of torchrun with folders of their own."""
    port, agents = str(free_port()), []
    environment = {**os.environ, **LAUNCH_ENV, "PYTHONPATH": str(ROOT)}
    for node in range(2):
        folder = tmp_path / f"node{node}"
        folder.mkdir()
        command = [str(Path(sys.executable).parent / "torchrun"), "--nnodes", "2", "--node_rank", str(node)]
        command += ["--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", port]
        command += [str(ROOT / "tests" / "nodes_script.py")]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        agents.append(subprocess.Popen(command, cwd=folder, env=environment, **pipes))
    try:
        printed = [agent.communicate(timeout=120)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], printed
    assert "2 on 2 node(s): 1 + 1" in printed[0] and "between nodes" in printed[0]
    assert "right on 2 ranks" in printed[0] and "node(s)" not in printed[1]
    (link,) = json.loads((tmp_path / "node0" / "doctor.json").read_text())["links"]
    assert link["name"] == "between nodes" and link["data"][0][:2] == [0, 1]
    assert not list((tmp_path / "node1").iterdir())


def on_node(rank: int, world: int, function: Any, *args: Any) -> Any:
    """A rank's call, with two ranks a node and a clock that does not wait."""
    with (
        mock.patch.object(socket, "gethostname", lambda: f"node{rank // 2}"),
        mock.patch.object(shared_folder, "PATIENCE_SECONDS", 0.0),
    ):
        return function(rank, world, *args)


def default_size(rank: int, world: int) -> int | None:
    model: Any = fluid_hf.patch_model(tiny_model("qwen3_moe"))
    found: int | None = model.fluid.config.ep_size
    fluid_hf.unpatch_model(model)
    return found


def look(rank: int, world: int, check: str, folder: str) -> str:
    """The error of a check when ranks 2 and 3 have another disk."""
    control = ControlGroup(30.0)
    path = Path(folder) / f"node{rank // 2}"
    try:
        getattr(shared_folder, check)(path, control, "a test")
    except fluid_hf.CheckpointError as error:
        return str(error)
    finally:
        control.close()
    return ""


def train_on_own_disk(rank: int, world: int, folder: str, runs: list[dict[str, Any]]) -> None:
    own = Path(folder) / f"node{rank // 2}"
    own.mkdir(exist_ok=True)
    runs = [{**run, "output": str(own / run["output"])} for run in runs]
    runs = [{**run, "resume": str(own / run["resume"])} if "resume" in run else run for run in runs]
    trainer_script.run_all(rank, world, runs, folder)


def test_nodes_with_disks_of_their_own(tmp_path: Path) -> None:
    base = {"fluid": {"ep_size": 2}, "steps": 2, "save_steps": 1}
    kept = {**base, "stage": 3, "save_on_each_node": True, "output": "kept"}
    runs = [
        {**base, "name": "shared", "stage": 1, "output": "shared"},
        {**kept, "name": "low", "stage": 2},
        {**kept, "name": "whole"},
        {**kept, "name": "resumed", "resume": "kept/checkpoint-1"},
    ]
    (tmp_path / "node0").mkdir()
    with fresh_ranks(4, nodes=2) as ranks:
        ranks.run(on_node, train_on_own_disk, str(tmp_path), runs, timeout=280)
        assert ranks.run(on_node, default_size) == [2] * 4
        blind = ranks.run(on_node, look, "check_shared", str(tmp_path / "a"))
        missing = ranks.run(on_node, look, "check_found_alike", str(tmp_path / "a"))
        (tmp_path / "file").touch()
        unwritable = ranks.run(on_node, look, "check_shared", str(tmp_path / "file"))
    found = {
        run["name"]: [json.loads((tmp_path / f"{run['name']}-{rank}.json").read_text()) for rank in range(4)]
        for run in runs
    }
    assert {result["error"] for name in ("shared", "low") for result in found[name]} == {"CheckpointError"}
    assert all("rank 2, 3 did not see" in result["message"] for result in found["shared"])
    assert all("zero_optimization.stage (2) must be 3" in result["message"] for result in found["low"])
    whole, resumed = (
        [entry["loss"] for entry in found[name][0]["history"] if "loss" in entry] for name in ("whole", "resumed")
    )
    assert resumed == pytest.approx(whole, rel=1e-5) and len(whole) == 2
    assert not list(tmp_path.rglob("*.marker"))
    assert all("rank 2, 3 did not see" in text for text in blind)
    assert all("rank 2, 3 did not find" in text for text in missing)
    assert all("must be one that rank 0 can write" in text for text in unwritable)
