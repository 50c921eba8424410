"""Predicted time of one layer's experts, for the choice of the number of waves.

Three resources run side by side: the GPU, the link in each direction, and the host that queues kernels. A step starts
when the resource is free and its input has arrived. Every number is equal on all ranks: sizes of the model, averages
over the group, constants of the device type, and a link speed that the ranks agreed on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["Hardware", "LayerSizes", "backward_seconds", "expected_rows", "forward_seconds", "hardware_of"]


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
    """

    flops: float
    memory: float
    link: float
    latency: float = 20e-6
    launch: float = 20e-6


# Measured: H100 (bfloat16, large groups). The others from data sheets, at the same share of the peak.
_BY_CAPABILITY = {9: (6.5e14, 2.8e12), 8: (2.0e14, 1.5e12)}
_CPU = Hardware(flops=2e10, memory=5e9, link=1e9, latency=1e-4, launch=1e-5)
_GEMM_ROWS = 128  # rows of a GEMM tile: each expert wastes half a tile on average
_PYTHON = 3.5  # host time of a step of ours, Python included, over that of a small operation
_WAVE_LAUNCHES, _WGRAD_LAUNCHES, _PLAN_LAUNCHES = 11, 8, 10


def hardware_of(device: torch.device, link: float, launch: float) -> Hardware:
    """Rates of a device type; those of the link and of a small operation are measured (`fluid_hf.comm.calibration`)."""
    if device.type != "cuda":
        return _CPU
    flops, memory = _BY_CAPABILITY.get(torch.cuda.get_device_capability(device)[0], (1e14, 1e12))
    return Hardware(flops=flops, memory=memory, link=link, launch=_PYTHON * launch)


def expected_rows(tokens: float, top_k: int, num_experts: int, ep_size: int) -> float:
    """Rows a rank sends with uniform routing: unique (token, other rank) pairs."""
    elsewhere = num_experts - num_experts // ep_size
    missed = math.comb(elsewhere, top_k) / math.comb(num_experts, top_k)
    return tokens * (ep_size - 1) * (1 - missed)


def forward_seconds(sizes: LayerSizes, hardware: Hardware, waves: int) -> float:
    """From the router's output to the layer's output."""
    own, far = _split(sizes)
    trip = sizes.rows * sizes.hidden * sizes.element_bytes / hardware.link / waves
    issued = _PLAN_LAUNCHES * hardware.launch
    arrival = issued + hardware.latency
    issued += 3 * hardware.launch
    gpu = issued + _first(sizes, hardware, own)
    back = 0.0
    for _ in range(waves):
        arrival += trip
        issued += _WAVE_LAUNCHES * hardware.launch
        work = _first(sizes, hardware, far / waves) + _second(sizes, hardware, far / waves)
        gpu = max(max(gpu, arrival) + work, issued)
        back = max(back, gpu) + trip
    gpu = max(gpu + _second(sizes, hardware, own), issued + 4 * hardware.launch)
    return max(gpu, back + hardware.latency) + _rows_bytes(sizes) / hardware.memory


def backward_seconds(sizes: LayerSizes, hardware: Hardware, waves: int) -> float:
    """From the output's gradient to the input's; weight gradients fill the time of the return."""
    own, far = _split(sizes)
    trip = sizes.rows * sizes.hidden * sizes.element_bytes / hardware.link / waves
    issued = 4 * hardware.launch
    arrival = issued + hardware.latency
    issued += _WAVE_LAUNCHES * hardware.launch
    gpu = issued + _dgrad(sizes, hardware, own)
    back = 0.0
    for _ in range(waves):
        arrival += trip
        issued += _WAVE_LAUNCHES * hardware.launch
        gpu = max(max(gpu, arrival) + _dgrad(sizes, hardware, far / waves), issued)
        back = max(back, gpu) + trip
    wgrad = _gemm(sizes, hardware, own + far) + 4 * (own + far) * sizes.hidden * sizes.element_bytes / hardware.memory
    gpu = max(gpu, issued + _WGRAD_LAUNCHES * hardware.launch) + wgrad
    return max(gpu, back + hardware.latency) + _rows_bytes(sizes) / hardware.memory


def _split(sizes: LayerSizes) -> tuple[float, float]:
    own = sizes.pairs / sizes.ep_size
    return own, sizes.pairs - own


def _rows_bytes(sizes: LayerSizes) -> float:
    return (sizes.rows + 2 * sizes.tokens) * sizes.hidden * sizes.element_bytes


def _gemm(sizes: LayerSizes, hardware: Hardware, pairs: float) -> float:
    """All three projections of `pairs` pairs."""
    padded = pairs + _GEMM_ROWS / 2 * sizes.num_experts / sizes.ep_size
    return 6 * padded * sizes.hidden * sizes.inner / hardware.flops


def _first(sizes: LayerSizes, hardware: Hardware, pairs: float) -> float:
    return _gemm(sizes, hardware, pairs) * 2 / 3 + 2 * pairs * sizes.hidden * sizes.element_bytes / hardware.memory


def _second(sizes: LayerSizes, hardware: Hardware, pairs: float) -> float:
    moved = pairs * (3 * sizes.inner + sizes.hidden) * sizes.element_bytes
    return _gemm(sizes, hardware, pairs) / 3 + moved / hardware.memory


def _dgrad(sizes: LayerSizes, hardware: Hardware, pairs: float) -> float:
    moved = pairs * (8 * sizes.inner + 3 * sizes.hidden) * sizes.element_bytes
    return _gemm(sizes, hardware, pairs) + moved / hardware.memory
