"""`fluid-hf models`: the model families of the installed transformers, and what each gets."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import transformers

from fluid_hf.models.catalogue import SupportedModel, supported_models

HEAD = """# Models

Every family of transformers {version} with routed experts. "Overlapped": the shared expert runs while the rows of the
routed ones travel; "not overlapped": it runs where transformers calls it. Sequence parallel: `sp_size` over 1, for the
family's plain configuration (a model with another kind of layer is refused by name). All that are served work with
DeepSpeed, too (ZeRO 0 to 3, tested with a family of each kind of experts). This page is written by `fluid-hf models`;
`fluid_hf.supported_models()` returns it as data.

| family | served | shared expert | sequence parallel | why not |
|---|---|---|---|---|
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser("models", help="which model families are served, and how")
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    return parser


def run(options: argparse.Namespace) -> int:
    """Print the page."""
    if options.json:
        print(json.dumps([dataclasses.asdict(model) for model in supported_models()]))
    else:
        print(page(), end="")
    return 0


def page() -> str:
    """The whole page."""
    version = ".".join(transformers.__version__.split(".")[:2])
    return HEAD.format(version=version) + "".join(_line(model) for model in supported_models())


def _line(model: SupportedModel) -> str:
    cells = [model.family, _yes(model.served), model.shared_expert, _yes(model.sequence_parallel), model.reason]
    return "| " + " | ".join(cells) + " |\n"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
