"""`fluid-hf bench train` on two gloo ranks: same weights, same text, so the losses of all variants agree."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from fluid_hf import cli
from fluid_hf.bench import train_work
from fluid_hf.bench.train_plan import DEPTHS, TrainPlan
from fluid_hf.bench.train_report import largest_difference, train_table
from fluid_hf.bench.train_work import flops_per_token, read_blocks, state_bytes, write_blocks, write_checkpoint
from fluid_hf.commands import bench_train
from fluid_hf.errors import ConfigError

SMALL = ["--model", "tiny", "--ranks", "2", "--steps", "6", "--batch", "1", "--sequence", "32", "--lr", "3e-3"]
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def without_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def plan(folder: Path, **settings: Any) -> TrainPlan:
    sizes: dict[str, Any] = {"ranks": 2, "ep": 2, "sp": 1, "zero": 1, "steps": 6, "batch": 1, "sequence": 32}
    base = {"variant": "fluid_hf", "model": "tiny", "layers": 2, "dtype": "float32", "shared": str(folder)}
    return TrainPlan(**{**base, **sizes, "out": str(folder / "out"), **settings})


@pytest.mark.skipif(torch.cuda.is_available(), reason="float32 on CPU ranks")
def test_all_variants_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "train.json"
    assert cli.main(["bench", "train", *SMALL, "--trace", "--work", str(tmp_path / "work"), "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "step 6/6" in printed and "step 7" not in printed
    report = json.loads(out.read_text())
    assert report["device"] == "CPU" and report["ranks"] == 2
    cells = {cell["variant"]: cell for cell in report["cells"]}
    assert list(cells) == ["fluid_hf", "fluid_hf serial", "AutoEP", "transformers"]
    reference = cells["fluid_hf"]["result"]
    assert reference["losses"][-1] < reference["losses"][0] - 0.1, "nothing was learnt"
    for name, cell in cells.items():
        assert cell["status"] == "ran", (cell.get("cause"), cell.get("lines"))
        found = cell["result"]
        assert len(found["losses"]) == len(found["seconds"]) == 6
        assert cell.get("differs", 0.0) <= TOLERANCE, (name, found["losses"], reference["losses"])
        assert found["grad_norms"] == pytest.approx(reference["grad_norms"], rel=TOLERANCE)
        assert found["tokens_per_second"] == pytest.approx(64 / found["seconds_per_step"]["median"])
        assert len(found["peak_mib"]) == 2 and min(found["peak_mib"]) > 50
    for name, waves in (("fluid_hf", 1), ("fluid_hf serial", 0)):
        found = cells[name]["result"]
        assert found["exposed_ms"] > 0 and found["waves"] == waves and found["predicted_ms"][str(waves)] > 0
        assert found["trace"]["layer_ms"]["backward"] > 0
        assert {Path(file).name for file in found["trace"]["files"]} >= {"timeline.json", "timeline.png"}
    assert cli.main(["bench", "table", "--json", str(out)]) == 0
    assert capsys.readouterr().out.strip() == printed[printed.index("\ntiny, ") :].strip()


def test_weights_are_a_plain_checkpoint_and_used_again(tmp_path: Path) -> None:
    first = plan(tmp_path, layers=3)
    folder = write_checkpoint(first)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.num_hidden_layers == 3 and model.config.vocab_size == DEPTHS["tiny"][1]
    experts = [layer.mlp.experts.down_proj for layer in model.model.layers]
    assert len({float(weight.detach().sum()) for weight in experts}) == 3, "layers differ"
    times = [path.stat().st_mtime_ns for path in sorted(folder.iterdir())]
    write_checkpoint(first)
    assert [path.stat().st_mtime_ns for path in sorted(folder.iterdir())] == times
    write_checkpoint(plan(tmp_path, layers=1, dtype="bfloat16"))
    assert len(list(folder.glob("*.safetensors"))) == 1
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16


def test_text_is_long_enough_and_the_same(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    ids = read_blocks(write_blocks(plan(tmp_path, trace=True)))
    assert ids.shape == (7 * 2, 32) and 256 < ids.max() < DEPTHS["tiny"][1]
    assert torch.equal(ids, read_blocks(write_blocks(plan(tmp_path / "again", trace=True))))


def test_work_and_memory_of_a_model(tmp_path: Path) -> None:
    tiny = plan(tmp_path)
    hidden, inner, vocabulary = 64, 32, DEPTHS["tiny"][1]
    attention = hidden * 16 * (4 + 2 + 2 + 4)
    active = 2 * (attention + 16 * hidden + 4 * 3 * hidden * inner) + vocabulary * hidden
    assert flops_per_token(tiny) == 6 * active + 6 * 2 * 4 * 16 * 32
    vectors = 2 * (2 * hidden + 2 * 16) + hidden
    dense = 2 * (attention + 16 * hidden) + 2 * vocabulary * hidden + vectors
    experts = 2 * 16 * 3 * hidden * inner
    assert state_bytes(tiny) == dense * (8 + 8) + experts / 2 * (8 + 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ranks 3", r"--ep \(3\) must divide the number of ranks \(3\) and the experts of tiny \(16\)"),
        ("--ep 4", r"--ep \(4\) must divide the number of ranks \(2\)"),
        ("--sp 4", r"--sp \(4\) must divide the number of ranks \(2\), --sequence \(32\)"),
        ("--sp 2 --sequence 33", r"--sp \(2\) must divide .* --sequence \(33\)"),
        ("--steps 5", r"--steps \(5\) must be more than the 5"),
        ("--sequence 1", r"--sequence \(1\) must be at least 2"),
        ("--timeout 0", r"--timeout \(0.0\) must be a positive number"),
        ("--lr nan", r"--lr \(nan\) must be a positive number"),
        ("--work FILE", r"--work \(.*file\) must be a folder that can be written"),
        ("--model gpt", "invalid choice: 'gpt'"),
        ("--variants megatron", "invalid choice: 'megatron'"),
        ("--zero 3", "invalid choice: 3"),
        ("--waves 0", "--waves: must be a positive integer"),
    ],
)
def test_wrong_input_is_named_before_anything_starts(
    options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_train.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(bench_train.subprocess, "Popen", lambda *a, **k: pytest.fail("a process was started"))
    (tmp_path / "file").touch()
    words = options.replace("FILE", str(tmp_path / "file")).split()
    try:
        assert cli.main(["bench", "train", *SMALL, "--work", str(tmp_path / "work"), *words]) == 1
        assert "ConfigError" in (found := capsys.readouterr().err)
    except SystemExit as ended:
        assert ended.code == 2
        found = capsys.readouterr().err
    assert re.search(message, found), found
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_ranks_must_have_gpus_and_no_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = cli.build_parser().parse_args(["bench", "train", *SMALL, "--work", str(tmp_path)])
    monkeypatch.setattr(bench_train.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"--ranks \(2\) must be at most the number of GPUs \(1\)"):
        bench_train.run(options)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match=r"RANK \(0\) must not be set"):
        bench_train.run(options)


def test_refused_variants_are_results(tmp_path: Path) -> None:
    for name in ("AutoEP", "transformers"):
        assert "sp (2) must be 1" in str(plan(tmp_path, variant=name, sp=2).refusal())
        assert plan(tmp_path, variant=name).refusal() is None
    assert plan(tmp_path, sp=2).refusal() is None
    cell = bench_train._run(plan(tmp_path, variant="AutoEP", sp=2), 1.0)
    assert cell["status"] == "refused" and "result" not in cell


def run_instead(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str, timeout: float = 60.0) -> dict[str, Any]:
    """A cell whose launcher runs `code`."""
    (folder / "out").mkdir(exist_ok=True)
    monkeypatch.setattr(bench_train, "_command", lambda plan: [sys.executable, "-c", code])
    return bench_train._run(plan(folder), timeout)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_variant_that_fails_is_a_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "result.json").write_text("{}")  # of an earlier run
    code = "print('ValueError: heads (3)\\nelastic.ChildFailedError:\\nmore'); raise SystemExit(3)"
    cell = run_instead(monkeypatch, tmp_path, code)
    assert cell["status"] == "failed (3)" and cell["cause"] == "ValueError: heads (3)" and len(cell["lines"]) == 3
    assert "result" not in cell


def test_a_variant_that_hangs_is_ended_with_its_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rank = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], "
    code = rank + "start_new_session=True); print(p.pid, flush=True); p.wait()"
    begin = time.monotonic()
    cell = run_instead(monkeypatch, tmp_path, code, timeout=3.0)
    assert cell["status"] == "ended after 3 s" and time.monotonic() - begin < 30
    assert not alive(int(cell["lines"][0]))


def test_ranks_end_with_the_command_and_with_their_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sleep = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], "
    sleep += "start_new_session=True); print(p.pid, flush=True); import time; time.sleep({seconds})"
    cell = run_instead(monkeypatch, tmp_path, sleep.format(seconds=2))
    assert cell["status"] == "failed (0)" and not alive(int(cell["lines"][0])), "the launcher left a rank behind"
    Path(plan(tmp_path).out, "log.txt").unlink()
    threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(SystemExit):
        run_instead(monkeypatch, tmp_path, sleep.format(seconds=600))
    assert not alive(int(Path(plan(tmp_path).out, "log.txt").read_text()))


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(train_work.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match=r"--work \(.*\) must have 0.0 GB free"):
        write_checkpoint(plan(tmp_path))


def result(**changes: Any) -> dict[str, Any]:
    base = {"seconds_per_step": {"median": 0.5, "spread": 0.01}, "tokens_per_second": 1000.0, "mfu": 0.305}
    base |= {"peak_mib": [10.0, 12.0], "exposed_ms": 3.0, "waves": 2, "predicted_ms": {"2": 1.25}, "losses": [3.0, 2.0]}
    return {**base, **changes}


def test_table() -> None:
    command = {
        "model": "tiny",
        "layers": 2,
        "batch": 1,
        "sequence": 32,
        "zero": 1,
        "ep": 2,
        "sp": 1,
        "dtype": "float32",
    }
    traced = {"exposed_ms": 1.5, "layer_ms": {"forward": 1.0, "backward": 2.0}}
    plain = {"mfu": None, "exposed_ms": None, "waves": None, "predicted_ms": {}}
    cells: list[dict[str, Any]] = [
        {"variant": "fluid_hf", "status": "ran", "result": result(trace=traced)},
        {"variant": "AutoEP", "status": "ran", "result": result(**plain), "differs": 2e-7},
        {"variant": "transformers", "status": "failed (1)", "cause": "ValueError: no", "lines": ["x"]},
    ]
    lines = train_table({"command": command, "device": "CPU", "ranks": 2, "cells": cells}).splitlines()
    assert lines[0] == "tiny, 2 layers, 1 x 32 tokens a rank, 2 ranks of CPU, float32, ZeRO 1, EP2"
    assert lines[4] == "| fluid_hf | 500.0 (+-10.0) | 1000 | 30.5% | 12 | 1.5 | 2 | 1.25 | 3.00 | 2.0000 | - |"
    assert lines[5] == "| AutoEP | 500.0 (+-10.0) | 1000 | - | 12 | - | - | - | - | 2.0000 | 2.0e-07 |"
    assert lines[-1] == "- transformers failed (1): ValueError: no"


def test_differences_are_from_the_first_variant_that_ran() -> None:
    assert largest_difference([2.0, 1.1], [2.0, 1.0]) == pytest.approx(0.1)
    assert largest_difference([1.0], [1.0, 2.0]) is None and largest_difference([], []) is None
    cells: list[dict[str, Any]] = [{"variant": "a", "status": "failed (1)"}]
    for name, losses in (("b", [1.0, 2.0]), ("c", [1.0, 1.0])):
        cells.append({"variant": name, "result": {"losses": losses}})
        bench_train._compare(cells)
    assert "differs" not in cells[1] and cells[2]["differs"] == 0.5
    before = copy.deepcopy(cells)
    cells.append({"variant": "d", "status": "failed (1)"})
    bench_train._compare(cells)
    assert cells[:3] == before and "differs" not in cells[3]


def test_launchers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = (bench_train._command(plan(tmp_path, variant=name)) for name in ("fluid_hf", "transformers"))
    assert "deepspeed.launcher.runner" in ours and "torch.distributed.run" in theirs
    monkeypatch.setattr(bench_train.torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert bench_train._environment(plan(tmp_path))["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert "--num_accelerators" not in bench_train._command(plan(tmp_path))
