"""Predicted time of one layer's experts, for the choice of the number of waves.

Three resources run side by side: the GPU, the link, and the host that queues kernels and posts messages. Messages of
both ways share the link and are sent in the order in which they are posted, as NCCL sends those of one communicator:
a rank sends and receives at once in each, so a second one beside it would gain nothing. While a message is on the wire,
the GPU computes slower by the share that NCCL's kernels take of it, and the message is slower by as much. A layer is
one of many: the host comes to it as far ahead of the GPU as it left the layer before. Every number is equal on all
ranks: sizes of the model, averages over the group, constants of the device type, and what the ranks measured and agreed
on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fluid_hf.comm.calibration import LinkSpeed
from fluid_hf.kernels import MAX_INNER_FUSED, MAX_INNER_GATHERED_WGRAD

__all__ = ["SERIAL", "Hardware", "LayerSizes", "backward_seconds", "expected_rows", "forward_seconds", "hardware_of"]

SERIAL = 0  # as number of waves: one all-to-all each way, own rows included, nothing computed meanwhile


@dataclass(frozen=True)
class LayerSizes:
    """One layer call: tokens of a rank (mean over the group), K, E, P, H, I, and bytes of an element."""

    tokens: int
    top_k: int
    num_experts: int
    ep_size: int
    hidden: int
    inner: int
    element_bytes: int = 2

    @property
    def fused(self) -> bool:
        """Whether the first GEMM reads rows by index and computes the activation."""
        return self.inner <= MAX_INNER_FUSED

    @property
    def early(self) -> bool:
        """Whether the own tokens' first projection is queued before the counts are read: `ExpertMath.starts_early`."""
        return self.fused or self.element_bytes == 2

    @property
    def pairs(self) -> float:
        """(token, expert) pairs that a rank computes."""
        return self.tokens * self.top_k

    @property
    def rows(self) -> float:
        """Rows that a rank sends, with uniform routing."""
        return expected_rows(self.tokens, self.top_k, self.num_experts, self.ep_size)


@dataclass(frozen=True)
class Hardware:
    """Rates of one device and its link.

    Attributes:
        flops: grouped GEMM in the compute type, operations per second.
        memory: bytes read or written per second.
        link: bytes per second in each direction, to all peers together.
        latency: seconds before a message starts to arrive.
        launch: seconds of the host for one kernel with its Python.
        post: seconds of the host for one wave of messages.
        taken: share of the GPU's computing that is lost while a message is on the wire, and of the message's speed.
        kernel: seconds of the GPU for a kernel without work, and for its last blocks.
    """

    flops: float
    memory: float
    link: float
    latency: float = 20e-6
    launch: float = 20e-6
    post: float = 40e-6
    taken: float = 0.0
    kernel: float = 8e-6


# Operations and bytes a second. Of Hopper: with the wasted rows, fitted to kernels and layers of four models on an
# H200, one process and 2 and 8 ranks on the mirror link. At the speed that large messages had these layers are
# predicted within 20%, but for three waves of Qwen3-30B, which took half as long again. Of others: data sheets, at the
# same share of the peak.
_BY_CAPABILITY = {9: (6.5e14, 3.0e12), 8: (2.0e14, 1.6e12)}
_CPU = Hardware(flops=2e10, memory=5e9, link=1e9, latency=1e-4, launch=1e-5, post=1e-5)
_WASTED_ROWS = 128  # of each expert in each piece's GEMMs; a tile has 128
# Host time of a step of ours, Python included, over that of a small operation: 3.5 as it was measured, less the third
# that was saved since. The layers measured fit as well with 2 to 4.
_PYTHON = 2.3
# Kernels, and so steps of the host. Forward: before the counts are there, after them, the own tokens' first part, a
# wave, the sum. Backward: rows of the output gradient, one piece's input gradients, all weight gradients, the sum.
_PLAN, _ROUTE, _OWN, _WAVE, _SUM = 8, 4, 3, 5, 1
_SPREAD, _GRADIENT, _WGRAD, _GATHER = 2, 6, 6, 3


def hardware_of(device: torch.device, link: float, launch: float) -> Hardware:
    """Rates of a device type; those of the link and of a small operation are measured (`fluid_hf.comm.calibration`).

    Args:
        link: bytes per second in each direction, best as `LinkSpeed`, which says what else a message costs.
        launch: seconds of the host for a small operation.
    """
    if device.type != "cuda":
        return _CPU
    flops, memory = _BY_CAPABILITY.get(torch.cuda.get_device_capability(device)[0], (1e14, 1e12))
    known = {}
    if isinstance(link, LinkSpeed):
        known = {"latency": link.latency, "post": link.post, "taken": link.taken}
    return Hardware(flops=flops, memory=memory, link=float(link), launch=_PYTHON * launch, **known)


def expected_rows(tokens: float, top_k: int, num_experts: int, ep_size: int) -> float:
    """Rows a rank sends with uniform routing: unique (token, other rank) pairs."""
    elsewhere = num_experts - num_experts // ep_size
    missed = math.comb(elsewhere, top_k) / math.comb(num_experts, top_k)
    return tokens * (ep_size - 1) * (1 - missed)


def forward_seconds(sizes: LayerSizes, hardware: Hardware, waves: int) -> float:
    """From the router's output to the layer's output; `waves` may be `SERIAL`."""
    return _second_time(_forward, sizes, hardware, waves)


def backward_seconds(sizes: LayerSizes, hardware: Hardware, waves: int) -> float:
    """From the output's gradient to the input's; weight gradients fill the time of the return."""
    return _second_time(_backward, sizes, hardware, waves)


def _second_time(
    go: Callable[[_Run, LayerSizes, int], None], sizes: LayerSizes, hardware: Hardware, waves: int
) -> float:
    """Seconds of a pass behind one alike."""
    run = _Run(hardware)
    go(run, sizes, waves)
    before = run.gpu
    go(run, sizes, waves)
    return run.gpu - before


def _forward(run: _Run, sizes: LayerSizes, waves: int) -> None:
    hardware, (own, far), trip = run.hardware, _split(sizes), _trip(sizes, run.hardware)
    run.compute(_PLAN, 2 * sizes.rows * sizes.hidden * sizes.element_bytes / hardware.memory)
    packed = run.gpu
    counts = max(packed, run.host) + hardware.latency  # for which the host waits
    if waves == SERIAL:
        run.host = counts + _ROUTE * hardware.launch
        run.wait(run.post(trip + _kept_rows(sizes) / hardware.memory, alone=True))
        run.compute(_WAVE, _first(sizes, hardware, sizes.pairs) + _second(sizes, hardware, sizes.pairs))
        run.wait(run.post(trip + _kept_rows(sizes) / hardware.memory, alone=True))
        run.compute(_SUM, _rows_bytes(sizes) / hardware.memory)
        return
    # Between two ranks the first wave leaves before the counts are known (`fluid_hf.comm.head_start`). One wave leaves
    # whole: the second message that it has is empty, or holds the few rows by which the routing changed.
    arrivals = [run.post(trip / waves, packed)] if sizes.ep_size == 2 else []
    early = run.queue(_OWN) if sizes.early else None
    run.host = max(run.host, counts) + _ROUTE * hardware.launch
    queued = run.queue(_OWN) if early is None else early
    arrivals += [run.post(trip / waves, packed) for _ in range(waves - len(arrivals))]
    run.compute(_OWN, _first(sizes, hardware, own), queued)
    back = 0.0
    for arrival in arrivals:
        run.wait(arrival)
        run.compute(_WAVE, _first(sizes, hardware, far / waves) + _second(sizes, hardware, far / waves))
        back = run.post(trip / waves)
    run.compute(_OWN, _second(sizes, hardware, own))
    run.wait(back)
    run.compute(_SUM, _rows_bytes(sizes) / hardware.memory)


def _backward(run: _Run, sizes: LayerSizes, waves: int) -> None:
    hardware, (own, far), trip = run.hardware, _split(sizes), _trip(sizes, run.hardware)
    run.compute(_SPREAD, 2 * sizes.rows * sizes.hidden * sizes.element_bytes / hardware.memory)
    if waves == SERIAL:
        run.wait(run.post(trip + _kept_rows(sizes) / hardware.memory, alone=True))
        run.compute(_GRADIENT, _dgrad(sizes, hardware, sizes.pairs, whole=True))
        back = run.post(trip + _kept_rows(sizes) / hardware.memory)
    else:
        packed, back = run.gpu, 0.0
        arrivals = [run.post(trip / waves, packed) for _ in range(waves)]
        run.compute(_GRADIENT, _dgrad(sizes, hardware, own))
        for arrival in arrivals:
            run.wait(arrival)
            run.compute(_GRADIENT, _dgrad(sizes, hardware, far / waves))
            back = run.post(trip / waves)
    run.compute(_WGRAD, _wgrad(sizes, hardware))
    run.wait(back)
    run.compute(_GATHER, _rows_bytes(sizes) / hardware.memory)


@dataclass
class _Run:
    """Where each resource stands, in seconds, as the host goes through the layer."""

    hardware: Hardware
    host: float = 0.0
    gpu: float = 0.0
    link: float = 0.0
    flights: list[tuple[float, float]] = field(default_factory=list)

    def queue(self, launches: int) -> float:
        """Let the host queue kernels; when the first one is."""
        self.host += launches * self.hardware.launch
        return self.host - max(0, launches - 1) * self.hardware.launch

    def compute(self, launches: int, seconds: float, queued: float | None = None) -> None:
        """Run kernels that take `seconds` on an undisturbed GPU; `queued` if the host did so before."""
        start = self.queue(launches) if queued is None else queued
        seconds += launches * self.hardware.kernel
        last = start + (launches - 1) * self.hardware.launch
        self.gpu = max(self._after(max(self.gpu, start), seconds), last)

    def post(self, seconds: float, ready: float | None = None, alone: bool = False) -> float:
        """Send a wave, ready when the GPU is or at `ready`; when it arrives. `alone`: nothing is computed beside."""
        self.host += self.hardware.post
        ready = self.gpu if ready is None else ready
        start = max(self.link, max(self.host, ready) + self.hardware.latency)
        # Between two H200 over shared memory messages took 27% longer in an overlapped layer than in a serial one, and
        # 26% of the computing: both want the same multiprocessors and memory, and ranks wait for each other.
        self.link = start + (seconds if alone else seconds * (1 + self.hardware.taken))
        self.flights.append((start, self.link))
        return self.link

    def wait(self, arrival: float) -> None:
        """Let the GPU wait for a message."""
        self.gpu = max(self.gpu, arrival)

    def _after(self, start: float, seconds: float) -> float:
        """When work of that length is done, slower while messages fly; flights come in order and do not overlap."""
        rate = 1.0 - self.hardware.taken
        for begin, end in self.flights:
            if end <= start:
                continue
            if start < begin:
                if start + seconds <= begin:
                    return start + seconds
                start, seconds = begin, seconds - (begin - start)
            if seconds <= (end - start) * rate:
                return start + seconds / rate if rate else end
            start, seconds = end, seconds - (end - start) * rate
        return start + seconds


def _split(sizes: LayerSizes) -> tuple[float, float]:
    own = sizes.pairs / sizes.ep_size
    return own, sizes.pairs - own


def _trip(sizes: LayerSizes, hardware: Hardware) -> float:
    return sizes.rows * sizes.hidden * sizes.element_bytes / hardware.link


def _kept_rows(sizes: LayerSizes) -> float:
    """Bytes read and written for the own rows that an all-to-all copies."""
    return 2 * sizes.rows / max(1, sizes.ep_size - 1) * sizes.hidden * sizes.element_bytes


def _rows_bytes(sizes: LayerSizes) -> float:
    return (sizes.rows + 2 * sizes.tokens) * sizes.hidden * sizes.element_bytes


def _gemm(sizes: LayerSizes, hardware: Hardware, pairs: float) -> float:
    """All three projections of `pairs` pairs; with few of them, reading the weights takes longer."""
    local = sizes.num_experts / sizes.ep_size
    weights = 3 * sizes.hidden * sizes.inner
    reading = local * weights * sizes.element_bytes / hardware.memory
    return max(2 * (pairs + _WASTED_ROWS * local) * weights / hardware.flops, reading)


def _first(sizes: LayerSizes, hardware: Hardware, pairs: float) -> float:
    moved = 0 if sizes.fused else 2 * sizes.hidden + 3 * sizes.inner  # a copy of the rows; the activation
    return _gemm(sizes, hardware, pairs) * 2 / 3 + moved * pairs * sizes.element_bytes / hardware.memory


def _second(sizes: LayerSizes, hardware: Hardware, pairs: float) -> float:
    return _gemm(sizes, hardware, pairs) / 3 + pairs * sizes.hidden * sizes.element_bytes / hardware.memory


def _dgrad(sizes: LayerSizes, hardware: Hardware, pairs: float, whole: bool = False) -> float:
    """Of one of several pieces the activation's kernel writes its results twice, as the weight gradients need them."""
    moved = (6 if whole else 9) * sizes.inner + (1 if sizes.fused else 3) * sizes.hidden
    return _gemm(sizes, hardware, pairs) + moved * pairs * sizes.element_bytes / hardware.memory


def _wgrad(sizes: LayerSizes, hardware: Hardware) -> float:
    # Rows of the first projection, and of large experts those of the down projection's gradient, read and written.
    copies = (2 if sizes.inner <= MAX_INNER_GATHERED_WGRAD else 4) * sizes.hidden
    return _gemm(sizes, hardware, sizes.pairs) + copies * sizes.pairs * sizes.element_bytes / hardware.memory
