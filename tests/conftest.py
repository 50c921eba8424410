"""What holds for every test: no network, files in memory where that can be, and an end to whatever hangs."""

from __future__ import annotations

import faulthandler
import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

# Before anything imports huggingface_hub: a name that is no folder is not looked up, again and again, elsewhere.
os.environ["HF_HUB_OFFLINE"] = "1"

MEMORY = Path("/dev/shm")
NEEDED = 4 * 2**30  # bytes; a run's files take less than one at a time
LONG = (
    "test_all_families.py",
    "test_parity.py",
    "test_resharding.py",
    "test_examples.py",
    "test_trainer.py",
    "test_sequence_trainer.py",
    "test_faults.py",
)
WATCHDOG = pytest.StashKey[IO[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Temporary files go to memory: many tests wait for files to be safe, which can take long on a disk."""
    if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > NEEDED:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
    config.stash[WATCHDOG] = os.fdopen(os.dup(2), "w")  # capturing replaces the descriptor during tests


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that several workers end together."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What the packages made lives as long as the process: collections need not look at it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[WATCHDOG].close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """End the process where the limit of setup.cfg cannot: code in C that does not return sees no signal."""
    limit = float(item.config.getini("timeout"))
    faulthandler.dump_traceback_later(1.5 * limit, exit=True, file=item.config.stash[WATCHDOG])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
