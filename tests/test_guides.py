"""The pages: links lead somewhere, commands and configurations are those that exist."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any, NoReturn

import pytest
from deepspeed.launcher import runner
from torch.distributed.run import get_args_parser

import fluid_hf
from fluid_hf import FluidConfig, FluidState, cli
from fluid_hf.commands.errors import error_classes

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "examples" / "guides").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {"#" + re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{target} in {page.name}"
        assert not anchor or anchor in anchors(path), f"{target}{anchor} in {page.name}"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def commands(page: Path) -> list[list[str]]:
    """The words of every shell command of a page, without assignments before them."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    found = [shlex.split(line, comments=True) for line in lines]
    return [words[next((i for i, w in enumerate(words) if "=" not in w), 0) :] for words in found if words]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def script_parser(path: Path) -> argparse.ArgumentParser:
    """The parser that a script builds, from its source: importing the script would load half of the ecosystem."""
    parser = Parser(prog=path.name)
    types = {"int": int, "float": float, "str": str, "Path": Path}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        called = getattr(node, "func", None)
        if getattr(called, "id", "") != "add" and getattr(called, "attr", "") != "add_argument":
            continue
        names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]  # type: ignore[attr-defined]
        given = {word.arg: word.value for word in node.keywords}  # type: ignore[attr-defined]
        known = {name: ast.literal_eval(given[name]) for name in ("action", "nargs", "choices") if name in given}
        if "type" in given:
            known["type"] = types[ast.unparse(given["type"])]
        parser.add_argument(*names, **known)
    return parser


def check_script(words: list[str]) -> None:
    if words[0] == "fluid_hf.cli":
        cli.build_parser().parse_args(words[1:])
    elif words[0] != "train.py":  # a reader's own
        script_parser(ROOT / words[0]).parse_args(words[1:])


def check_command(words: list[str]) -> None:
    """Fails if a command, or one of its options, does not exist."""
    if words[0] == "fluid-hf":
        cli.build_parser().parse_args(words[1:])  # exits if an option or a choice is unknown
    elif words[0] == "deepspeed":
        options = runner.parse_args(words[1:])
        # The launcher passes the local rank to a script, unless it is told not to.
        rank = [] if options.no_local_rank else ["--local_rank=0"]
        check_script([options.user_script, *rank, *options.user_args])
    elif words[0] == "torchrun":
        options = get_args_parser().parse_args(words[1:])
        check_script([options.training_script, *options.training_script_args])
    elif words[0] == "python":
        if words[1] != "-m":
            check_script(words[1:])
        else:
            spec = importlib.util.find_spec(words[2])
            assert spec is not None and spec.origin is not None, words[2]
            script_parser(Path(spec.origin)).parse_args(words[3:])
    elif words[:2] == ["bash", "examples/quickstart.sh"]:
        script_parser(ROOT / "examples/pretrain.py").parse_args(words[2:])
    else:
        assert words[:2] in (["bash", "tests/run.sh"], ["pip", "install"]) or words[0] == "pdoc", words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist_with_their_options(page: Path) -> None:
    for words in commands(page):
        check_command(words)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_commands_in_the_examples_exist(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    for line in text.splitlines():
        words = [word for word in shlex.split(line, comments=True) if "=" not in word] if " examples/" in line else []
        if words and words[0] in ("deepspeed", "torchrun", "bash"):
            check_command(words)


@pytest.mark.parametrize(
    "line",
    [
        "fluid-hf profile --picture out",
        "deepspeed --num_gpus 2 examples/pretrain.py --step 3 --batchsize 4",
        "deepspeed --gpus 2 examples/pretrain.py",
        "torchrun --nproc_per_node 2 examples/none.py",
        "torchrun --nproc_per_node 2 -m fluid_hf.cli doctor --parities",
        "python tests/parity.py --worlds 2",
        "bash examples/quickstart.sh --date FILE",
        "fluid-hg doctor",
    ],
)
def test_planted_mistakes_are_caught(line: str) -> None:
    with pytest.raises((SystemExit, ValueError, OSError, AssertionError)):
        check_command(line.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_names_what_exists(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block.replace(", ...)", ")"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fluid_hf"):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
            text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if text.startswith("fluid_hf.") and text.count(".") == 1:
                assert hasattr(fluid_hf, text.removeprefix("fluid_hf.")) or "integrations" in text, text
            if re.fullmatch(r"model\.fluid\.\w+", text):
                assert hasattr(FluidState, text[12:]) or f"self.{text[12:]}" in inspect.getsource(FluidState), text
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("FluidConfig", "FluidCallback"):
                known = inspect.signature(getattr(fluid_hf, ast.unparse(node.func))).parameters
                assert {word.arg for word in node.keywords} <= set(known), ast.unparse(node)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("ds_config_*.json")), ids=lambda path: path.stem)
def test_configurations_hold_settings_that_exist(path: Path) -> None:
    settings = json.loads(path.read_text(encoding="utf-8"))
    assert FluidConfig.from_json(path) == FluidConfig(**settings["fluid"])
    assert len(settings["about"]) >= 2, "says what its keys do"
    for page in ("examples/README.md", "examples/guides/trainer.md"):
        assert path.name in (ROOT / page).read_text(encoding="utf-8") or "ds_config_*.json" in (ROOT / page).read_text()


def test_every_error_has_a_row_where_help_is_looked_for() -> None:
    text = (ROOT / "examples/guides/troubleshooting.md").read_text(encoding="utf-8")
    assert not [name for name in error_classes() if f"`{name}" not in text]


def test_every_public_name_is_in_the_reference() -> None:
    text = (ROOT / "examples/guides/api.md").read_text(encoding="utf-8")
    names = set(fluid_hf.__all__) - set(error_classes())
    assert not [name for name in names if not re.search(rf"`fluid_hf\.{name}\b", text)]
    for name, given in re.findall(r"`fluid_hf\.(\w+)\(([^`]+)\)`", text):
        known = inspect.signature(getattr(fluid_hf, name)).parameters
        for part in given.replace("...", "").split(","):
            argument, _, default = part.strip(" *").partition("=")
            assert not argument or argument in known, (name, argument)
            shown = str(getattr(known.get(argument), "default", ""))
            assert not default or default in shown, (name, argument, shown)


def test_every_setting_and_metric_is_documented() -> None:
    readme, trainer = (ROOT / name for name in ("README.md", "examples/guides/trainer.md"))
    table = readme.read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in table for name in FluidConfig().to_dict())
    text = trainer.read_text(encoding="utf-8")
    source = (ROOT / "integrations/step_metrics.py").read_text(encoding="utf-8")
    source += (ROOT / "fluid_hf/state.py").read_text(encoding="utf-8")
    metrics = set(re.findall(r'"(fluid/\w+)"', source)) - {"fluid/tokens"}
    assert len(metrics) >= 10 and all(f"`{name}`" in text for name in metrics), metrics


def test_gains_at_the_top_are_those_of_the_results() -> None:
    """The first table of the README, from the files that the measured section links to."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line.split("|")[2:5] for line in text.partition("## ")[0].splitlines() if line.startswith("| ")][1:]
    found = [[[float(n) for n in cell.split(" to ")] for cell in row if cell.strip() != "-"] for row in rows]

    def cells(name: str) -> list[dict[str, Any]]:
        return list(json.loads((ROOT / "examples/benchmarks/results" / name).read_text(encoding="utf-8"))["cells"])

    peers, expected = ("AutoEP", "AllToAllEP", "serial"), []
    for mode, link in itertools.product(("forward", "step"), ("nvlink", "shm")):
        variants = _slice(cells(f"2026-11-30_model_2xh200_{link}.json"))["variants"]
        times = {key: value[mode]["median"] for key, value in variants.items() if mode in value}
        expected.append([[times[peer] / times["fluid_hf"]] for peer in peers if peer in times])
    layers = [cell for cell in cells("2026-11-29_layer_h200_mirror.json") if cell["ep_size"] > 1 and not cell["skew"]]
    gains = [[_fastest(cell, peer) / _planned(cell) for cell in layers] for peer in peers]
    expected.append([[min(values), max(values)] for values in gains])
    for row, numbers in zip(found, expected, strict=True):
        for cell, values in zip(row, numbers, strict=True):
            assert cell == pytest.approx(values, abs=0.006), (found, expected)


def _slice(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Two layers of Qwen3-30B with four sequences a rank."""
    wanted = {"name": "qwen3-30b-a3b", "layers": 2, "batch": 4, "sp": 1}
    return next(cell for cell in cells if wanted.items() <= cell.items())


def _fastest(cell: dict[str, Any], peer: str) -> float:
    """A peer with its defaults, or as it is faster."""
    variants = cell["variants"]
    return min(float(variants[name]["both"]) for name in (peer, f"{peer} fused") if name in variants)


def _planned(cell: dict[str, Any]) -> float:
    return float(cell["variants"][f"overlap {cell['planned_waves']}"]["both"])
