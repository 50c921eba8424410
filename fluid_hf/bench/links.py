"""What a benchmark's ranks talk over: the mirror link in one process, or NCCL or gloo under a launcher."""

from __future__ import annotations

import contextlib
import datetime
import os
import random
import socket
from collections.abc import Iterator

import torch
import torch.distributed as dist

from fluid_hf.bench.mirror import init_mirror
from fluid_hf.comm.peer_exchange import PeerExchange
from fluid_hf.errors import ConfigError
from fluid_hf.process_groups import ParallelGroups, with_exchange_groups

__all__ = ["LINKS", "exchange_of", "free_port", "is_first", "link_world", "several_processes", "world_sizes"]

LINKS = ("mirror", "nccl", "gloo")
PORTS = range(12_000, 30_000)  # below those that the system gives to connections


@contextlib.contextmanager
def link_world(link: str, mirror_size: int = 1, timeout: float = 300.0) -> Iterator[torch.device]:
    """A context with torch.distributed initialised where more than one rank takes part; gives this rank's device.

    Args:
        link: one of `LINKS`. `nccl` and `gloo` read the ranks from what `torchrun` or `deepspeed` left behind; without
            a launcher they are one process. Where torch.distributed is initialised already, it stays as it is.
        mirror_size: ranks that the mirror link plays.
        timeout: seconds after which a collective that hangs ends the run.

    Raises:
        ConfigError: `nccl` without a GPU.
    """
    if link == "nccl" and not torch.cuda.is_available():
        raise ConfigError("link (nccl) must have a GPU on every rank, there is none; use --link gloo, or see `doctor`.")
    cuda = torch.cuda.is_available() and link != "gloo"
    started = not dist.is_initialized() and (mirror_size > 1 if link == "mirror" else "RANK" in os.environ)
    if cuda and link == "nccl" and started:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if started and link == "mirror":
        init_mirror(mirror_size)
    elif started:
        dist.init_process_group(link, timeout=datetime.timedelta(seconds=timeout))
    try:
        yield torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    finally:
        if started and dist.is_initialized():
            dist.destroy_process_group()


def world_sizes(link: str, asked: list[int] | None) -> list[int]:
    """The expert-parallel sizes to time.

    Raises:
        ConfigError: real ranks cannot form a group of a size that was asked for.
    """
    if link == "mirror":
        return asked or [2]
    world = int(os.environ.get("WORLD_SIZE", "1"))
    for size in asked or []:
        if size not in (1, world):
            raise ConfigError(
                f"ep ({size}) must be 1 or the number of ranks ({world}) on {link}; start as many ranks with torchrun."
            )
    return asked or [world]


def several_processes() -> bool:
    """Whether other processes take part: the mirror link plays them all in one."""
    return dist.is_initialized() and dist.get_world_size() > 1 and dist.get_backend() != "mirror"


def is_first() -> bool:
    """Whether this process prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def free_port() -> int:
    """A port that nobody listens on, and that no connection is given while ranks start, which takes seconds.

    Raises:
        OSError: none was found.
    """
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no free port between {PORTS.start} and {PORTS.stop}")


def exchange_of(size: int) -> PeerExchange:
    """The exchange of a layer over all ranks as a patched model has it; of size 1 without any. Collective."""
    if size == 1:
        return PeerExchange(None, 0, 1)
    rank, world = dist.get_rank(), dist.group.WORLD
    groups = with_exchange_groups(ParallelGroups(size, rank, world, None, size), None)
    return PeerExchange(groups.ep_exchange, rank, size)
