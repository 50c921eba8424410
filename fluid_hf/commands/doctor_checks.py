"""What `fluid-hf doctor` looks at. Every check returns findings; none changes anything."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from packaging.requirements import Requirement

__all__ = ["CHECKS", "Finding", "compare_layer", "judge_layer"]

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "safetensors", "tqdm")
OPTIONAL = {"matplotlib": "pictures of `fluid-hf profile`", "triton": "the GPU kernels"}
COPY_BYTES = 256 << 20
# Below this a link is PCIe through the host, or worse.
SLOW_LINK = 20.0

# name: (values that hurt, what they do)
SETTINGS: dict[str, tuple[tuple[str, ...], str]] = {
    "CUDA_DEVICE_MAX_CONNECTIONS": (("1",), "kernels of all streams start in one order, so that communication waits"),
    "CUDA_LAUNCH_BLOCKING": (("1",), "every kernel is waited for, nothing overlaps"),
    "TORCH_NCCL_BLOCKING_WAIT": (("1",), "the host waits for every exchange, nothing overlaps"),
    "NCCL_P2P_DISABLE": (("1",), "GPUs of one host talk through its memory instead of NVLink or PCIe"),
    "NCCL_SHM_DISABLE": (("1",), "GPUs without a direct link talk through the network"),
    "NCCL_IB_DISABLE": (("1",), "hosts talk through sockets instead of InfiniBand or RoCE"),
    "NCCL_DEBUG": (("INFO", "TRACE"), "NCCL writes a lot"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        level: "ok", "warning" (slow or incomplete), or "error" (will not work).
        name, value: what was looked at, and what was found.
        problem, fix: what is wrong and what to do; empty if nothing is.
        data: numbers behind it.
    """

    level: str
    name: str
    value: str
    problem: str = ""
    fix: str = ""
    data: Any = None


def check_packages() -> list[Finding]:
    """Versions of what must and what may be installed."""
    try:
        required = [Requirement(line) for line in importlib.metadata.requires("fluid-hf") or []]
    except importlib.metadata.PackageNotFoundError:
        required = []
    bounds = {found.name: found.specifier for found in required if found.marker is None}
    findings = []
    for name in PACKAGES:
        version = _version(name)
        bound = bounds.get(name)
        if version is None:
            fix = f"pip install '{name}{bound or ''}'"
            findings.append(Finding("error", name, "not installed", "it is required", fix))
        elif bound is not None and not bound.contains(version, prereleases=True):
            fix = f"pip install '{name}{bound}'"
            findings.append(Finding("warning", name, version, f"outside of the tested range {bound}", fix))
        else:
            findings.append(Finding("ok", name, version))
    for name, use in OPTIONAL.items():
        version = _version(name)
        if version is None and (name != "triton" or torch.cuda.is_available()):
            extra = "'fluid-hf[plot]'" if name == "matplotlib" else name
            findings.append(Finding("warning", name, "not installed", f"needed for {use}", f"pip install {extra}"))
        elif version is not None:
            findings.append(Finding("ok", name, version))
    return findings


def check_settings(environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Environment variables that decide whether anything can overlap."""
    findings = []
    for name, (bad, effect) in SETTINGS.items():
        value = environment.get(name)
        if value in bad:
            level = "warning"
            findings.append(Finding(level, name, value, effect, f"unset {name}"))
        elif value is not None or name == "CUDA_DEVICE_MAX_CONNECTIONS":
            findings.append(Finding("ok", name, value or "not set (CUDA's default, 8)"))
    if environment.get("DS_ACCELERATOR") == "cpu" and torch.cuda.is_available():
        problem = "DeepSpeed trains on the CPU although there is a GPU"
        findings.append(Finding("warning", "DS_ACCELERATOR", "cpu", problem, "unset DS_ACCELERATOR"))
    known = sorted(name for name in environment if name.startswith("NCCL_") and name not in SETTINGS)
    return findings + [Finding("ok", name, environment[name]) for name in known]


def check_devices() -> list[Finding]:
    """GPUs, NCCL, or the CPU."""
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        found = [Finding("warning", "GPUs", "none", "everything runs on the CPU with gloo: right, but slow", "")]
        if torch.version.cuda is None and shutil.which("nvidia-smi"):
            problem = "this PyTorch is a CPU build, but there is an NVIDIA driver"
            found = [Finding("error", "GPUs", "not used", problem, "install a CUDA build of torch (pytorch.org)")]
        return [*found, Finding("ok", "CPU cores", str(cores))]
    findings = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        value = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, compute capability {about.major}.{about.minor}"
        old = about.major < 8
        problem = "no bfloat16 grouped GEMM on this generation" if old else ""
        fix = "use a GPU of compute capability 8.0 or newer" if old else ""
        findings.append(Finding("warning" if old else "ok", f"GPU {index}", value, problem, fix))
    findings.append(Finding("ok", "CUDA", str(torch.version.cuda)))
    if torch.distributed.is_nccl_available():
        findings.append(Finding("ok", "NCCL", ".".join(map(str, torch.cuda.nccl.version()))))  # type: ignore[no-untyped-call]
    else:
        findings.append(Finding("error", "NCCL", "missing", "GPUs cannot talk", "install a Linux build of torch"))
    return findings


def check_links() -> list[Finding]:
    """Measured bandwidth between every two GPUs of this host, one direction at a time."""
    findings = []
    for source, target in itertools.permutations(range(torch.cuda.device_count()), 2):
        direct = torch.cuda.can_device_access_peer(source, target)
        speed = _copy_speed(source, target)
        value = f"{speed:.0f} GB/s, {'direct' if direct else 'through the host'}"
        slow = speed < SLOW_LINK
        fix = "check `nvidia-smi topo -m`; keep ep_size inside a group of GPUs with NVLink" if slow else ""
        problem = "slow link: little can be hidden" if slow else ""
        findings.append(Finding("warning" if slow else "ok", f"GPU {source} to {target}", value, problem, fix))
    return findings


def check_memory() -> list[Finding]:
    """Shared memory, which NCCL and data loaders use."""
    if not os.path.isdir("/dev/shm"):
        return []
    free = shutil.disk_usage("/dev/shm").free / 2**30
    small = free < 1
    problem = "NCCL and data loaders may fail with a bus error" if small else ""
    fix = "start the container with --shm-size 16g or --ipc host" if small else ""
    return [Finding("warning" if small else "ok", "shared memory", f"{free:.1f} GiB free", problem, fix)]


def check_layer() -> list[Finding]:
    """The layer itself: outputs and gradients beside a plain loop over the experts, on this device."""
    try:
        return judge_layer(compare_layer())
    except RuntimeError as error:
        return judge_layer(0.0, str(error))


def judge_layer(worst: float, error: str = "", ranks: int = 1) -> list[Finding]:
    """What a comparison of the layer says."""
    where = f" on {ranks} ranks" if ranks > 1 else ""
    if error:
        return [Finding("error", "layer", error[:300], "the layer does not run here", "report it with this text")]
    dtype, limit = (torch.bfloat16, 2e-2) if torch.cuda.is_available() else (torch.float32, 1e-5)
    if not worst <= limit:
        problem = f"outputs or gradients differ by more than {limit:.0e}"
        return [
            Finding("error", "layer", f"relative error {worst:.1e}{where}", problem, "do not train here; report it")
        ]
    return [Finding("ok", "layer", f"outputs and gradients right{where}, relative error {worst:.1e} ({dtype})")]


def compare_layer(group: dist.ProcessGroup | None = None, timeout_seconds: float = 600.0) -> float:
    """Largest relative error of outputs and gradients, beside a plain loop over all experts and tokens in float64.

    Args:
        group: ranks to split the experts over, which all call this; `None` for this process alone.
        timeout_seconds: how long a rank waits for another one.
    """
    from fluid_hf.moe.layer import ExpertParallelExperts

    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    random = torch.Generator().manual_seed(0)  # every rank makes the inputs of all
    inputs = [
        torch.randn(shape, generator=random).to(device, dtype)
        for shape in ((4 * size, 64, 64), (4 * size, 64, 32), (50 * size, 64))
    ]
    inputs[:2] = [0.1 * weight for weight in inputs[:2]]
    weights, index = torch.rand(50 * size, 4 * size, generator=random).to(device).topk(2)
    weights = weights.to(dtype)
    own, held = slice(50 * rank, 50 * rank + 50), slice(4 * rank, 4 * rank + 4)
    layer = ExpertParallelExperts(4 * size, 64, 32, group=group, device=device, dtype=dtype)
    layer.context.exchange.timeout_seconds = timeout_seconds
    with torch.no_grad():
        layer.gate_up_proj.copy_(inputs[0][held])
        layer.down_proj.copy_(inputs[1][held])
    hidden = inputs[2][own].clone().requires_grad_()
    output = layer(hidden, index[own], weights[own])
    grads = torch.autograd.grad(output.float().square().sum(), [*layer.parameters(), hidden])
    whole = [tensor.double().requires_grad_() for tensor in inputs]
    expected = _plain_experts(whole[2], whole[0], whole[1], index, weights.double())
    right = torch.autograd.grad(expected.square().sum(), whole)
    pairs = [(output, expected[own]), *zip(grads, (right[0][held], right[1][held], right[2][own]), strict=True)]
    errors = [(found.detach().double() - best.detach()).norm() / best.detach().norm() for found, best in pairs]
    return float(torch.stack(errors).max())  # unlike Python's max, NaN wins


def _plain_experts(
    hidden: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    output = torch.zeros_like(hidden)
    for expert in range(gate_up.shape[0]):
        gate, up = (hidden @ gate_up[expert].T).chunk(2, dim=-1)
        share = (weights * (index == expert)).sum(-1, keepdim=True)
        output = output + share * ((torch.nn.functional.silu(gate) * up) @ down[expert].T)
    return output


def _copy_speed(source: int, target: int) -> float:
    data = torch.empty(COPY_BYTES, dtype=torch.uint8, device=f"cuda:{source}")
    into = torch.empty_like(data, device=f"cuda:{target}")
    seconds = []
    for _ in range(4):
        torch.cuda.synchronize(source)
        torch.cuda.synchronize(target)
        with torch.cuda.device(source):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            into.copy_(data, non_blocking=True)
            end.record()
            end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return COPY_BYTES / min(seconds) / 1e9


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


CHECKS: dict[str, Callable[[], list[Finding]]] = {
    "packages": check_packages,
    "settings": check_settings,
    "devices": check_devices,
    "memory": check_memory,
    "links": check_links,
    "layer": check_layer,
}
