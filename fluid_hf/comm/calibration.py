"""Speed of the link between the ranks of a group and of their hosts, and what messages cost; agreed between them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from fluid_hf.comm.peer_exchange import ExchangeHandle, PeerExchange
from fluid_hf.comm.spared import AS_IT_IS, Spared, can_spare

__all__ = ["MEASURED", "LinkSpeed", "measure_launch", "measure_link", "measure_spared", "measure_speed"]

MEASURED = ("cuda",)  # devices whose links are measured; elsewhere planners take what is usual

# A message as large as a wave's: 8 MiB to one peer did not fill a link (NVLink, and PCIe both ways). The least size is
# for many peers, whose buffers grow with their number.
WAVE_BYTES, LEAST_BYTES, SMALL_BYTES = 32 << 20, 8 << 20, 16 << 10
# Rows, inputs and outputs of the GEMM beside messages.
GEMM_SIZE = {"cuda": (16384, 2048, 2048), "cpu": (32, 32, 32)}
GROUPS = 4
STEP = "calibration"  # what a rank was doing, for errors
SPARED = (0, 2, 4, 8, 16)  # multiprocessors tried; NCCL took 2 over shared memory and 16 over NVLink
# Share of the time that GEMMs must gain: over shared memory half, as the blocks that NCCL delays come last. Over NVLink
# sparing 16 gained a tenth here and lost 2% in layers, whose GEMMs are longer than the messages.
SPARED_GAIN = 0.25
FILLER = 8  # products ahead of what is timed, so that the host has queued it all before the device gets there


class LinkSpeed(float):
    """Bytes per second in each direction, to all peers at once; with what else a message costs.

    Attributes:
        latency: seconds until a small message has arrived.
        post: seconds of the host for one wave of messages.
        taken: share of the device's computing that is lost while messages are on the wire (NCCL's kernels take some of
            its multiprocessors and of its memory bandwidth).
    """

    latency: float
    post: float
    taken: float

    def __new__(cls, value: float, *, latency: float, post: float, taken: float) -> LinkSpeed:
        """A speed with its costs."""
        speed = super().__new__(cls, value)
        speed.latency, speed.post, speed.taken = latency, post, taken
        return speed

    @classmethod
    def from_times(cls, peers: int, message: float, small: float, post: float, taken: float) -> LinkSpeed:
        """From the seconds of a wave of `message_bytes` and one of `SMALL_BYTES` to each peer."""
        small = min(small, message / 2)  # a disturbed measurement of the small one must not make the link look fast
        value = peers * (message_bytes(peers) - SMALL_BYTES) / (message - small)
        return cls(value, latency=small, post=post, taken=taken)


def message_bytes(peers: int) -> int:
    """Bytes for each peer in the wave that is timed."""
    return max(LEAST_BYTES, WAVE_BYTES // max(1, peers))


def measure_link(exchange: PeerExchange, device: torch.device, repeats: int = 5) -> LinkSpeed:
    """Speed with all peers at once, the slowest rank's, and costs, the largest. Collective over the group.

    It also connects every pair of ranks: NCCL would do so inside the first layer. What computing loses is measured with
    the multiprocessors spared that `measure_spared` finds.

    Raises:
        PeerError: a rank did not take part in time, here and in what else is measured.
    """
    if exchange.spared is None:
        exchange.spared = measure_spared(exchange, device)
    exchange.at(exchange.place[0], STEP)
    before = exchange.bytes_sent
    load = _Load(exchange, device)
    load.post(1, load.size)[0].wait()
    times = [load.message(size) for size in (load.size, SMALL_BYTES) for _ in range(repeats)]
    flight, posted = zip(*times, strict=True)
    fastest = [min(flight[:repeats]), min(flight[repeats:]), min(posted)]
    message, small, post = _agree(exchange, device, fastest)
    (taken,) = _agree(exchange, device, [load.share_taken(message)])
    exchange.bytes_sent = before
    return LinkSpeed.from_times(exchange.size - 1, message, small, post, taken)


def measure_speed(exchange: PeerExchange, device: torch.device, repeats: int = 3) -> float:
    """Bytes per second in each direction with all peers at once, the slowest rank's. Collective over the group."""
    exchange.at(exchange.place[0], STEP)
    before = exchange.bytes_sent
    load = _Load(exchange, device)
    load.post(1, load.size)[0].wait()  # NCCL connects the ranks
    (seconds,) = _agree(exchange, device, [min(load.message(load.size)[0] for _ in range(repeats))])
    exchange.bytes_sent = before
    return (exchange.size - 1) * load.size / seconds


def measure_spared(exchange: PeerExchange, device: torch.device, repeats: int = 3) -> int:
    """Multiprocessors that GEMMs should leave to a message beside them; equal on all ranks. Collective over the group.

    None where messages are short against GEMMs (NVLink), no kernels move them, or torch's grouped GEMM is not one
    persistent kernel.
    """
    if not (exchange.shares_processors and can_spare() and _has_grouped(device)):
        return 0
    most = torch.cuda.get_device_properties(device).multi_processor_count // 4
    tried = [number for number in SPARED if number <= most]
    exchange.at(exchange.place[0], STEP)
    before = exchange.bytes_sent
    load = _Load(exchange, device)
    load.post(1, load.size)[0].wait()  # NCCL connects the ranks
    times = [min(load.beside_one(number) for _ in range(repeats)) for number in tried]
    times = _agree(exchange, device, times)
    exchange.bytes_sent = before
    best = times.index(min(times))
    return tried[best] if times[best] < times[0] * (1 - SPARED_GAIN) else 0


def measure_launch(exchange: PeerExchange | None, device: torch.device, repeats: int = 10) -> float:
    """Seconds of the host for one small operation: the slowest rank's. Collective over the group, if there is one."""
    value = torch.zeros(8, device=device)
    if exchange is not None:
        exchange.at(exchange.place[0], STEP)
    fastest = float("inf")  # of several tries: a host that does something else meanwhile says nothing
    for _ in range(repeats):
        if exchange is not None:
            exchange.read(value)  # what peers take part in first, which may not end
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # host synchronisation: once per model
        start = time.perf_counter()
        for _ in range(20):
            value.add_(1.0)
        fastest = min(fastest, (time.perf_counter() - start) / 20)
    return _agree(exchange, device, [fastest])[0]


class _Load:
    """Messages to all peers and matrix products, timed on the device."""

    def __init__(self, exchange: PeerExchange, device: torch.device) -> None:
        self._exchange, self._device = exchange, device
        self.size = message_bytes(exchange.size - 1)
        self._sent = torch.ones(exchange.size, self.size, dtype=torch.uint8, device=device)
        self._received = torch.empty_like(self._sent)
        self._meeting = torch.zeros(1, device=device)
        rows, inputs, outputs = GEMM_SIZE.get(device.type, GEMM_SIZE["cpu"])
        self._grouped = _has_grouped(device)
        dtype = torch.bfloat16 if self._grouped else torch.float16 if device.type == "cuda" else torch.float32
        self._rows = torch.ones(rows, inputs, dtype=dtype, device=device)
        self._weight = torch.ones(GROUPS, inputs, outputs, dtype=dtype, device=device)
        ends = torch.arange(1, GROUPS + 1, dtype=torch.int32) * (rows // GROUPS)
        self._ends = ends.to(device)
        exchange.meet()  # a rank may have lacked the memory, and the others would connect with it

    def post(self, count: int, size: int) -> list[ExchangeHandle]:
        """Post waves of `size` bytes to every peer."""
        peers = [peer for peer in range(self._exchange.size) if peer != self._exchange.rank]
        sent, received = ([(p, buffer[p, :size]) for p in peers] for buffer in (self._sent, self._received))
        return [self._exchange.post(sent, received) for _ in range(count)]

    def message(self, size: int) -> tuple[float, float]:
        """Seconds of one wave on the device, and of the host to post it."""
        posted = 0.0

        def run() -> None:
            nonlocal posted
            start = time.perf_counter()
            (handle,) = self.post(1, size)
            posted = time.perf_counter() - start
            handle.wait()

        return self._time(run), posted

    def share_taken(self, message: float) -> float:
        """Share of computing lost while waves fly that take `message` seconds each; `message` is equal on all ranks."""
        count = max(1, min(4, int(2e-3 / message)))
        one = self._time(lambda: self._multiply(8)) / 8
        products = max(1, min(64, math.ceil(2 * count * message / one)))
        lost = []
        for _ in range(3):
            alone = self._time(lambda: self._multiply(products))
            handles: list[ExchangeHandle] = []

            def beside(handles: list[ExchangeHandle] = handles) -> None:
                handles += self.post(count, self.size)
                with self._exchange.beside():
                    self._multiply(products)

            together = self._time(beside)
            for handle in handles:
                handle.wait()
            lost.append(max(0.0, together - alone) / (count * message))
        return min(0.9, sorted(lost)[1])

    def beside_one(self, spared: int) -> float:
        """Seconds of products beside one wave of messages, that many multiprocessors left to it."""
        handles: list[ExchangeHandle] = []

        def run() -> None:
            handles.extend(self.post(1, self.size))
            with Spared(spared) if spared else AS_IT_IS:
                self._multiply(FILLER // 2)

        seconds = self._time(run)
        for handle in handles:
            handle.wait()
        return seconds

    def _multiply(self, count: int) -> None:
        for _ in range(count):
            if self._grouped:
                torch.nn.functional.grouped_mm(self._rows, self._weight, offs=self._ends)
            else:
                torch.mm(self._rows, self._weight[0])

    def _time(self, run: Callable[[], None]) -> float:
        """Seconds on the device; all ranks start together."""
        _agree(self._exchange, self._device, [0.0])
        if self._device.type != "cuda":
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._multiply(FILLER)
        # The devices meet too: one that is ahead would count its wait for the other as time of the message.
        try:
            dist.all_reduce(self._meeting, dist.ReduceOp.MAX, group=self._exchange.group)
        except RuntimeError as error:
            raise self._exchange.fault(error) from error
        start.record()
        run()
        end.record()
        self._exchange.wait_for(end)  # host synchronisation: a few times per model
        return start.elapsed_time(end) / 1e3


def _has_grouped(device: torch.device) -> bool:
    """Whether torch computes a grouped GEMM in one kernel there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


def _agree(exchange: PeerExchange | None, device: torch.device, values: Sequence[float]) -> list[float]:
    """The largest of each value over the ranks of the group, where there is one."""
    largest = torch.tensor(values, device=device, dtype=torch.float64)
    if exchange is None:
        found: list[float] = largest.tolist()
        return found
    exchange.all_reduce(largest, op=dist.ReduceOp.MAX)
    return exchange.read(largest)
