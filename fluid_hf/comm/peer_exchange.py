"""Exchange of rows between the ranks of one group: isend/irecv waves, and all-to-all as the serial reference.

Works on any `torch.distributed` backend with send and recv (gloo, NCCL). Both sides skip an empty message by the same
counts, so a rank with nothing to send still takes part in every wave.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from fluid_hf.comm.host_reader import HostReader

__all__ = ["ExchangeHandle", "PeerExchange", "PeerTensor"]

PeerTensor = tuple[int, torch.Tensor]


class ExchangeHandle:
    """Communication in flight. Holds every buffer until the waiting stream has seen it complete."""

    def __init__(self, owner: PeerExchange, works: list[dist.Work], buffers: list[torch.Tensor]) -> None:
        self._owner = owner
        self._works = works
        self._buffers = buffers

    def wait(self) -> None:
        """Wait for arrival and departure: gloo blocks the host, NCCL only makes the current stream wait."""
        for work in self._works:
            work.wait()
        # Freed only now: memory reused by the current stream is ordered after the communication it waited for.
        self._works, self._buffers = [], []
        self._owner._in_flight.discard(self)


class PeerExchange:
    """Point-to-point and all-to-all exchange inside one process group.

    Args:
        group: process group of the exchanging ranks; `None` with `size` 1.
        rank: this rank inside the group.
        size: ranks in the group.

    Attributes:
        bytes_sent: bytes handed to the process group for other ranks since construction.
        host_reader: reads counts that arrived on the device.
    """

    def __init__(self, group: dist.ProcessGroup | None, rank: int, size: int) -> None:
        self.group = group
        self.rank = rank
        self.size = size
        self.bytes_sent = 0
        self.host_reader = HostReader()
        self._in_flight: set[ExchangeHandle] = set()
        self._global_ranks = dist.get_process_group_ranks(group) if group is not None else [0]
        self._batched = group is not None and dist.get_backend(group) == "nccl"

    def post(self, sends: Sequence[PeerTensor], recvs: Sequence[PeerTensor]) -> ExchangeHandle:
        """Start one wave: send and receive `(group rank, contiguous tensor)` pairs; empty ones are skipped."""
        sends = [(peer, tensor) for peer, tensor in sends if tensor.numel()]
        recvs = [(peer, tensor) for peer, tensor in recvs if tensor.numel()]
        self.bytes_sent += sum(tensor.numel() * tensor.element_size() for _, tensor in sends)
        works: list[dist.Work] = []
        if self._batched and (sends or recvs):
            # One NCCL group call: both directions and all peers of the wave progress together.
            ops = [dist.P2POp(dist.isend, tensor, self._global_ranks[peer], self.group) for peer, tensor in sends]
            ops += [dist.P2POp(dist.irecv, tensor, self._global_ranks[peer], self.group) for peer, tensor in recvs]
            works = dist.batch_isend_irecv(ops)
        elif self.group is not None:
            works = [self.group.send([tensor], peer, 0) for peer, tensor in sends]
            works += [self.group.recv([tensor], peer, 0) for peer, tensor in recvs]
        return self._track(works, [tensor for _, tensor in (*sends, *recvs)])

    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, output_splits: list[int], input_splits: list[int]
    ) -> ExchangeHandle:
        """Start one uneven all-to-all along dimension 0; the reference for every wave schedule."""
        row_bytes = input[:1].numel() * input.element_size() if input.shape[0] else 0
        self.bytes_sent += row_bytes * (sum(input_splits) - input_splits[self.rank])
        work = dist.all_to_all_single(output, input, output_splits, input_splits, group=self.group, async_op=True)
        return self._track([work], [output, input])

    def drain(self) -> None:
        """Wait for communication that nobody waited for (a recomputation that stopped early leaves some behind)."""
        for handle in list(self._in_flight):
            handle.wait()

    def _track(self, works: list[dist.Work], buffers: list[torch.Tensor]) -> ExchangeHandle:
        handle = ExchangeHandle(self, works, buffers)
        self._in_flight.add(handle)
        return handle
