"""`fluid-hf bench table`: which files it prints and draws, and what it says of the others."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fluid_hf import cli
from fluid_hf.bench.model import ModelSlice
from fluid_hf.bench.model_run import RunSettings, SliceRun
from fluid_hf.bench.stages import Stages

RESULTS = Path(__file__).resolve().parent.parent / "examples/benchmarks/results"
TRACED = RESULTS / "2026-11-30_model_2xh200_nvlink.json"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_published_file_is_a_table_or_named(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(path.read_text(encoding="utf-8"))
    fits = "cells" in report and report.get("what", "layer") in ("layer", "attention", "model", "train")
    assert cli.main(["bench", "table", "--json", str(path)]) == int(not fits)
    printed = capsys.readouterr()
    if fits:
        above = "" if report.get("what") != "train" else "qwen3-30b-a3b, 2 layers, "  # says what all rows are of
        assert printed.out.startswith(above or "| ") and "\n|---" in printed.out and not printed.err
    else:
        assert re.search(rf"ConfigError: --json .*{re.escape(path.name)}\) must ", printed.err) and not printed.out
        assert "what" not in report or f"holds those of {report['what']!r}" in printed.err


def test_runs_over_several_links_are_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(RESULTS / f"2026-11-30_model_2xh200_{link}.json") for link in ("nvlink", "shm")]
    lines = []
    for names in (files[:1], files[1:], files, [files[0]] * 2):
        assert cli.main(["bench", "table", "--json", *names]) == 0
        lines.append(capsys.readouterr().out.split("\n\n")[0].splitlines())
    fast, slow, both, same = lines
    assert len(both) == len(fast) + len(slow) - 2 and same == [*fast, *fast[2:]]
    for alone, link in ((fast, "nccl"), (slow, "nccl, P2P off")):
        for line in alone[2:]:
            name, _, times = line.partition(" | ")
            assert f"{name}, {link} | {times}" in both
    assert cli.main(["bench", "table", "--json", *files, "--pictures", str(tmp_path)]) == 0
    drawn = {path.stem for path in tmp_path.glob("*.svg")}
    assert {"mixtral-8x7b_2x2_nccl", "mixtral-8x7b_2x2_sp2_nccl_p2p_off"} <= drawn and len(drawn) == 12
    capsys.readouterr()
    assert cli.main(["bench", "table", "--json", files[0], str(RESULTS / "2026-11-29_layer_h200_mirror.json")]) == 1
    assert "must be one file, or several of `bench model`; holds those of ['model', 'layer']" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ({"what": "train", "cells": []}, "whole results of `bench train`.*KeyError: 'command'"),
        ({"what": ["model"], "cells": []}, "must hold results of layer, attention, memory, model, train, holds"),
        ({"cells": [1]}, "whole results of `bench layer`.*TypeError"),
        ({"cells": [{"shape": "tiny"}]}, "whole results of `bench layer`.*KeyError: 'variants'"),
    ],
)
def test_files_that_are_cut_are_named(
    report: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.json").write_text(json.dumps(report))
    assert cli.main(["bench", "table", "--json", str(tmp_path / "x.json")]) == 1
    assert re.search(f"ConfigError: --json .*{message}", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["2026-11-28_attention_h200_mirror", "2026-11-28_model_2xh200_nvlink_4layers"])
def test_pictures_of_results_without_timelines_are_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "table", "--json", str(RESULTS / f"{name}.json"), "--pictures", str(tmp_path)]
    assert cli.main(command) == 1
    assert "ConfigError: --pictures must come with results of `bench model --trace`" in capsys.readouterr().err


def test_pictures_need_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["bench", "table", "--json", str(TRACED), "--pictures", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("| ") and "MissingPackageError: pictures need matplotlib" in printed.err
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    device = torch.device("cpu")
    settings = RunSettings([], 1, variants=["nothing"], pictures=str(tmp_path))
    slices = SliceRun([ModelSlice("tiny", 1, 1, 8)], settings, Stages(device), device, lambda: None)
    slices.cells[0] |= json.loads(TRACED.read_text(encoding="utf-8"))["cells"][0]
    slices.draw()
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "picture ...  none: pictures need matplotlib" in line]
