"""Mirror link: one process is rank 0 of a world whose peers all return what they were sent.

Every byte makes a real trip over PCIe, device to pinned host memory on one copy engine and back on the other, in
blocks, so that both directions run at once as on a full-duplex network card. Unmodified code that uses
all_to_all_single or isend/irecv runs on it, so libraries are compared side by side on one GPU.

It shows how well communication hides behind computation at that link's bandwidth. It does not show NVLink, the SMs that
NCCL's kernels take, imbalance between ranks, or stragglers. On the CPU it copies at once and shows nothing but results.
"""

from __future__ import annotations

import ctypes
import itertools
from collections import defaultdict, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

__all__ = ["MirrorGroup", "init_mirror"]

BLOCK_BYTES = 8 << 20
POOL_BYTES = 1 << 30
NUM_EVENTS = 8192
MAX_WORKS = 2048  # more than are ever in flight
HELD_WORKS = 128  # the latest ones, which hold what crosses until they are waited for


class _Moment(NamedTuple):
    """What a stream had been given when an event was recorded on it.

    Attributes:
        stream, event: the runtime's handles.
        number: counts the recorded moments, those of other streams too.
    """

    stream: int
    number: int
    event: int


class _Link:
    """The two copy engines, driven through the CUDA runtime.

    torch's events and streams cost the host 10 to 30 us a call, more than NCCL's own posting; the runtime's cost two.
    Events are numbers from a ring. Calls are chained by `or`: the first that fails ends the chain with its error.
    """

    def __init__(self) -> None:
        loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libcudart" in line}
        # Nothing that is called here waits for the device, so Python's lock is not given up for it.
        runtime = ctypes.PyDLL(sorted(loaded)[0])
        address, size, kind = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        self._record, self._passed = runtime.cudaEventRecord, runtime.cudaEventQuery
        self._wait, self._copy = runtime.cudaStreamWaitEvent, runtime.cudaMemcpyAsync
        self._record.argtypes, self._passed.argtypes = [address, address], [address]
        self._wait.argtypes = [address, address, ctypes.c_uint]
        self._copy.argtypes = [address, address, size, kind, address]
        self._device = torch.cuda.current_device()
        self.out, self.back = torch.cuda.Stream(), torch.cuda.Stream()
        self._streams = (self.out.cuda_stream, self.back.cuda_stream)
        self._pool = torch.empty(POOL_BYTES, dtype=torch.uint8, pin_memory=True)
        self._host, self._offset = self._pool.data_ptr(), 0
        self._torch_events = [torch.cuda.Event() for _ in range(NUM_EVENTS)]
        for event in self._torch_events:
            event.record()
        self._events = itertools.cycle([event.cuda_event for event in self._torch_events])
        self._numbers = itertools.count()

    def now(self) -> _Moment:
        """What the current stream holds."""
        stream, event = torch._C._cuda_getCurrentRawStream(self._device), next(self._events)
        _check(self._record(event, stream))
        return _Moment(stream, next(self._numbers), event)

    def hold(self, *moments: _Moment) -> None:
        """Let nothing cross before these.

        One engine waits: what comes back waits for that one, block by block. Of two moments of one stream the later
        one is enough.
        """
        if len(moments) == 2 and moments[0].stream == moments[1].stream:
            moments = (max(moments),)
        for moment in moments:
            _check(self._wait(self._streams[0], moment.event, 0))

    def joined(self) -> int:
        """An event behind all that crossed and all that the current stream holds."""
        back, event = self._streams[1], next(self._events)
        _check(self._wait(back, self.now().event, 0) or self._record(event, back))
        return event

    def wait(self, event: int) -> None:
        """Let the current stream wait."""
        _check(self._wait(torch._C._cuda_getCurrentRawStream(self._device), event, 0))

    def query(self, event: int) -> bool:
        """Whether the event has passed."""
        return bool(self._passed(event) == 0)

    def cross(self, source: torch.Tensor, target: torch.Tensor, size: int) -> int:
        """Queue the copy block by block; the event of arrival."""
        if self._offset + size > POOL_BYTES:
            self._offset = 0
        copy, record, wait, events, (out, back) = self._copy, self._record, self._wait, self._events, self._streams
        host, x, y = self._host + self._offset, source.data_ptr(), target.data_ptr()
        self._offset += -(-size // 512) * 512
        step = -(-size // (512 * max(1, round(size / BLOCK_BYTES)))) * 512  # blocks of about equal sizes
        for start in range(0, size, step):
            length, event = min(step, size - start), next(events)
            _check(
                copy(host + start, x + start, length, 2, out)
                or record(event, out)
                or wait(back, event, 0)
                or copy(y + start, host + start, length, 1, back)
            )
        arrival = next(events)
        _check(record(arrival, back))
        return arrival


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"the CUDA runtime refused a call of the mirror link (error {status})")


class _MirrorWork(dist._Work):
    """Work of one call. Making one costs the host 90 us, so those of a ring are used again and again.

    Attributes:
        held: what crosses, kept until a stream waits for its arrival. That is how NCCL's process group keeps memory
            from being used again too early (torch 2.8 and later); `record_stream` costs the host an event for each
            tensor, and queries in every allocation until it has passed.
    """

    tensors: list[torch.Tensor]
    held: Sequence[torch.Tensor] = ()
    arrival: list[Any]
    link: _Link | None

    def wait(self, timeout: Any = None) -> bool:
        if self.arrival and self.link is not None:
            self.link.wait(self.arrival[0])
            self.held = ()
        self.tensors = []  # a work lives on in the ring
        return True

    def let_go(self) -> None:
        """Of what nobody waited for: the memory is used again once it has crossed, whoever frees it when."""
        for tensor in self.held:
            assert self.link is not None
            tensor.record_stream(self.link.out)
            tensor.record_stream(self.link.back)
        self.held = ()

    def is_completed(self) -> bool:
        return not self.arrival or self.link is None or self.link.query(self.arrival[0])

    def get_future(self) -> torch.futures.Future[Any]:
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(self.tensors)
        return future

    def result(self) -> list[torch.Tensor]:
        return self.tensors


# A tensor that is sent or received, what its stream held then, and the event of arrival once it crosses.
_Posted = tuple[torch.Tensor, _Moment | None, list[Any]]


class MirrorGroup(dist.ProcessGroup):
    """The process group of rank 0; `bytes_on_wire` counts what all groups sent."""

    bytes_on_wire = 0
    plays_all_ranks = True

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._rank, self._size = rank, size
        self._sends: dict[int, deque[_Posted]] = defaultdict(deque)  # those whose other side was not posted yet
        self._recvs: dict[int, deque[_Posted]] = defaultdict(deque)
        self._link: _Link | None = None
        self._works: deque[_MirrorWork] = deque()

    def _work(
        self, tensors: list[torch.Tensor], arrival: list[Any], crossing: Sequence[torch.Tensor] = ()
    ) -> _MirrorWork:
        work = self._works.popleft() if len(self._works) >= MAX_WORKS else _MirrorWork()
        self._works.append(work)
        work.tensors, work.arrival, work.link, work.held = tensors, arrival, self._link, crossing
        if self._link is not None:
            self._works[-HELD_WORKS].let_go()
        return work

    def _cross(self, source: torch.Tensor, target: torch.Tensor, arrival: list[Any]) -> None:
        """Copy over the link once what holds it has passed; adds the event of arrival. The work holds the tensors."""
        size = source.numel() * source.element_size()
        MirrorGroup.bytes_on_wire += size
        if not source.is_cuda:
            target.view(-1).copy_(source.reshape(-1))
            return
        arrival[:] = [self._the_link().cross(source, target, size)]

    def _the_link(self) -> _Link:
        if self._link is None:
            self._link = _Link()
            # All of the ring at once: otherwise the first calls, which are the measured ones, would make the works.
            self._works.extend(_MirrorWork() for _ in range(MAX_WORKS - len(self._works)))
        return self._link

    def _now(self, tensor: torch.Tensor) -> _Moment | None:
        return self._the_link().now() if tensor.is_cuda else None

    def alltoall_base(self, output: Any, input: Any, out_splits: Any, in_splits: Any, opts: Any = None) -> _MirrorWork:
        even = [input.shape[0] // self._size] * self._size
        ins, outs = list(in_splits) or even, list(out_splits) or even
        assert ins == outs, f"a mirror needs symmetric splits, got {ins} and {outs}"
        arrival: list[Any] = []
        ready = self._now(input)
        if ready is not None:
            self._the_link().hold(ready)
        start = sum(ins[: self._rank])
        end = start + ins[self._rank]
        # What lies together crosses together: a library's collective is one call for the host, however many peers.
        for first, last in ((0, start), (end, sum(ins))):
            if first < last:
                self._cross(input[first:last], output[first:last], arrival)
        if start < end:
            output[start:end].copy_(input[start:end])
            if ready is not None:  # the stream that waits may be another one than this copy's
                arrival[:] = [self._the_link().joined()]
        return self._work([output], arrival, (output, input) if arrival else ())

    all_to_all_single = alltoall_base

    def _meet(self, send: _Posted, recv: _Posted) -> None:
        (source, ready, sent), (target, free, received) = send, recv
        if ready is not None and free is not None:
            self._the_link().hold(ready, free)
        self._cross(source, target, sent)
        received[:] = sent

    def send(self, tensors: Any, dst: int, tag: int = 0) -> _MirrorWork:
        posted: _Posted = (tensors[0], self._now(tensors[0]), [])
        waiting = self._recvs[dst]
        if waiting:
            self._meet(posted, waiting.popleft())
        else:
            self._sends[dst].append(posted)
        return self._work(tensors, posted[2], posted[:1] if posted[1] is not None else ())

    def recv(self, tensors: Any, src: int, tag: int = 0) -> _MirrorWork:
        posted: _Posted = (tensors[0], self._now(tensors[0]), [])
        waiting = self._sends[src]
        if waiting:
            self._meet(waiting.popleft(), posted)
        else:
            self._recvs[src].append(posted)
        return self._work(tensors, posted[2], posted[:1] if posted[1] is not None else ())

    def allreduce(self, tensors: Any, opts: Any = None) -> _MirrorWork:
        if opts is not None and opts.reduceOp == dist.ReduceOp.SUM:
            for tensor in tensors:  # every rank holds the same
                tensor.mul_(self._size)
        return self._work(tensors, [])

    def allgather(self, outs: Any, ins: Any, opts: Any = None) -> _MirrorWork:
        for out in outs[0]:
            out.copy_(ins[0])
        return self._work(outs, [])

    def _allgather_base(self, out: Any, inp: Any, opts: Any = None) -> _MirrorWork:
        out.view(self._size, -1).copy_(inp.reshape(1, -1).expand(self._size, -1))
        return self._work([out], [])

    def broadcast(self, tensors: Any, opts: Any = None) -> _MirrorWork:
        return self._work(tensors, [])

    def barrier(self, opts: Any = None) -> _MirrorWork:
        return self._work([torch.ones(1)], [])

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
