"""Real NCCL: random cases on 2 and 4 ranks, each on a GPU of its own or, with an NCCL that lets them, all on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
SECONDS = 540

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(SECONDS + 30),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def environment(world: int) -> dict[str, str]:
    """What the ranks need; skips where they cannot run."""
    found = {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])}
    if torch.cuda.device_count() >= world:
        return found
    if "nccl" not in os.environ.get("LD_PRELOAD", ""):
        pytest.skip(
            f"{world} ranks need {world} GPUs, {torch.cuda.device_count()} found; to share one, set LD_PRELOAD to the "
            "libnccl.so.2 of NCCL 2.30 or newer"
        )
    return found | {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("script", "rounds"), [("gpu_ranks.py", 12), ("gpu_sequence_ranks.py", 6)])
def test_random_cases(script: str, rounds: int, world: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    process = subprocess.Popen(
        [*command, str(TESTS / script), "--rounds", str(rounds)],
        env={**os.environ, **environment(world)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        out, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        out, _ = process.communicate()
    assert process.returncode == 0, out[-5000:]
    assert out.count("OK rank") == world, out[-5000:]
