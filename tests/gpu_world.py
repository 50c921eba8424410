"""Ranks of a script that must not hang unseen: device, process group, a line per case, all stacks if one is stuck."""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

FIRST_SECONDS, CASE_SECONDS = 300, 90  # kernels are compiled in the first cases
ALLOWED = 1e-5

Compare = Callable[[int, int, int, torch.device], float]


def run_cases(description: str | None, rounds: int, compare: Compare) -> None:
    """Run `compare(seed, rank, world, device)`, the worst error of a random case, on all ranks; prints OK per rank.

    A rank that is stuck writes the stacks of all its threads and ends, and with it the run.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="random cases")
    parser.add_argument("--cpu", action="store_true", help="on the CPU with gloo")
    options = parser.parse_args()
    if not (options.cpu or torch.cuda.is_available()):
        parser.error("needs a GPU; --cpu runs the same cases with gloo")
    faulthandler.dump_traceback_later(FIRST_SECONDS, exit=True)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = _start(rank, options.cpu)
    worst = 0.0
    for seed in range(options.rounds):
        faulthandler.dump_traceback_later(FIRST_SECONDS if seed < 2 else CASE_SECONDS, exit=True)
        begin = time.monotonic()
        error = compare(seed, rank, world, device)  # its comparisons wait for the device
        if rank == 0:
            print(f"case {seed}: error {error:.1e}, {time.monotonic() - begin:.1f} s", flush=True)
        assert error <= ALLOWED, f"rank {rank}, case {seed}: error {error:.2e}"
        worst = max(worst, error)
    print(f"OK rank {rank} of {world}: {options.rounds} cases, worst error {worst:.2e}", flush=True)
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


def _start(rank: int, cpu: bool) -> torch.device:
    timeout = datetime.timedelta(seconds=FIRST_SECONDS)
    if cpu:
        dist.init_process_group("gloo", timeout=timeout)
        return torch.device("cpu")
    index = rank % torch.cuda.device_count()  # several ranks may share a GPU
    os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed takes the device from it
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device, timeout=timeout)
    dist.all_reduce(torch.ones(1, device=device))
    return device
