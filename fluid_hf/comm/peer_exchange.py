"""Exchange of rows between the ranks of one group: isend/irecv waves, and all-to-all as the serial reference.

Works on any `torch.distributed` backend with send and recv (gloo, NCCL). Both sides skip an empty message by the same
counts, so a rank with nothing to send still takes part in every wave.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from fluid_hf.comm.call_form import NUM_WORDS, check_forms
from fluid_hf.comm.faults import peer_error, raise_flagged
from fluid_hf.comm.host_reader import HostReader, wait_in_time
from fluid_hf.comm.reduce import all_gather_in_time, all_reduce_in_time, meet_first, meet_in_time
from fluid_hf.comm.side_stream import SideStream, record
from fluid_hf.comm.spared import AS_IT_IS, Spared
from fluid_hf.errors import PeerError
from fluid_hf.overlap.sampler import OverlapSampler
from fluid_hf.process_groups import backend_of
from fluid_hf.ranges import span

__all__ = ["ExchangeHandle", "PeerExchange", "PeerTensor"]

PeerTensor = tuple[int, torch.Tensor]
Place = tuple[str, str, int]


class ExchangeHandle:
    """Communication in flight. Holds every buffer until the waiting stream has seen it complete."""

    __slots__ = ("_buffers", "_flight", "_number", "_owner", "_peers", "_place", "_sampler", "_works")

    def __init__(
        self, owner: PeerExchange, works: list[dist.Work], buffers: list[torch.Tensor], peers: Sequence[int]
    ) -> None:
        self._owner = owner
        self._works = works
        self._peers = peers
        self._place = owner.place
        self._buffers = buffers
        self._number = owner.num_posted
        self._sampler = owner.sampler
        self._flight = None if self._sampler is None else self._sampler.post(works)

    def wait(self) -> None:
        """Wait for arrival and departure: gloo blocks the host, NCCL only makes the current stream wait."""
        if self._sampler is not None and self._flight is not None:
            self._sampler.begin_wait(self._flight)
        if torch.autograd._profiler_enabled():
            with span("wait", self._owner.name, self._number):
                self._wait_for_all()
        else:
            self._wait_for_all()
        if self._sampler is not None and self._flight is not None:
            self._sampler.end_wait(self._flight)
            self._flight = None
        # Freed only now: memory reused by the current stream is ordered after the communication it waited for.
        self._works, self._buffers = [], []
        self._owner._in_flight.discard(self)

    def _wait_for_all(self) -> None:
        if self._owner.host_waits and self._buffers and self._buffers[0].device.type in self._owner.host_waits:
            for index, work in enumerate(self._works):
                self._wait_on_host(work, index)
        else:
            for work in self._works:
                work.wait()

    def _wait_on_host(self, work: dist.Work, index: int) -> None:
        owner = self._owner
        try:
            work.wait(datetime.timedelta(seconds=owner.timeout_seconds))
        except RuntimeError as error:
            self._works, self._buffers = [], []
            owner._in_flight.clear()  # nothing of this group can arrive any more
            raise owner.fault(error, self._peers[index : index + 1], self._place) from error


class PeerExchange:
    """Point-to-point and all-to-all exchange inside one process group.

    Args:
        group: process group of the exchanging ranks; `None` with `size` 1.
        rank: this rank inside the group.
        size: ranks in the group.

    Attributes:
        counting: whether what is sent now is added to `bytes_sent`.
        bytes_sent: bytes handed to the process group for other ranks since construction.
        host_reader: reads counts that arrived on the device.
        side_stream: posts what was ready at a mark, behind work that was queued since.
        num_posted: exchanges started since construction.
        name: tells the exchanges of a process apart in a profile.
        sampler: measures the exchanges of a step, while one is sampled.
        timeout_seconds: how long a rank waits for another one.
        ranks: global ranks of the group.
        place: layer, step and round of what is posted, for errors.
        host_waits: kinds of devices for whose tensors `ExchangeHandle.wait` makes the host wait.
        spared: multiprocessors that GEMMs leave to messages in flight; `None` until it was measured
            (`fluid_hf.comm.calibration.measure_spared`).
        speed: bytes per second in each direction, to all peers at once, equal on all ranks; `None` until it was
            measured (`fluid_hf.comm.calibration.measure_speed`).
    """

    def __init__(self, group: dist.ProcessGroup | None, rank: int, size: int) -> None:
        self.group = group
        self.rank = rank
        self.size = size
        self.counting, self.bytes_sent = True, 0
        self.host_reader = HostReader()
        self.side_stream = SideStream()
        self.num_posted = 0
        self.name = f"{id(self):x}"
        self.sampler: OverlapSampler | None = None
        self._all_to_all_options = dist.AllToAllOptions()
        self._all_to_all_options.asyncOp = True
        self.timeout_seconds = 600.0
        self.place: Place = ("experts", "exchange", 0)
        backends = {kind: backend_of(group, kind) for kind in ("cpu", "cuda")} if group is not None else {}
        self.host_waits = frozenset(kind for kind, backend in backends.items() if backend == "gloo")
        self._in_flight: set[ExchangeHandle] = set()
        self.ranks = dist.get_process_group_ranks(group) if group is not None else [0]
        self._batched = backends.get("cuda") == "nccl"
        self._met: set[str] = set()  # groups whose ranks have met, of `meet_first`
        self.spared: int | None = None
        self.speed: float | None = None

    @property
    def shares_processors(self) -> bool:
        """Whether messages are moved by kernels, which take multiprocessors from what is computed beside."""
        return self._batched

    def beside(self) -> contextlib.AbstractContextManager[Any]:
        """Context of launches that may run beside messages: they leave them the multiprocessors they need."""
        return Spared(self.spared) if self.spared and self._in_flight else AS_IT_IS

    def post(self, sends: Sequence[PeerTensor], recvs: Sequence[PeerTensor]) -> ExchangeHandle:
        """Start one wave: send and receive `(group rank, contiguous tensor)` pairs; empty ones are skipped."""
        sends = [pair for pair in sends if pair[1].numel()]
        recvs = [pair for pair in recvs if pair[1].numel()]
        self.num_posted += 1
        num_bytes = sum([tensor.nbytes for _, tensor in sends])
        self.bytes_sent += num_bytes if self.counting else 0
        try:
            if torch.autograd._profiler_enabled():
                with self._posting(num_bytes):
                    works = self._start(sends, recvs)
            else:
                works = self._start(sends, recvs)
        except RuntimeError as error:
            raise self._posting_error(error, (sends + recvs)[0][1]) from error
        messages = sends + recvs
        return self._track(works, [tensor for _, tensor in messages], [peer for peer, _ in messages])

    def _start(self, sends: Sequence[PeerTensor], recvs: Sequence[PeerTensor]) -> list[dist.Work]:
        if self.group is None or not (sends or recvs):
            return []
        device = (*sends, *recvs)[0][1].device
        batched = self._batched and device.type == "cuda"  # a group may carry what is on the host by another backend
        if batched and self.size == 2 and len(sends) <= 1 and len(recvs) <= 1:
            return [self._start_between_two(sends, recvs)]
        if batched:
            # One NCCL group call: both directions and all peers of the wave progress together. This is what
            # dist.batch_isend_irecv does, without checks that take the host longer than the posting.
            self.group._start_coalescing(device)  # type: ignore[attr-defined]
        works: list[dist.Work] = [self.group.send([tensor], peer, 0) for peer, tensor in sends]
        works += [self.group.recv([tensor], peer, 0) for peer, tensor in recvs]
        return [self.group._end_coalescing(device)] if batched else works  # type: ignore[attr-defined]

    def _start_between_two(self, sends: Sequence[PeerTensor], recvs: Sequence[PeerTensor]) -> dist.Work:
        """The same messages as one all-to-all of the other rank's parts: 47 us of the host for 70 (H200, NCCL 2.32)."""
        assert self.group is not None
        empty = (*sends, *recvs)[0][1].new_empty(0)
        sent, received = (pairs[0][1] if pairs else empty for pairs in (sends, recvs))
        output_splits, input_splits = ([rows, 0] if self.rank else [0, rows] for rows in (len(received), len(sent)))
        return self.group.alltoall_base(received, sent, output_splits, input_splits, self._all_to_all_options)

    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, output_splits: list[int], input_splits: list[int]
    ) -> ExchangeHandle:
        """Start one uneven all-to-all along dimension 0; the reference for every wave schedule."""
        row_bytes = input.nbytes // max(1, input.shape[0])
        num_bytes = row_bytes * (sum(input_splits) - input_splits[self.rank])
        self.num_posted += 1
        self.bytes_sent += num_bytes if self.counting else 0
        assert self.group is not None
        if self._batched and not self._met:
            meet_first(self.group, self.timeout_seconds, self._where(self.place), self._met)
        # The group's own method: dist.all_to_all_single spends more time on the host than the exchange takes.
        arguments = (output, input, output_splits, input_splits, self._all_to_all_options)
        try:
            if torch.autograd._profiler_enabled():
                with self._posting(num_bytes):
                    work = self.group.alltoall_base(*arguments)
            else:
                work = self.group.alltoall_base(*arguments)
        except RuntimeError as error:
            raise self._posting_error(error, output) from error
        return self._track([work], [output, input])

    def all_gather(self, tensor: torch.Tensor, place: str) -> list[torch.Tensor]:
        """The tensors of all ranks of the group, of equal shapes; `place` says what for, in errors."""
        if self.size == 1:
            return [tensor]
        return all_gather_in_time(tensor, self.group, self.timeout_seconds, place, self._met)

    def all_reduce(
        self, tensor: torch.Tensor, place: str = "", op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
    ) -> None:
        """Sum a tensor in place over the group, or what else `op` says; `place` (or `at`) says what for, in errors."""
        if self.size > 1:
            place = place or self._where(self.place)
            all_reduce_in_time(tensor, self.group, self.timeout_seconds, place, self._met, op)

    def meet(self) -> None:
        """Over NCCL, ahead of a call that connects the ranks: wait until all of them are here. Collective."""
        if self._batched and self.group is not None:
            meet_in_time(self.group, self.timeout_seconds, self._where(self.place))

    def read(self, tensor: torch.Tensor, place: str = "") -> list[Any]:
        """The values, on the host, of a tensor that peers have part in; waits at most `timeout_seconds` for them."""
        if tensor.is_cuda:
            event = torch.cuda.Event()
            record(event, tensor.device)
            self.wait_for(event, place)
        values: list[Any] = tensor.tolist()
        return values

    def wait_for(self, event: torch.cuda.Event, place: str = "", peers: Sequence[int] = ()) -> None:
        """Wait on the host, at most `timeout_seconds`, for what the device does until an event.

        Raises:
            PeerError: it did not end: a peer (of `peers`, if known) is missing.
        """
        try:
            wait_in_time(event, self.timeout_seconds, "what peers send")
        except TimeoutError as error:
            raise self.fault(error, peers, place) from error

    def drain(self) -> None:
        """Wait for communication that nobody waited for (a recomputation that stopped early leaves some behind)."""
        for handle in list(self._in_flight):
            handle.wait()

    def _posting(self, num_bytes: int) -> contextlib.AbstractContextManager[Any]:
        """The range in which an exchange is started, counted already."""
        return span("post", self.name, self.num_posted, num_bytes)

    def _posting_error(self, error: RuntimeError, tensor: torch.Tensor) -> RuntimeError:
        """What to raise when nothing could be posted: a peer that is gone closes its connections."""
        gone = tensor.device.type in self.host_waits or isinstance(error, dist.DistBackendError)
        return self.fault(error) if gone else error

    def fault(self, cause: object, peers: Sequence[int] = (), place: Place | str | None = None) -> PeerError:
        """The error for an exchange that did not end: names peers (group ranks; all if not known), layer and round."""
        suspects = peers or [rank for rank in range(self.size) if rank != self.rank]
        where = self._where(place or self.place)
        named = [self.ranks[rank] for rank in suspects]
        return peer_error(self.ranks, named, where, self.timeout_seconds, cause)

    @staticmethod
    def _where(place: Place | str) -> str:
        if isinstance(place, str):
            return place
        layer, step, index = place
        return f"{step}, round {index}, of layer {layer}"

    def start_reading(self, counts_2PC: torch.Tensor, handle: ExchangeHandle) -> Callable[[float], list[Any]]:
        """Bring the peers' counts to the host as soon as they have arrived, past what the current stream holds."""
        return self.host_reader.start(counts_2PC, handle, self.side_stream.alone(counts_2PC.device))

    def read_counts(self, reading: Callable[[float], list[Any]], layer: str) -> list[list[list[int]]]:
        """Wait for the peers' counts, at most `timeout_seconds`; a status among them is an error on all ranks.

        Args:
            reading: from `start_reading`.

        Raises:
            PeerError: they did not arrive.
            RoutingError: see `fluid_hf.comm.faults.raise_flagged`.
            RankMismatchError: see `fluid_hf.comm.call_form.check_forms`.
        """
        try:
            counts: list[list[list[int]]] = reading(self.timeout_seconds)
        except TimeoutError as error:
            raise self.fault(error) from error
        words = [row[-NUM_WORDS:] for row in counts[1]]
        words[self.rank] = counts[0][self.rank][-NUM_WORDS:]  # need not have travelled
        raise_flagged(counts, self.rank, self.ranks, layer)  # first: of such a call the form means nothing
        check_forms(words, self.ranks, layer)
        return counts

    def __deepcopy__(self, memo: dict[int, Any]) -> PeerExchange:
        return self  # process groups cannot be copied; a copied layer shares them

    def at(self, layer: str, step: str, index: int = 0) -> None:
        """Say what is posted from now on, for errors."""
        self.place = (layer, step, index)

    def at_round(self, index: int) -> None:
        """Say which round of the step is posted from now on, for errors."""
        self.place = (*self.place[:2], index)

    def _track(self, works: list[dist.Work], buffers: list[torch.Tensor], peers: Sequence[int] = ()) -> ExchangeHandle:
        handle = ExchangeHandle(self, works, buffers, peers)
        self._in_flight.add(handle)
        return handle
