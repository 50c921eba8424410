"""Mirror link: one process is rank 0 of a world whose peers all return what they were sent.

Every byte makes a real trip over PCIe, device to pinned host memory on one copy engine and back on the other, in
blocks, so that both directions run at once as on a full-duplex network card. Unmodified code that uses
all_to_all_single or isend/irecv runs on it, so libraries are compared side by side on one GPU.

It shows how well communication hides behind computation at that link's bandwidth. It does not show NVLink, the SMs that
NCCL's kernels take, imbalance between ranks, or stragglers. On the CPU it copies at once and shows nothing but results.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["MirrorGroup", "init_mirror"]

BLOCK_BYTES = 8 << 20
POOL_BYTES = 1 << 30
NUM_EVENTS = 4096


class _Link:
    """The two copy engines, driven through the CUDA runtime: a block costs the host a few microseconds, not fifty."""

    def __init__(self) -> None:
        loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libcudart" in line}
        self._runtime = ctypes.CDLL(sorted(loaded)[0])
        self.out, self.back = torch.cuda.Stream(), torch.cuda.Stream()
        self._streams = [ctypes.c_void_p(stream.cuda_stream) for stream in (self.out, self.back)]
        self._pool = torch.empty(POOL_BYTES, dtype=torch.uint8, pin_memory=True)
        self._offset = 0
        self._events = [torch.cuda.Event() for _ in range(NUM_EVENTS)]
        for event in self._events:
            event.record()
        self._handles = [ctypes.c_void_p(event.cuda_event) for event in self._events]
        self._next = 0

    def now(self) -> torch.cuda.Event:
        """An event recorded on the current stream."""
        self._next = (self._next + 1) % NUM_EVENTS
        event = self._events[self._next]
        event.record()
        return event

    def cross(self, source: torch.Tensor, target: torch.Tensor, size: int) -> torch.cuda.Event:
        """Queue the copy block by block; the event of arrival."""
        if self._offset + size > POOL_BYTES:
            self._offset = 0
        runtime, (out, back) = self._runtime, self._streams
        host, x, y = self._pool.data_ptr() + self._offset, source.data_ptr(), target.data_ptr()
        self._offset += -(-size // 512) * 512
        for start in range(0, size, BLOCK_BYTES):
            length = ctypes.c_size_t(min(BLOCK_BYTES, size - start))
            self._next = (self._next + 1) % NUM_EVENTS
            handle = self._handles[self._next]
            middle = ctypes.c_void_p(host + start)
            failed = runtime.cudaMemcpyAsync(middle, ctypes.c_void_p(x + start), length, 2, out)
            failed = failed or runtime.cudaEventRecord(handle, out)
            failed = failed or runtime.cudaStreamWaitEvent(back, handle, 0)
            failed = failed or runtime.cudaMemcpyAsync(ctypes.c_void_p(y + start), middle, length, 1, back)
            if failed:
                raise RuntimeError(f"the CUDA runtime refused a copy (error {failed})")
        self._next = (self._next + 1) % NUM_EVENTS
        event = self._events[self._next]
        event.record(self.back)
        return event


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
        self._link: _Link | None = None

    def _cross(self, source: torch.Tensor, target: torch.Tensor, ready: torch.cuda.Event | None) -> Any:
        """Copy over the link once `ready` has passed; the event of arrival."""
        size = source.numel() * source.element_size()
        MirrorGroup.bytes_on_wire += size
        if source.device.type == "cpu":
            target.view(-1).copy_(source.reshape(-1))
            return None
        link = self._the_link()
        assert ready is not None
        link.out.wait_event(ready)
        link.back.wait_event(ready)
        event = link.cross(source, target, size)
        source.record_stream(link.out)
        target.record_stream(link.back)
        return event

    def _the_link(self) -> _Link:
        if self._link is None:
            self._link = _Link()
        return self._link

    def _now(self, tensor: torch.Tensor) -> torch.cuda.Event | None:
        return self._the_link().now() if tensor.device.type == "cuda" else None

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
            if self._link is not None and free is not None:
                self._link.out.wait_event(free)
                self._link.back.wait_event(free)
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
