"""The rank pool and the launcher: what comes back when ranks return, raise, die or hang."""

from __future__ import annotations

import os
import time
from pathlib import Path

import distributed
import psutil
import pytest
import torch.distributed as dist
from distributed import RankError, RankPool, launch, rank_pool

pool2 = rank_pool(2)


def run_echo(rank: int, world_size: int, value: int, *, scale: int = 1) -> tuple[int, int, int]:
    return rank, world_size, value * scale


def run_raise(rank: int, world_size: int) -> None:
    raise KeyError(f"rank {rank} of {world_size}")


def run_first_raises(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("the cause")
    dist.barrier()


def run_die(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(3)


def run_hang(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(600)


def test_results_come_in_rank_order(pool2: RankPool) -> None:
    assert pool2.run(run_echo, 3, scale=2) == [(0, 2, 6), (1, 2, 6)]


def test_errors_name_their_rank_and_type(pool2: RankPool) -> None:
    assert pool2.expect("KeyError", run_raise) == ["'rank 0 of 2'", "'rank 1 of 2'"]
    with pytest.raises(RankError, match="rank 1 of 2") as caught:
        pool2.run(run_raise)
    assert [failure.kind for failure in caught.value.failures.values()] == ["KeyError", "KeyError"]


def test_error_is_reported_when_the_other_rank_waits_for_it(pool2: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "GRACE", 1.0)
    with pytest.raises(RankError, match="the cause") as caught:
        pool2.run(run_first_raises)
    assert {rank: failure.kind for rank, failure in caught.value.failures.items()} == {
        0: "RankTimeoutError",
        1: "ValueError",
    }
    assert pool2.run(run_echo, 1) == [(0, 2, 1), (1, 2, 1)]


def test_dead_rank_is_reported_and_replaced(pool2: RankPool) -> None:
    with pytest.raises(RankError, match="rank 1: died with exit code 3"):
        pool2.run(run_die)
    assert pool2.run(run_echo, 1) == [(0, 2, 1), (1, 2, 1)]


def test_hang_is_ended_at_the_timeout(pool2: RankPool) -> None:
    pool2.run(run_echo, 1)  # the ranks have started
    with pytest.raises(TimeoutError, match=r"run_hang: ranks \[1\] did not finish within 2 s"):
        pool2.run(run_hang, timeout=2)
    assert pool2.run(run_echo, 1) == [(0, 2, 1), (1, 2, 1)]


def test_launched_ranks_are_killed_at_the_timeout(tmp_path: Path) -> None:
    script = tmp_path / "hang.py"
    script.write_text("import time; time.sleep(600)\n")
    with pytest.raises(AssertionError, match="did not end within 6 s"):
        launch(script, launcher="torchrun", timeout=6)
    running = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not any(str(script) in command for command in running)
