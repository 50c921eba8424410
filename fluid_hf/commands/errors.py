"""`fluid-hf errors`: every named error with its cause and remedy, from the classes themselves."""

from __future__ import annotations

import argparse
import inspect
import json
from typing import Any

from fluid_hf import errors

HEAD = """# Errors

Every error that fluid_hf raises by itself, with its cause and its remedy. All derive from `FluidError`, so one `except`
catches them. This page is written by `fluid-hf errors`; `fluid-hf errors NAME` explains one.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser("errors", help="explain an error, or all of them")
    parser.add_argument("name", nargs="?", choices=sorted(error_classes()), help="name of an error; all without it")
    # No file here: `--json TraceError` asks for that error.
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    return parser


def run(options: argparse.Namespace) -> int:
    """Print the page, or one entry of it."""
    names = [options.name] if options.name else sorted(error_classes())
    entries = {name: explain(name) for name in names}
    if options.json:
        print(json.dumps({name: {"cause": cause, "remedy": remedy} for name, (cause, remedy) in entries.items()}))
    else:
        print(section(options.name) if options.name else page().rstrip())
    return 0


def error_classes() -> dict[str, type[errors.FluidError]]:
    """Every class derived from `FluidError`, by name."""
    found, left = {}, list(errors.FluidError.__subclasses__())
    while left:
        error = left.pop()
        found[error.__name__] = error
        left += error.__subclasses__()
    return found


def explain(name: str) -> tuple[str, str]:
    """Cause and remedy of an error, from its docstring."""
    text = " ".join((inspect.getdoc(error_classes()[name]) or "").split())
    cause, _, remedy = text.partition("Remedy: ")
    return cause.strip(), remedy.strip()


def section(name: str) -> str:
    """The page's section on one error."""
    cause, remedy = explain(name)
    bases = " and ".join(f"`{base.__name__}`" for base in error_classes()[name].__bases__)
    return f"## {name}\n\nA {bases}.\n\n**Cause.** {cause}\n\n**Remedy.** {remedy}"


def page() -> str:
    """The whole page."""
    return HEAD + "\n" + "\n\n".join(section(name) for name in sorted(error_classes())) + "\n"
