"""The `fluid-hf` command line: every command explains itself, errors are named, the table is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fluid_hf import cli
from fluid_hf.commands.bench import BENCHMARKS
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


def test_table_of_the_published_results(capsys: pytest.CaptureFixture[str]) -> None:
    for path in sorted((ROOT / "examples/benchmarks/results").glob("*layer*.json")):
        assert cli.main(["bench", "table", "--json", str(path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2 + len(json.loads(path.read_text())["cells"])
