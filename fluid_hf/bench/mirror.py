"""Mirror link: one process is rank 0 of a world whose peers all return what they were sent.

Every byte makes a real trip over PCIe, device to pinned host memory on one copy engine and back on the other, in
blocks, so that both directions run at once as on a full-duplex network card. Unmodified code that uses
all_to_all_single or isend/irecv runs on it, so libraries are compared side by side on one GPU.

It shows how well communication hides behind computation at that link's bandwidth. It does not show NVLink, the SMs that
NCCL's kernels take, imbalance between ranks, or stragglers. On the CPU it copies at once and shows nothing but results.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["MirrorGroup", "init_mirror"]

BLOCK_BYTES = 8 << 20
POOL_BYTES = 1 << 30


class _MirrorWork(dist._Work):
    def __init__(self, tensors: list[torch.Tensor], arrival: Callable[[], torch.cuda.Event | None]) -> None:
        super().__init__()
        self._tensors, self._arrival = tensors, arrival

    def wait(self, timeout: Any = None) -> bool:
        event = self._arrival()
        if event is not None:
            torch.cuda.current_stream().wait_event(event)
        return True

    def is_completed(self) -> bool:
        event = self._arrival()
        return event is None or event.query()

    def get_future(self) -> torch.futures.Future[Any]:
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(self._tensors)
        return future

    def result(self) -> list[torch.Tensor]:
        return self._tensors


class MirrorGroup(dist.ProcessGroup):
    """The process group of rank 0; `bytes_on_wire` counts what all groups sent."""

    bytes_on_wire = 0

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._rank, self._size = rank, size
        self._sends: dict[int, deque[Any]] = defaultdict(deque)
        self._recvs: dict[int, deque[Any]] = defaultdict(deque)
        self._lanes: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None

    def _cross(self, source: torch.Tensor, target: torch.Tensor, ready: torch.cuda.Event | None) -> Any:
        """Copy over the link once `ready` has passed; the event of arrival."""
        size = source.numel() * source.element_size()
        MirrorGroup.bytes_on_wire += size
        if source.device.type == "cpu":
            target.view(-1).copy_(source.reshape(-1))
            return None
        if self._lanes is None:
            self._lanes = torch.cuda.Stream(), torch.cuda.Stream()
            self._pool = torch.empty(POOL_BYTES, dtype=torch.uint8, pin_memory=True)
            self._offset = 0
        out, back = self._lanes
        if self._offset + size > POOL_BYTES:
            self._offset = 0
        host = self._pool[self._offset : self._offset + size]
        self._offset += -(-size // 512) * 512
        x, y = source.reshape(-1).view(torch.uint8), target.view(-1).view(torch.uint8)
        assert ready is not None
        out.wait_event(ready)
        back.wait_event(ready)
        blocks = [(start, min(size, start + BLOCK_BYTES)) for start in range(0, size, BLOCK_BYTES)]
        with torch.cuda.stream(out):
            arrived = []
            for start, end in blocks:
                host[start:end].copy_(x[start:end], non_blocking=True)
                arrived.append(out.record_event())
        with torch.cuda.stream(back):
            for (start, end), event in zip(blocks, arrived, strict=True):
                back.wait_event(event)
                y[start:end].copy_(host[start:end], non_blocking=True)
        source.record_stream(out)
        target.record_stream(back)
        return back.record_event()

    @staticmethod
    def _now(tensor: torch.Tensor) -> torch.cuda.Event | None:
        return torch.cuda.current_stream().record_event() if tensor.device.type == "cuda" else None

    def alltoall_base(self, output: Any, input: Any, out_splits: Any, in_splits: Any, opts: Any = None) -> _MirrorWork:
        even = [input.shape[0] // self._size] * self._size
        ins, outs = list(in_splits) or even, list(out_splits) or even
        assert ins == outs, f"a mirror needs symmetric splits, got {ins} and {outs}"
        ready, last, start = self._now(input), None, 0
        for peer, size in enumerate(ins):
            if peer == self._rank:
                output[start : start + size].copy_(input[start : start + size])
            elif size:
                last = self._cross(input[start : start + size], output[start : start + size], ready)
            start += size
        return _MirrorWork([output], lambda: last)

    all_to_all_single = alltoall_base

    def _pair(self, peer: int) -> None:
        while self._sends[peer] and self._recvs[peer]:
            source, ready, sent = self._sends[peer].popleft()
            target, free, received = self._recvs[peer].popleft()
            if self._lanes is not None and free is not None:
                for lane in self._lanes:
                    lane.wait_event(free)
            event = self._cross(source, target, ready)
            sent.append(event)
            received.append(event)

    def send(self, tensors: Any, dst: int, tag: int = 0) -> _MirrorWork:
        box: list[Any] = []
        self._sends[dst].append((tensors[0], self._now(tensors[0]), box))
        self._pair(dst)
        return _MirrorWork(tensors, lambda: box[0])

    def recv(self, tensors: Any, src: int, tag: int = 0) -> _MirrorWork:
        box: list[Any] = []
        self._recvs[src].append((tensors[0], self._now(tensors[0]), box))
        self._pair(src)
        return _MirrorWork(tensors, lambda: box[0])

    def allreduce(self, tensors: Any, opts: Any = None) -> _MirrorWork:
        return _MirrorWork(tensors, lambda: None)

    def allgather(self, outs: Any, ins: Any, opts: Any = None) -> _MirrorWork:
        for out in outs[0]:
            out.copy_(ins[0])
        return _MirrorWork(outs, lambda: None)

    def _allgather_base(self, out: Any, inp: Any, opts: Any = None) -> _MirrorWork:
        out.view(self._size, -1).copy_(inp.reshape(1, -1).expand(self._size, -1))
        return _MirrorWork([out], lambda: None)

    def broadcast(self, tensors: Any, opts: Any = None) -> _MirrorWork:
        return _MirrorWork(tensors, lambda: None)

    def barrier(self, opts: Any = None) -> _MirrorWork:
        return _MirrorWork([torch.ones(1)], lambda: None)

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank

    def getBackendName(self) -> str:  # noqa: N802 - the name torch calls
        return "mirror"

    @property
    def group_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]


def init_mirror(world_size: int) -> None:
    """Make torch.distributed's default group a mirror world of that size."""
    if not hasattr(dist.Backend, "MIRROR"):
        dist.Backend.register_backend(
            "mirror", lambda store, rank, size, timeout: MirrorGroup(rank, size), devices=["cpu", "cuda"]
        )
    dist.init_process_group("mirror", rank=0, world_size=world_size, store=dist.HashStore())
