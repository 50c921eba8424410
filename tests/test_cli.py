"""The `fluid-hf` command line: every command explains itself, errors are named, the table is printed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path
from unittest import mock

import pytest
import torch
from distributed import LAUNCH_ENV
from families import tiny_model
from transformers import GPT2Config

from fluid_hf import cli
from fluid_hf.bench.parity_cells import FACTORS
from fluid_hf.bench.shapes import shape_of
from fluid_hf.commands import doctor_checks
from fluid_hf.commands.bench import BENCHMARKS
from fluid_hf.commands.doctor_parity import read_settings
from fluid_hf.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
PATHS = [[name] for name in cli.COMMANDS] + [["bench", name] for name in BENCHMARKS]


@pytest.mark.parametrize("path", [[], *PATHS], ids=lambda path: " ".join(path) or "fluid-hf")
def test_help_explains_every_option(path: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*path, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(" ".join(["usage: fluid-hf", *path]))
    parser = cli.build_parser()
    for name in path:
        (choices,) = (a.choices for a in parser._actions if a.dest in ("command", "what"))
        assert choices is not None
        parser = choices[name]
    assert all(action.help for action in parser._actions if action.dest not in ("command", "what"))


def test_named_errors_end_with_their_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(options: object) -> int:
        raise ConfigError("waves (0) must be a positive integer.")

    monkeypatch.setattr(cli.COMMANDS["bench"], "run", fail)
    assert cli.main(["bench", "layer"]) == 1
    assert "ConfigError: waves (0) must be a positive integer." in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nccl_without_a_gpu_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "model", "--link", "nccl"]) == 1
    assert "ConfigError: link (nccl) must have a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("profile --from NONE --out OUT", "TraceError: trace .* must be a Chrome trace"),
        (
            "profile --out FILE/picture",
            r"ConfigError: --out .*picture.json\) must be a file .*(File exists|Not a dir)",
        ),
        (
            "bench layer --json FILE/x.json",
            r"ConfigError: --json .*x.json\) must be a file .*(File exists|Not a dir)",
        ),
        ("doctor --json OUT", "ConfigError: --json .* must be a file that can be written: it is a folder"),
        ("bench layer --shapes mixtral-9x9b", "ConfigError: shape .* must be one of .*no such file or folder"),
        ("bench layer --shapes tiny --ep 7", r"ConfigError: --ep \(7\) must divide the experts .*'tiny': 16"),
        ("bench layer --shapes tiny --ep 0", "argument --ep: must be a positive integer, is '0'"),
        ("profile --tokens 0", "argument --tokens: must be a positive integer, is '0'"),
        ("bench attention --shapes tiny --sp 3", r"ConfigError: --sp \(\[3\]\) must divide"),
        ("bench table --json NONE", "ConfigError: --json .* wrote with its --json .*FileNotFoundError"),
        ("bench table --json FILE", "ConfigError: --json .* wrote with its --json .*JSONDecodeError"),
        ("doctor --parity --fixed nonsense", r"ConfigError: setting \('nonsense'\) must be one of"),
        ("errors NoError", "invalid choice: 'NoError'"),
        ("timeline", "invalid choice: 'timeline'"),
    ],
)
def test_wrong_input_is_named_before_anything_runs(
    command: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no JSON")
    places = {"NONE": str(tmp_path / "none"), "FILE": str(tmp_path / "file"), "OUT": str(tmp_path)}
    words = [re.sub("NONE|FILE|OUT", lambda found: places[found[0]], word) for word in command.split()]
    try:
        status = cli.main(words)
    except SystemExit as ended:
        assert ended.code == 2, "argparse's own errors"
    else:
        assert status == 1
    assert re.search(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "no JSON"


def test_results_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--shapes tiny --ep 1 --tokens 16 --repeats 1 --layers 1 --variants grouped --json -"
    assert cli.main(["bench", "layer", *options.split()]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["cells"][0]["shape"] == "tiny" and "limits" in printed.err


def test_table_of_the_published_results(capsys: pytest.CaptureFixture[str]) -> None:
    for path in sorted((ROOT / "examples/benchmarks/results").glob("*layer*.json")):
        assert cli.main(["bench", "table", "--json", str(path)]) == 0
        lines = capsys.readouterr().out.split("\n\n")[0].splitlines()  # a report of where the time goes may follow
        assert len(lines) == 2 + len(json.loads(path.read_text())["cells"])


def test_doctor_finds_nothing_that_will_not_work_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"torch", "transformers", "deepspeed"} <= {finding["name"] for finding in report["packages"]}
    assert "outputs and gradients right" in report["layer"][0]["value"]
    assert all(finding["level"] != "error" for findings in report.values() for finding in findings)


def test_doctor_names_settings_that_prevent_overlap() -> None:
    assert [f.level for f in doctor_checks.check_settings({})] == ["ok"]
    bad = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "CUDA_LAUNCH_BLOCKING": "1",
        "NCCL_P2P_DISABLE": "1",
        "NCCL_ALGO": "Ring",
    }
    findings = {finding.name: finding for finding in doctor_checks.check_settings(bad)}
    assert [findings[name].level for name in bad] == ["warning"] * 3 + ["ok"]
    assert findings["CUDA_LAUNCH_BLOCKING"].fix == "unset CUDA_LAUNCH_BLOCKING"
    with mock.patch("torch.cuda.is_available", return_value=True):
        (_, accelerator) = doctor_checks.check_settings({"DS_ACCELERATOR": "cpu"})
    assert accelerator.level == "warning" and accelerator.fix == "unset DS_ACCELERATOR"


def test_doctor_fails_on_what_is_missing_or_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor_checks, "_version", lambda name: None if name == "deepspeed" else "1.0")
    wrong = doctor_checks._plain_experts
    monkeypatch.setattr(doctor_checks, "_plain_experts", lambda *args: 1.01 * wrong(*args))
    assert cli.main(["doctor", "--skip", "links"]) == 1
    text = capsys.readouterr().out
    assert "X deepspeed" in text and "fix: pip install 'deepspeed" in text
    assert "X layer" in text and "outputs or gradients differ" in text
    assert "2 errors" in text


def test_doctor_parity_compares_with_one_process(tmp_path: Path) -> None:
    """One cell, all its settings given, in a process of its own."""
    out = tmp_path / "parity.json"
    fixed = [f"{name}={FACTORS[name][0]}" for name in FACTORS]
    command = [sys.executable, "-m", "fluid_hf.cli", "doctor", "--parity", "--quick", "--seconds", "600"]
    command += ["--json", str(out), "--fixed", *fixed]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **LAUNCH_ENV})
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = json.loads(out.read_text())
    assert result["status"] == "equal"


def test_doctor_parity_names_unknown_settings() -> None:
    with pytest.raises(ConfigError, match=r"setting \('famly'\) must be one of"):
        read_settings(["famly=mixtral"])
    with pytest.raises(ConfigError, match=r"family \('gpt'\) must be one of"):
        read_settings(["family=gpt"])


@pytest.mark.parametrize(("family", "shape"), [("mixtral", (32, 48, 4, 2)), ("qwen2_moe", (32, 24, 4, 2))])
def test_shapes_of_other_models(tmp_path: Path, family: str, shape: tuple[int, ...]) -> None:
    tiny_model(family).config.save_pretrained(tmp_path)
    assert astuple(shape_of(str(tmp_path))) == astuple(shape_of(str(tmp_path / "config.json"))) == shape


def test_shapes_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"shape \('mixtral-9x9b'\) must be one of .*mixtral-8x7b"):
        shape_of("mixtral-9x9b")
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"gpt2\) must have one of moe_intermediate_size"):
        shape_of(str(tmp_path))
