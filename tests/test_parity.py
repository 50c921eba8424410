"""Pairs of settings against one process, and the tool that compares them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
import time
from pathlib import Path
from typing import Any

import parity
import pytest
import torch
from distributed import ROOT, RankPool, run_script

import fluid_hf.bench.parity as bench_parity
from fluid_hf.bench.parity import CellResult, _deviation, markdown_summary, run
from fluid_hf.bench.parity_cells import FACTORS, Cell, all_cells, covering_cells, impossible, refused
from fluid_hf.bench.parity_train import train_plain
from fluid_hf.errors import PeerError

SCRIPT = ROOT / "tests" / "parity.py"


def run_matrix(folder: Path, world: int, *options: str) -> list[CellResult]:
    path = folder / "cells.json"
    run_script(SCRIPT, *options, "--json", str(path), nproc=world)
    return parity.read_results(path)


def check(results: list[CellResult]) -> None:
    bad = [f"{result.status}: {result.cell.name}\n    {result.detail}" for result in results if not result.good]
    assert not bad, "\n".join(bad)
    for result in results:
        assert (result.status == "refused") == refused(dataclasses.asdict(result.cell)), result


def test_every_pair_of_settings_on_two_ranks(tmp_path: Path) -> None:
    results = run_matrix(tmp_path, 2, "--fixed", "compiled=False")
    check(results)
    wanted = covering_cells(2, fixed={"compiled": False})
    assert [result.cell for result in results] == wanted
    assert sum(result.status == "equal" for result in results) >= 0.7 * len(wanted)
    assert all("ConfigError" in result.detail for result in results if result.status == "refused")


def test_every_setting_on_four_ranks(tmp_path: Path) -> None:
    results = run_matrix(tmp_path, 4, "--strength", "1", "--fixed", "compiled=False", "ep_size=4")
    check(results)
    assert {result.cell.ep_size for result in results} == {4}


def test_compiled_model(tmp_path: Path) -> None:
    results = run_matrix(tmp_path, 2, "--cell", "family=qwen3_moe", "ep_size=2", "engine=zero2", "compiled=True")
    check(results)
    assert [result.status for result in results] == ["equal"]


def test_one_process_without_a_launcher() -> None:
    seen: list[CellResult] = []
    cells = [Cell(family="qwen2_moe", aux_loss=True), Cell(trained="no_down", recompute=True)]
    results = run(cells, report=seen.append)
    assert seen == results
    check(results)
    assert "| family | qwen2_moe | 1 | 0 | 0 | 0 | 0 |" in markdown_summary(results)


def run_cell_with_a_stuck_rank(rank: int, world: int) -> str:
    """Rank 1 raises, and rank 0 stays in a collective that rank 1 does not enter."""

    def train(*of: Any, **settings: Any) -> None:
        if rank == 1:
            raise ValueError("no such device")
        time.sleep(4)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(PeerError) as caught:
        patch.setattr(bench_parity, "train_patched", train)
        run([Cell()], timeout_seconds=1.0)
    return str(caught.value)


def test_a_rank_that_does_not_end_a_cell_is_named() -> None:
    with contextlib.closing(RankPool(2)) as pool:
        message = pool.run(run_cell_with_a_stuck_rank)[1]
    assert "rank 0 did not take part in the training of family=mixtral" in message
    assert "this rank raised ValueError: no such device" in message


@pytest.mark.parametrize("damage", ["loss", "norm", "weight", "missing", "nan"])
def test_deviations_are_seen(damage: str) -> None:
    exact = train_plain(Cell(), torch.device("cpu"), 1, exact=True)
    found = copy.deepcopy(exact)
    assert _deviation(found, exact, {})[0] == 0
    name = "model.layers.0.mlp.experts.down_proj"
    if damage == "loss":
        found.losses[1] *= 1 + 2e-5
    elif damage == "norm":
        found.norms[0] *= 1 + 2e-5
    elif damage == "weight":  # a gradient that is off by 1e-4
        found.after[name] += 1e-4 * (found.after[name] - found.before[name])
    elif damage == "missing":
        del found.after[name]
    else:
        found.losses[0] = math.nan
    worst, place = _deviation(found, exact, {})
    assert worst > 1, place


def test_covering_cells_hold_every_possible_pair() -> None:
    cells = covering_cells(2, seed=3)
    assert len(cells) < 60
    for one, other in itertools.combinations(FACTORS, 2):
        held = {(getattr(cell, one), getattr(cell, other)) for cell in cells}
        for pair in itertools.product(FACTORS[one], FACTORS[other]):
            possible = impossible({one: pair[0], other: pair[1]}, 2) is None
            if possible:
                assert pair in held or _contradictory(one, other, pair), (one, other, pair)


def _contradictory(one: str, other: str, pair: tuple[object, object]) -> bool:
    """Pairs that no whole cell can hold: each side asks for another value of a third setting."""
    return not any(
        getattr(cell, one) == pair[0] and getattr(cell, other) == pair[1]
        for cell in itertools.islice(all_cells(2, fixed={one: pair[0], other: pair[1]}), 1)
    )


def test_impossible_combinations() -> None:
    assert "noise" in str(impossible({"jitter": True, "sp_size": 2}, 2))
    assert "ZeRO" in str(impossible({"offload": "cpu", "engine": "torch"}, 2))
    assert "Mixtral" in str(impossible({"jitter": True, "family": "qwen3_moe"}, 2))
    assert impossible({"dtype": "float16", "engine": "zero1"}, 2) is None
    assert impossible({"ep_size": 4}, 2) is not None
    assert impossible({"sp_size": 2}, 1) is not None
