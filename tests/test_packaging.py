"""The package as it installs, and the direction of its imports."""

from __future__ import annotations

import ast
import configparser
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fluid_hf

ROOT = Path(__file__).resolve().parent.parent

# A module may import from its own layer and from layers to the right of it.
LAYERS = [
    {"integrations", "bench", "cli"},
    {"patching"},
    {"checkpoint"},
    {"state"},
    {"backends", "control"},
    {"models"},
    {"moe", "attention"},
    {"overlap", "comm"},
    {"process_groups", "config", "errors"},
]
FREE = {"", "integrations", "bench", "cli"}  # may import engines; "" is fluid_hf/__init__.py
KNOWS_TRANSFORMERS = FREE | {"patching", "checkpoint", "state", "models"}


def unit_of(path: Path) -> str:
    """The part of the package a file belongs to: its folder, or its name at the top level."""
    parts = path.with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imported(source: str) -> list[str]:
    """Modules imported when the module is loaded; not under TYPE_CHECKING or inside functions."""
    names: list[str] = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return names


def layering_errors(unit: str, source: str) -> list[str]:
    """What a module of `unit` imports and must not."""
    errors = []
    own = next((index for index, layer in enumerate(LAYERS) if unit in layer), 0)
    for name in imported(source):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if top in ("deepspeed", "accelerate") and unit not in FREE:
            errors.append(f"{unit} imports {name}")
        if top == "transformers" and unit not in KNOWS_TRANSFORMERS:
            errors.append(f"{unit} imports {name}")
        if top == "fluid_hf" and unit and target:
            place = next(index for index, layer in enumerate(LAYERS) if target in layer)
            across = {unit, target} == {"moe", "attention"}
            if place < own or across:
                errors.append(f"{unit} imports {name}")
    return errors


def sources() -> list[tuple[str, Path]]:
    core = [(unit_of(path.relative_to(ROOT / "fluid_hf")), path) for path in (ROOT / "fluid_hf").rglob("*.py")]
    return [(unit, path) for unit, path in core if unit != "integrations"] + [
        ("integrations", path) for path in (ROOT / "integrations").rglob("*.py")
    ]


def test_direction_of_imports() -> None:
    found = [error for unit, path in sources() for error in layering_errors(unit, path.read_text())]
    assert not found
    assert {unit for unit, _ in sources()} - {""} <= set().union(*LAYERS)


def test_planted_imports_are_caught() -> None:
    assert layering_errors("moe", "import deepspeed") == ["moe imports deepspeed"]
    assert layering_errors("comm", "from fluid_hf.moe.rows import RowFormat")
    assert layering_errors("moe", "from fluid_hf.attention import x")
    assert layering_errors("overlap", "import transformers")
    assert layering_errors("patching", "from fluid_hf.integrations.trainer import FluidCallback")
    assert not layering_errors("moe", "def f():\n    import deepspeed\nfrom fluid_hf.comm import tournament")


def test_size_of_functions_and_files() -> None:
    for folder in ("fluid_hf", "integrations", "examples", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            assert text.count("\n") <= 400, path
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef):
                    assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"


def test_listed_packages_are_those_on_disk() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    found = {"fluid_hf", "fluid_hf.integrations"}
    for path in (ROOT / "fluid_hf").iterdir():
        if path.is_dir() and path.name not in ("__pycache__", "integrations"):
            assert (path / "__init__.py").is_file(), path
            found.add(f"fluid_hf.{path.name}")
    assert listed == found
    assert os.readlink(ROOT / "fluid_hf" / "integrations") == "../integrations"
    assert (ROOT / "fluid_hf" / "py.typed").is_file()


def test_import_from_another_folder(tmp_path: Path) -> None:
    code = "import fluid_hf, fluid_hf.integrations.trainer as t; assert fluid_hf.FluidCallback is t.FluidCallback"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_source_folder_is_not_a_package() -> None:
    done = subprocess.run([sys.executable, "-c", "import integrations"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "import `fluid_hf.integrations` instead" in done.stderr


def test_importing_the_package_loads_no_engine(tmp_path: Path) -> None:
    code = "import fluid_hf, sys; assert 'deepspeed' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_public_names() -> None:
    assert fluid_hf.__all__ == sorted(fluid_hf.__all__)
    assert all(getattr(fluid_hf, name) is not None for name in fluid_hf.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fluid_hf.nothing
