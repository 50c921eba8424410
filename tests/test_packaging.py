"""The package as it installs: its list of packages, the link to integrations/, and its public names."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fluid_hf

ROOT = Path(__file__).resolve().parent.parent


def packages_on_disk(root: Path) -> set[str]:
    """Every folder with Python files; integrations/ is installed as fluid_hf.integrations."""
    found = set()
    for folder, package in (("fluid_hf", "fluid_hf"), ("integrations", "fluid_hf.integrations")):
        for path in (root / folder).rglob("*.py"):
            inside = path.parent.relative_to(root / folder).parts
            if not path.is_relative_to(root / "fluid_hf" / "integrations"):  # the link; some versions follow it
                found.add(".".join([package, *inside]))
    return found


def listed_packages(root: Path) -> list[str]:
    config = configparser.ConfigParser()
    config.read(root / "setup.cfg", encoding="utf-8")
    return config["options"]["packages"].split()


def test_listed_packages_are_those_on_disk() -> None:
    listed = listed_packages(ROOT)
    assert len(listed) == len(set(listed))
    assert set(listed) == packages_on_disk(ROOT)


def test_unlisted_package_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "setup.cfg").write_text("[options]\npackages =\n    fluid_hf\n    fluid_hf.integrations\n")
    for name in ("fluid_hf/__init__.py", "integrations/__init__.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    (tmp_path / "fluid_hf" / "integrations").symlink_to("../integrations")
    assert set(listed_packages(tmp_path)) == packages_on_disk(tmp_path)
    (tmp_path / "fluid_hf" / "new" / "deep").mkdir(parents=True)
    (tmp_path / "fluid_hf" / "new" / "deep" / "module.py").touch()
    assert packages_on_disk(tmp_path) - set(listed_packages(tmp_path)) == {"fluid_hf.new.deep"}


def test_every_package_has_an_init_file() -> None:
    # Without one, a mapped package is not found in an editable install.
    for package in listed_packages(ROOT):
        assert (ROOT.joinpath(*package.split(".")) / "__init__.py").is_file(), package


def test_integrations_is_mapped_and_linked() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    assert config["options"]["package_dir"].split("\n") == ["", "fluid_hf.integrations = integrations"]
    link = ROOT / "fluid_hf" / "integrations"
    assert link.is_symlink() and os.readlink(link) == "../integrations"
    assert link.resolve() == ROOT / "integrations"


def test_package_is_marked_as_typed() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    assert config["options.package_data"]["fluid_hf"] == "py.typed"
    assert (ROOT / "fluid_hf" / "py.typed").is_file()


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_source_folder_is_not_a_package() -> None:
    done = python("import integrations", ROOT)
    assert done.returncode == 1
    assert "ImportError: 'integrations' is a source folder" in done.stderr
    assert "import `fluid_hf.integrations` instead" in done.stderr


@pytest.mark.parametrize("at_root", [False, True])
def test_import_from_another_folder_and_from_the_root(tmp_path: Path, at_root: bool) -> None:
    """And importing the package loads no engine."""
    code = (
        "import fluid_hf, sys\n"
        "assert not {'deepspeed', 'fluid_hf.integrations'} & set(sys.modules)\n"
        "import fluid_hf.integrations.trainer as trainer\n"
        "assert fluid_hf.FluidCallback is trainer.FluidCallback\n"
        "print(trainer.__name__)"
    )
    done = python(code, ROOT if at_root else tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "fluid_hf.integrations.trainer"


def test_public_names() -> None:
    names = fluid_hf.__all__
    assert all(isinstance(name, str) for name in names)
    assert names == sorted(set(names))
    for name in names:
        assert getattr(fluid_hf, name).__module__.startswith("fluid_hf."), name
    with pytest.raises(AttributeError, match="'fluid_hf' has no attribute 'nothing'"):
        _ = fluid_hf.nothing
