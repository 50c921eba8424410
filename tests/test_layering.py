"""Direction of imports between the layers of the package, who may know which library, and sizes of functions and files.

Only imports that run when a module is loaded count: not those inside functions or under `if TYPE_CHECKING:`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("fluid_hf", "integrations", "examples", "tests")
MAX_FUNCTION, MAX_FILE = 60, 400

# From top to bottom; a unit may import its own layer and the layers below. "" is fluid_hf/__init__.py.
LAYERS: list[set[str]] = [
    {"integrations", "bench", "cli", "commands", "profiling"},
    {""},
    {"patching", "checkpoint", "state", "backends", "control", "metrics"},
    {"models"},
    {"moe", "attention"},
    {"overlap", "comm"},
    {"process_groups", "config", "errors", "ranges", "kernels", "launch", "nodes"},
]
LEVEL = {unit: level for level, layer in enumerate(LAYERS) for unit in layer}
OUTSIDE_CORE = LAYERS[0]
ENGINES = {"deepspeed", "accelerate"}
KNOWS_TRANSFORMERS = OUTSIDE_CORE | LAYERS[2] | {"models"}


def unit_of(module: str) -> str:
    """The part of fluid_hf a module belongs to: `fluid_hf.moe.rows` -> `moe`."""
    return module.partition(".")[2].partition(".")[0]


def at_load(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run when the module is loaded, also inside classes, `try`, `with` and `if`."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from at_load(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "finalbody"):
                yield from at_load(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from at_load(handler.body)


def imported(module: str, source: str) -> list[str]:
    """Full names of what a module imports when it is loaded."""
    names: list[str] = []
    for node in at_load(ast.parse(source).body):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
            continue
        base = node.module or ""
        if node.level:  # a package is given as its __init__ module
            base = ".".join([*module.split(".")[: -node.level], *([node.module] if node.module else [])])
        names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def layering_errors(module: str, source: str) -> list[str]:
    """What a module (`fluid_hf.moe.rows`; a package as `fluid_hf.moe.__init__`) imports and must not."""
    unit = unit_of(module).replace("__init__", "")
    if unit not in LEVEL:
        return [f"{module} is in no layer"]
    errors = []
    for name in imported(module, source):
        top = name.partition(".")[0]
        wrong = top in ENGINES and unit not in OUTSIDE_CORE
        wrong |= top == "transformers" and unit not in KNOWS_TRANSFORMERS
        if top == "fluid_hf":
            target = unit_of(name) if unit_of(name) in LEVEL else ""
            wrong |= LEVEL[target] < LEVEL[unit] or {unit, target} == {"moe", "attention"}
        if wrong:
            errors.append(f"{module} imports {name}")
    return errors


def module_files() -> dict[str, Path]:
    """Every module of the package; integrations/ counts as `fluid_hf.integrations`."""
    found = {}
    for folder, package in (("fluid_hf", "fluid_hf"), ("integrations", "fluid_hf.integrations")):
        for path in (ROOT / folder).rglob("*.py"):
            if not path.is_relative_to(ROOT / "fluid_hf" / "integrations"):  # the link; some versions follow it
                found[".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts])] = path
    return found


MODULES = module_files()


def test_all_modules_are_looked_at() -> None:
    wanted = {"fluid_hf.__init__", "fluid_hf.patching", "fluid_hf.moe.rows", "fluid_hf.integrations.deepspeed"}
    assert wanted <= set(MODULES)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_direction_of_imports(module: str) -> None:
    assert layering_errors(module, MODULES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("moe.rows", "import deepspeed"),
        ("moe.rows", "import torch, deepspeed.utils as d"),
        ("patching", "from accelerate import Accelerator"),
        ("__init__", "from deepspeed.utils import groups"),
        ("patching", "from fluid_hf.integrations.trainer import FluidCallback"),
        ("patching", "from fluid_hf import integrations"),
        ("patching", "from .integrations import trainer"),
        ("patching", "from fluid_hf import FluidConfig"),  # the package itself is above its modules
        ("comm.row_route", "from fluid_hf.moe.rows import RowFormat"),
        ("comm.row_route", "from ..moe.rows import RowFormat"),
        ("comm.row_route", "import fluid_hf.patching"),
        ("config", "from fluid_hf.comm import tournament"),
        ("moe.layer", "from fluid_hf.models.registry import find_experts"),
        ("models.registry", "from fluid_hf.state import FluidState"),
        ("moe.layer", "from fluid_hf.attention import ulysses"),
        ("attention.ulysses", "from fluid_hf.moe import layer"),
        ("overlap.wgrad", "import transformers"),
        ("moe.layer", "from transformers.activations import ACT2FN"),
        ("__init__", "import transformers"),
        ("somewhere.new", "import torch"),
    ],
)
def test_planted_imports_are_caught(module: str, line: str) -> None:
    for source in (line, f"try:\n    {line}\nexcept ImportError:\n    pass", f"class A:\n    {line}"):
        assert len(layering_errors(f"fluid_hf.{module}", source)) == 1
    assert layering_errors(f"fluid_hf.{module}", f"if True:\n    pass\nelse:\n    {line}")


def test_planted_import_in_a_module_as_it_is() -> None:
    source = MODULES["fluid_hf.moe.layer"].read_text(encoding="utf-8")
    assert layering_errors("fluid_hf.moe.layer", f"{source}\nimport deepspeed\n") == [
        "fluid_hf.moe.layer imports deepspeed"
    ]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("moe.layer", "from fluid_hf.comm import tournament\nfrom fluid_hf.errors import ConfigError"),
        ("moe.layer", "def build():\n    import deepspeed"),
        ("moe.layer", "class A:\n    async def build(self):\n        import deepspeed"),
        ("moe.layer", "if TYPE_CHECKING:\n    import deepspeed"),
        ("moe.layer", "if typing.TYPE_CHECKING:\n    from fluid_hf.patching import patch_model"),
        ("moe.layer", "from .permutation import expand_rows\nfrom ..overlap import wgrad"),
        ("overlap.planner", "from fluid_hf.comm.tournament import num_rounds"),
        ("checkpoint", "from fluid_hf.state import FluidState\nimport transformers"),
        ("models.registry", "from transformers.integrations import moe"),
        ("__init__", "from fluid_hf.patching import patch_model"),
        ("integrations.deepspeed", "import deepspeed, transformers\nfrom fluid_hf import FluidConfig"),
        ("cli", "import deepspeed\nfrom fluid_hf.integrations import trainer"),
    ],
)
def test_allowed_imports_are_left_alone(module: str, source: str) -> None:
    assert layering_errors(f"fluid_hf.{module}", source) == []


def size_errors(source: str) -> list[str]:
    """Functions and the file itself where they are longer than allowed."""
    errors = []
    if len(source.splitlines()) > MAX_FILE:
        errors.append(f"file: {len(source.splitlines())} lines")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_FUNCTION:
                errors.append(f"{node.name}: {lines} lines")
    return errors


FILES = sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_size_of_functions_and_files(file: str) -> None:
    assert size_errors((ROOT / file).read_text(encoding="utf-8")) == []


def test_long_functions_and_files_are_caught() -> None:
    assert {file.partition("/")[0] for file in FILES} == set(FOLDERS)
    body = "    pass\n"
    assert size_errors("def f():\n" + body * 59) == []  # 60 lines
    assert size_errors("def f():\n" + body * 60) == ["f: 61 lines"]
    assert size_errors("class A:\n    async def g(self):\n" + "        pass\n" * 60) == ["g: 61 lines"]
    assert size_errors("x = 1\n" * 400) == []
    assert size_errors("x = 1\n" * 401) == ["file: 401 lines"]
