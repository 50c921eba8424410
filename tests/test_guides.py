"""The pages: links lead somewhere, commands and configurations are those that exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from fluid_hf import FluidConfig, cli

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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist_with_their_options(page: Path) -> None:
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["fluid-hf"]:
                cli.build_parser().parse_args(words[1:])  # exits if an option or a choice is unknown
            for word in words:
                assert (
                    not word.startswith("examples/")
                    or (ROOT / word).suffix == ""
                    or "output" in word
                    or (ROOT / word).exists()
                ), word


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("ds_config_*.json")), ids=lambda path: path.stem)
def test_configurations_hold_settings_that_exist(path: Path) -> None:
    settings = json.loads(path.read_text(encoding="utf-8"))
    assert FluidConfig.from_json(path) == FluidConfig(**settings["fluid"])


def test_every_setting_and_metric_is_documented() -> None:
    readme, trainer = (ROOT / name for name in ("README.md", "examples/guides/trainer.md"))
    table = readme.read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in table for name in FluidConfig().to_dict())
    text = trainer.read_text(encoding="utf-8")
    source = (ROOT / "integrations/step_metrics.py").read_text(encoding="utf-8")
    source += (ROOT / "fluid_hf/state.py").read_text(encoding="utf-8")
    metrics = set(re.findall(r'"(fluid/\w+)"', source)) - {"fluid/tokens"}
    assert len(metrics) >= 10 and all(f"`{name}`" in text for name in metrics), metrics
