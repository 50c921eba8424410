"""Speed of the link between the ranks of a group, and of their hosts, agreed between them."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from fluid_hf.comm.peer_exchange import PeerExchange

__all__ = ["measure_launch", "measure_link"]

MESSAGE_BYTES = 8 << 20


def measure_link(exchange: PeerExchange, device: torch.device, repeats: int = 5) -> float:
    """Bytes per second in each direction with all peers at once: the slowest rank's. Collective over the group.

    It also connects every pair of ranks: NCCL would do so inside the first layer.
    """
    peers = [peer for peer in range(exchange.size) if peer != exchange.rank]
    sent = torch.ones(exchange.size, MESSAGE_BYTES, dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    before = exchange.bytes_sent
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(repeats):
        start.record()
        exchange.post([(p, sent[p]) for p in peers], [(p, received[p]) for p in peers]).wait()
        end.record()
        end.synchronize()  # host synchronisation: once per model
        times.append(start.elapsed_time(end) / 1e3)
    exchange.bytes_sent = before
    speed = torch.tensor([len(peers) * MESSAGE_BYTES / min(times)], device=device, dtype=torch.float64)
    dist.all_reduce(speed, dist.ReduceOp.MIN, group=exchange.group)
    return float(speed)


def measure_launch(exchange: PeerExchange | None, device: torch.device, repeats: int = 10) -> float:
    """Seconds of the host for one small operation: the slowest rank's. Collective over the group, if there is one."""
    value = torch.zeros(8, device=device)
    fastest = float("inf")  # of several tries: a host that does something else meanwhile says nothing
    for _ in range(repeats):
        torch.cuda.synchronize(device)  # host synchronisation: once per model
        start = time.perf_counter()
        for _ in range(20):
            value.add_(1.0)
        fastest = min(fastest, (time.perf_counter() - start) / 20)
    seconds = torch.tensor([fastest], device=device, dtype=torch.float64)
    if exchange is not None:
        dist.all_reduce(seconds, dist.ReduceOp.MAX, group=exchange.group)
    return float(seconds)
