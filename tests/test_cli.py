"""The `fluid-hf` command line: every command explains itself, errors are named, the table is printed."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import asdict, astuple
from pathlib import Path
from unittest import mock

import pytest
import torch
from distributed import LAUNCH_ENV
from families import tiny_model
from transformers import GPT2Config

from fluid_hf import cli
from fluid_hf.bench.parity_cells import FACTORS, Cell
from fluid_hf.bench.report import limits_text, markdown_table
from fluid_hf.bench.shapes import shape_of
from fluid_hf.commands import bench_attention, bench_layer, doctor_checks, models
from fluid_hf.commands.arguments import write_whole
from fluid_hf.commands.bench import BENCHMARKS
from fluid_hf.commands.doctor_parity import missing_peft, read_settings
from fluid_hf.errors import ConfigError
from fluid_hf.models.catalogue import SupportedModel

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
    assert "default: None" not in text and not re.search(r"default: [^)]*\)\s+\(default", text)


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
        (
            "bench model --link gloo --trace FILE/x",
            r"ConfigError: --trace .*x\) must be a folder .*(File exists|Not a dir)",
        ),
        ("doctor --json OUT", "ConfigError: --json .* must be a file that can be written: it is a folder"),
        ("bench layer --shapes mixtral-9x9b", "ConfigError: shape .* must be one of .*no such file or folder"),
        ("bench layer --shapes tiny --ep 7", r"ConfigError: --ep \(7\) must divide the experts .*'tiny': 16"),
        ("bench layer --shapes tiny --ep 0", "argument --ep: must be a positive integer, is '0'"),
        ("bench layer --skew nan", "argument --skew: must be a number of at least 0, is 'nan'"),
        ("bench layer --skew 0 -1", "argument --skew: must be a number of at least 0, is '-1'"),
        ("bench model --budget nan", "argument --budget: must be a number of at least 0, is 'nan'"),
        ("bench model --timeout 0", "argument --timeout: must be a positive number, is '0'"),
        ("bench model --stack-after soon", "argument --stack-after: must be a number of at least 0, is 'soon'"),
        ("doctor --seconds nan", "argument --seconds: must be a number of at least 0, is 'nan'"),
        ("doctor --timeout inf", "argument --timeout: must be a positive number, is 'inf'"),
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


@pytest.mark.parametrize("end", ["--json -", "--json", "--json --layers 1"])
def test_results_can_be_printed(end: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = f"--shapes tiny --ep 1 --tokens 16 --repeats 1 --layers 1 --variants grouped {end}"
    assert cli.main(["bench", "layer", *options.split()]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["cells"][0]["shape"] == "tiny" and "no times" in printed.err
    assert "0.0" not in markdown_table(report)  # what was not timed is no time of zero


def test_limits_as_text() -> None:
    timed = {"gemm": 1.0, "gemm_both": 3.0, "link": 2.0, "link_both": 4.0, "limit": 2.0, "limit_both": 4.0}
    assert limits_text(timed) == "ms alone: gemm 1.000 / 3.000, link 2.000 / 4.000, limit 2.000 / 4.000"
    assert limits_text(dict.fromkeys(timed, 0.0)) == "(no GPU: no times)"


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of all its subcommands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from parsers(inner)


def test_json_alone_prints_and_eats_no_argument() -> None:
    """In every command; one that has arguments without a name takes no file, and `bench table` reads its own."""
    kinds = {}
    for parser in parsers(cli.build_parser()):
        for action in parser._actions:
            if "--json" in action.option_strings:
                takes_words = any(not other.option_strings for other in parser._actions)
                kinds[parser.prog.removeprefix("fluid-hf ")] = (action.nargs, action.const, takes_words)
    prints = {name for name, kind in kinds.items() if kind == ("?", "-", False)}
    assert prints == {
        "doctor",
        "models",
        "profile",
        *(f"bench {w}" for w in ("layer", "attention", "model", "train", "metrics")),
    }
    assert kinds.keys() - prints == {"errors", "bench table"} and kinds["errors"][0] == 0


def test_families_as_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    family = SupportedModel("mixtral", True, "none", True)
    monkeypatch.setattr(models, "supported_models", lambda: [family])
    assert cli.main(["models", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == [asdict(family)]
    assert cli.main(["models", "--json", str(tmp_path / "models.json")]) == 0
    assert json.loads((tmp_path / "models.json").read_text()) == printed
    assert capsys.readouterr().out.startswith("# Models")


@pytest.mark.parametrize(
    ("module", "command"),
    [
        (bench_layer, "bench layer --shapes tiny --ep 1 2 4 --tokens 16"),
        (bench_attention, "bench attention --shapes tiny --sp 1 2 4 --tokens 16"),
    ],
)
def test_a_run_that_is_cut_keeps_what_is_finished(
    module: types.ModuleType,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "results.json"
    number = 0

    def cell(*_: object) -> dict[str, object]:
        nonlocal number
        number += 1
        if number == 3:
            raise KeyboardInterrupt
        return {"number": number, "errors": {}}

    monkeypatch.setattr(module, "_cell", cell)
    assert cli.main([*command.split(), "--json", str(out)]) == 130
    assert capsys.readouterr().err.endswith(f"fluid-hf bench: interrupted; what was finished is in {out}\n")
    report = json.loads(out.read_text())
    assert [cell["number"] for cell in report["cells"]] == [1, 2]
    assert report["link"] == "mirror" and report["command"]["repeats"] == 20
    assert list(tmp_path.iterdir()) == [out]
    number = 2  # no cell is finished this time: the file is of before
    assert cli.main([*command.split(), "--json", str(out)]) == 130
    assert capsys.readouterr().err.endswith("fluid-hf bench: interrupted\n")
    assert not torch.distributed.is_initialized()


def test_files_are_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link stays a link, rights stay, a device is written to; a full disk leaves the old text."""
    path, link, device = tmp_path / "a.json", tmp_path / "link.json", Path("/dev/null")
    write_whole(path, "1")
    path.chmod(0o640)
    link.symlink_to(path)
    write_whole(str(link), "2")
    assert link.is_symlink() and path.read_text() == "2" and path.stat().st_mode & 0o777 == 0o640
    write_whole(device, "3")
    assert device.is_char_device()
    for number, text in ((errno.EACCES, "4"), (errno.ENOSPC, None)):
        refusal = OSError(number, os.strerror(number))
        monkeypatch.setattr(os, "replace", mock.Mock(side_effect=refusal))
        if text is None:
            with pytest.raises(OSError, match="No space"):
                write_whole(path, "5")
        else:
            write_whole(path, text)
        assert path.read_text() == "4"
    assert {found.name for found in tmp_path.iterdir()} == {"a.json", "link.json"}


def test_table_of_the_published_results(capsys: pytest.CaptureFixture[str]) -> None:
    for path in sorted((ROOT / "examples/benchmarks/results").glob("*_layer_*.json")):
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


def test_doctor_parity_says_that_lora_needs_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [Cell(), Cell(trained="lora_experts"), Cell(trained="lora_attention")]
    assert missing_peft(cells) == ""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing_peft(cells).startswith("2 of 3 cells train LoRA") and missing_peft(cells[:1]) == ""


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
