"""Predicted time of one layer's experts, for the choice of the number of waves.

Three resources run side by side: the GPU, the link, and the host that queues kernels and posts messages. Messages of
both ways share the link and are sent in the order in which they are posted, as NCCL sends those of one communicator:
a rank sends and receives at once in each, so a second one beside it would gain nothing. While a message is on the wire,
the GPU computes slower by the share that NCCL's kernels take of it. Every number is equal on all ranks: sizes of the
model, averages over the group, constants of the device type, and what the ranks measured and agreed on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from fluid_hf.comm.calibration import LinkSpeed

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
        taken: share of the GPU's computing that is lost while a message is on the wire.
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


# Measured: H100 (bfloat16, large groups). The others from data sheets, at the same share of the peak.
_BY_CAPABILITY = {9: (6.5e14, 2.8e12), 8: (2.0e14, 1.5e12)}
_CPU = Hardware(flops=2e10, memory=5e9, link=1e9, latency=1e-4, launch=1e-5, post=1e-5)
_GEMM_ROWS = 128  # rows of a GEMM tile: each expert wastes half a tile on average
_PYTHON = 3.5  # host time of a step of ours, Python included, over that of a small operation
_PLAN, _OWN, _WAVE, _SUM = 10, 3, 9, 4  # launches of the forward pass
_GRADIENT, _WGRAD = 12, 8  # launches of one piece's input gradients, of all weight gradients


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
    run, (own, far), trip = _Run(hardware), _split(sizes), _trip(sizes, hardware)
    run.compute(_PLAN, 2 * sizes.rows * sizes.hidden * sizes.element_bytes / hardware.memory)
    packed = run.gpu
    counts = max(packed, run.host) + hardware.latency  # for which the host waits
    if waves == SERIAL:
        run.host = run.gpu = counts
        run.wait(run.post(trip + _kept_rows(sizes) / hardware.memory))
        run.compute(_WAVE, _first(sizes, hardware, sizes.pairs) + _second(sizes, hardware, sizes.pairs))
        run.wait(run.post(trip + _kept_rows(sizes) / hardware.memory))
        run.compute(_SUM, _rows_bytes(sizes) / hardware.memory)
        return run.gpu
    queued = run.host + hardware.launch
    # Between two ranks the first wave leaves before the counts are known (`fluid_hf.comm.head_start`).
    arrivals = [run.post(trip / waves, packed)] if sizes.ep_size == 2 else []
    run.host = max(run.host + _OWN * hardware.launch, counts)
    arrivals += [run.post(trip / waves, packed) for _ in range(waves - len(arrivals))]
    run.compute(0, _first(sizes, hardware, own) + _OWN * hardware.kernel, queued)
    backs = []
    for arrival in arrivals:
        run.wait(arrival)
        run.compute(_WAVE, _first(sizes, hardware, far / waves) + _second(sizes, hardware, far / waves))
        backs.append(run.post(trip / waves))
    run.compute(_OWN, _second(sizes, hardware, own))
    run.wait(backs[-1])
    run.compute(_SUM - _OWN, _rows_bytes(sizes) / hardware.memory)
    return run.gpu


def backward_seconds(sizes: LayerSizes, hardware: Hardware, waves: int) -> float:
    """From the output's gradient to the input's; weight gradients fill the time of the return."""
    run, (own, far), trip = _Run(hardware), _split(sizes), _trip(sizes, hardware)
    wgrad = 4 * sizes.pairs * sizes.hidden * sizes.element_bytes / hardware.memory + _gemm(sizes, hardware, sizes.pairs)
    run.compute(_SUM, 2 * sizes.rows * sizes.hidden * sizes.element_bytes / hardware.memory)
    if waves == SERIAL:
        run.wait(run.post(trip + _kept_rows(sizes) / hardware.memory))
        run.compute(_GRADIENT, _dgrad(sizes, hardware, sizes.pairs))
        back = run.post(trip + _kept_rows(sizes) / hardware.memory)
    else:
        packed = run.gpu
        arrivals = [run.post(trip / waves, packed) for _ in range(waves)]
        run.compute(_GRADIENT, _dgrad(sizes, hardware, own))
        for arrival in arrivals:
            run.wait(arrival)
            run.compute(_GRADIENT, _dgrad(sizes, hardware, far / waves))
            back = run.post(trip / waves)
    run.compute(_WGRAD, wgrad)
    run.wait(back)
    run.compute(_SUM, _rows_bytes(sizes) / hardware.memory)
    return run.gpu


@dataclass
class _Run:
    """Where each resource stands, in seconds, as the host goes through the layer."""

    hardware: Hardware
    host: float = 0.0
    gpu: float = 0.0
    link: float = 0.0
    flights: list[tuple[float, float]] = field(default_factory=list)

    def compute(self, launches: int, seconds: float, queued: float | None = None) -> None:
        """Queue kernels that take `seconds` on an undisturbed GPU; `queued` if the host did so before."""
        seconds += launches * self.hardware.kernel
        start = self.host + self.hardware.launch if queued is None else queued
        self.host += launches * self.hardware.launch
        self.gpu = max(self._after(max(self.gpu, start), seconds), self.host if queued is None else queued)

    def post(self, seconds: float, ready: float | None = None) -> float:
        """Send a wave, ready when the GPU is or at `ready`; when it has arrived."""
        self.host += self.hardware.post
        ready = self.gpu if ready is None else ready
        start = max(self.link, max(self.host, ready) + self.hardware.latency)
        self.link = start + seconds
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
    """All three projections of `pairs` pairs."""
    padded = pairs + _GEMM_ROWS / 2 * sizes.num_experts / sizes.ep_size
    return 6 * padded * sizes.hidden * sizes.inner / hardware.flops


def _weight_bytes(sizes: LayerSizes) -> float:
    """The weights held here, which every piece reads again."""
    return 3 * sizes.num_experts / sizes.ep_size * sizes.hidden * sizes.inner * sizes.element_bytes


def _first(sizes: LayerSizes, hardware: Hardware, pairs: float) -> float:
    moved = 2 * pairs * sizes.hidden * sizes.element_bytes + _weight_bytes(sizes) * 2 / 3
    return _gemm(sizes, hardware, pairs) * 2 / 3 + moved / hardware.memory


def _second(sizes: LayerSizes, hardware: Hardware, pairs: float) -> float:
    moved = pairs * (3 * sizes.inner + sizes.hidden) * sizes.element_bytes + _weight_bytes(sizes) / 3
    return _gemm(sizes, hardware, pairs) / 3 + moved / hardware.memory


def _dgrad(sizes: LayerSizes, hardware: Hardware, pairs: float) -> float:
    moved = pairs * (8 * sizes.inner + 3 * sizes.hidden) * sizes.element_bytes + _weight_bytes(sizes)
    return _gemm(sizes, hardware, pairs) + moved / hardware.memory
