"""Nodes with file systems of their own: what a checkpoint needs all ranks to see, looked for before it is needed."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from pathlib import Path

import torch.distributed as dist

from fluid_hf.control import ControlGroup
from fluid_hf.errors import CheckpointError

__all__ = ["check_found_alike", "check_node_local", "check_shared"]

# A network file system may show a new file to other nodes only after a while.
PATIENCE_SECONDS = 30.0


def check_shared(folder: Path, control: ControlGroup, what: str) -> None:
    """Raise unless all ranks see what rank 0 writes to a folder. Collective over all ranks.

    Raises:
        CheckpointError: on every rank: some do not see it, or rank 0 cannot write there.
        CollectiveError: not every rank called it in time.
    """
    marker, problem = folder / f".fluid_hf.{uuid.uuid4().hex[:8]}.marker", ""
    if dist.get_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            marker.touch()
        except OSError as error:
            problem = str(error)
    name, problem = control.gather((marker.name, problem), what)[0]
    seen = bool(problem) or _appears(folder / name)
    blind = [rank for rank, found in enumerate(control.gather(seen, what)) if not found]
    if dist.get_rank() == 0:
        with contextlib.suppress(OSError):
            marker.unlink(missing_ok=True)
    if problem:
        raise CheckpointError(f"folder ({folder}) must be one that rank 0 can write: {problem}; choose another one.")
    if blind:
        raise CheckpointError(
            f"folder ({folder}) must be on a file system that all ranks share, but rank {', '.join(map(str, blind))} "
            "did not see what rank 0 wrote there; choose a shared folder, or keep each rank's part on its node: "
            "ZeRO 3 with TrainingArguments(save_on_each_node=True)."
        )


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        # Listing the folder makes NFS ask its server, where a look at the file alone may be answered from memory.
        with contextlib.suppress(OSError):
            if path.name in os.listdir(path.parent):
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def check_node_local(stage: int, *, split: bool) -> None:
    """Raise if DeepSpeed's files on each node would not be enough to resume from.

    Args:
        stage: of ZeRO.
        split: whether the model has split experts that are trained.

    Raises:
        CheckpointError: below stage 3 the dense weights and the experts are written on one node only.
    """
    if split and stage < 3:
        raise CheckpointError(
            f"zero_optimization.stage ({stage}) must be 3 for checkpoints of split experts on each node's own disk "
            "(save_on_each_node, use_node_local_storage): below, DeepSpeed writes weights on the first node only; "
            "save to a folder that all nodes share, or take ZeRO 3."
        )


def check_found_alike(path: Path, control: ControlGroup, what: str) -> None:
    """Raise if a file or folder is there for some ranks only. Collective over all ranks.

    Raises:
        CheckpointError: on every rank.
    """
    found = control.gather(path.exists(), what)
    if any(found) and not all(found):
        missing = ", ".join(str(rank) for rank, there in enumerate(found) if not there)
        raise CheckpointError(
            f"checkpoint ({path}) must be there for all ranks, but rank {missing} did not find it; resume from a "
            "folder that all nodes share, or copy it to every node."
        )
