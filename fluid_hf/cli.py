"""The `fluid-hf` command: a dispatcher over the modules of `fluid_hf.commands`."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from typing import Any, Protocol

from fluid_hf.commands import bench, doctor, errors, models, profile
from fluid_hf.commands.arguments import check_targets
from fluid_hf.errors import FluidError

__all__ = ["main"]


class Command(Protocol):
    """What a module of `fluid_hf.commands` provides."""

    def add_parser(self, subparsers: Any) -> argparse.ArgumentParser:
        """Add the subcommand's parser, named as the command."""

    def run(self, options: argparse.Namespace) -> int:
        """Run it; the exit status."""


COMMANDS: dict[str, Command] = {
    "bench": bench,
    "doctor": doctor,
    "errors": errors,
    "models": models,
    "profile": profile,
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="fluid-hf",
        description="Tools for expert-parallel Hugging Face models.",
        epilog="`fluid-hf COMMAND --help` explains the options of each.",
    )
    # What `deepspeed --module fluid_hf.cli` adds; the environment has it, too.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS.values():
        command.add_parser(subparsers)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Entry point.

    Returns:
        The exit status: 0, or 1 with the named error on the error stream, or 130 if the user interrupts; argparse ends
        the process itself, with 2.
    """
    options = build_parser().parse_args(arguments)
    target = getattr(options, "json", None)
    before = _version(target)
    try:
        check_targets(options)
        return COMMANDS[options.command].run(options)
    except (FluidError, OSError) as error:
        name = type(error).__name__
        more = f"\n`fluid-hf errors {name}` has cause and remedy." if isinstance(error, FluidError) else ""
        print(f"fluid-hf {options.command}: {name}: {error}{more}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = f"; what was finished is in {target}" if _version(target) != before else ""
        print(f"fluid-hf {options.command}: interrupted{kept}", file=sys.stderr)
        return 128 + signal.SIGINT


def _version(target: str | bool | None) -> tuple[int, int] | None:
    """Differs once the file of `--json` has been written; `None` without such a file."""
    if isinstance(target, str) and target != "-":
        with contextlib.suppress(OSError):
            found = os.stat(target)
            return found.st_ino, found.st_mtime_ns
    return None


if __name__ == "__main__":
    sys.exit(main())
