"""What `fluid-hf doctor` looks at when it runs on several ranks: do they agree, and does every pair of them talk?"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import socket
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from tqdm import tqdm

from fluid_hf.comm.peer_exchange import PeerExchange
from fluid_hf.comm.tournament import num_rounds, round_peer
from fluid_hf.commands.doctor_checks import (
    CHECKS,
    COPY_BYTES,
    PACKAGES,
    SETTINGS,
    SLOW_LINK,
    Finding,
    compare_layer,
    judge_layer,
)
from fluid_hf.control import ControlGroup
from fluid_hf.errors import CollectiveError, FluidError
from fluid_hf.process_groups import crossing_groups

__all__ = ["RankInfo", "examine", "judge_agreement", "judge_pairs", "judge_ranks", "merge", "runs_on_ranks"]

LOCAL_CHECKS = ("packages", "settings", "devices", "memory")
CPU_COPY_BYTES = 4 << 20
REPEATS = 4  # the first connects the pair
MUST_AGREE = ("fluid-hf", "torch", "NCCL")  # other versions of these do not talk, or compute otherwise


@dataclass(frozen=True)
class RankInfo:
    """What one rank is.

    Attributes:
        host: name of its node.
        gpu: identity of its GPU; empty without one.
        versions: of what is installed, by name.
        settings: environment variables that communication depends on.
    """

    host: str
    gpu: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PairResult:
    """What a rank found out about one peer: GB/s in each direction at once, or what went wrong."""

    peer: int
    speed: float = 0.0
    right: bool = True
    error: str = ""


def runs_on_ranks() -> bool:
    """Whether a launcher started this process as one of several ranks."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def examine(skip: Sequence[str], timeout_seconds: float) -> dict[str, list[Finding]]:
    """Run the checks; the same report on every rank. Collective over all ranks.

    Raises:
        CollectiveError: not all ranks came, or one stopped coming.
    """
    mine = not dist.is_initialized()
    if mine:
        _start(timeout_seconds)
    control = ControlGroup(timeout_seconds, "doctor")
    report: dict[str, list[Finding]] = {}
    for name in [name for name in LOCAL_CHECKS if name not in skip]:
        report[name] = merge(control.gather(CHECKS[name](), f"doctor's check of {name}"))
    infos: list[RankInfo] = control.gather(_describe(), "doctor's list of ranks")
    report["ranks"] = [*judge_ranks(infos), *judge_agreement(infos)]
    if not any(finding.level == "error" for finding in report["ranks"]):
        if "links" not in skip:
            pairs = _measure_pairs(control, timeout_seconds)
            report["links"] = judge_pairs(pairs, [info.host for info in infos], on_gpu=bool(infos[0].gpu))
        if "layer" not in skip and not any(finding.level == "error" for finding in report.get("links", [])):
            report["layer"] = _check_layer(control, timeout_seconds)
    control.close()
    if mine:
        dist.destroy_process_group()
    return report


def _start(timeout_seconds: float) -> None:
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_seconds))
    except RuntimeError as error:
        world, address = os.environ["WORLD_SIZE"], os.environ.get("MASTER_ADDR", "not set")
        raise CollectiveError(
            f"ranks that came must be WORLD_SIZE ({world}) within {timeout_seconds:.0f} s at MASTER_ADDR ({address}); "
            f"start the command on every node, with an address and a port that all of them reach. ({error})"
        ) from error


def _describe() -> RankInfo:
    versions = {"python": platform.python_version()}
    for name in ("fluid-hf", *PACKAGES):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    gpu = ""
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(torch.cuda.current_device())
        gpu = str(getattr(about, "uuid", torch.cuda.current_device()))
        versions |= {"GPU": about.name, "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}  # type: ignore[no-untyped-call]
    known = {name for name in os.environ if name in SETTINGS or name.startswith(("NCCL_", "TORCH_NCCL_"))}
    return RankInfo(socket.gethostname(), gpu, versions, {name: os.environ[name] for name in known})


def merge(found: Sequence[list[Finding]]) -> list[Finding]:
    """The findings of all ranks: what all found once, the rest with the ranks that found it."""
    by_finding: dict[Finding, list[int]] = {}
    for rank, findings in enumerate(found):
        for finding in findings:
            by_finding.setdefault(finding, []).append(rank)
    return [
        finding if len(ranks) == len(found) else replace(finding, name=f"{finding.name} ({_ranks(ranks)})")
        for finding, ranks in by_finding.items()
    ]


def judge_ranks(infos: Sequence[RankInfo]) -> list[Finding]:
    """Where the ranks are, and whether each has a device of its own."""
    hosts = [info.host for info in infos]
    nodes = list(dict.fromkeys(hosts))
    counts = [hosts.count(node) for node in nodes]
    findings = [Finding("ok", "ranks", f"{len(infos)} on {len(nodes)} node(s): {' + '.join(map(str, counts))}")]
    if hosts != [node for node, count in zip(nodes, counts, strict=True) for _ in range(count)]:
        problem = "ranks of one node are not neighbours, so expert-parallel groups cross the network"
        fix = "number the ranks node by node, as torchrun and deepspeed do"
        findings.append(Finding("warning", "order of ranks", ", ".join(hosts), problem, fix))
    elif len(set(counts)) > 1:
        problem = "nodes with other numbers of ranks: expert-parallel groups cross them"
        findings.append(Finding("warning", "ranks per node", ", ".join(map(str, counts)), problem, "use equal nodes"))
    if len(nodes) > 1:
        sizes = [n for n in range(1, len(hosts) + 1) if len(hosts) % n == 0 and not crossing_groups(hosts, n)]
        findings.append(Finding("ok", "ep_size", f"{' or '.join(map(str, sizes))} keeps rows inside a node"))
    with_gpu = [rank for rank, info in enumerate(infos) if info.gpu]
    if with_gpu and len(with_gpu) < len(infos):
        without = [rank for rank, info in enumerate(infos) if not info.gpu]
        problem = "some ranks see no GPU and cannot talk to the others"
        fix = "check CUDA_VISIBLE_DEVICES, the driver and the build of torch there"
        findings.append(Finding("error", "GPUs", f"none on {_ranks(without)}", problem, fix))
    owners: dict[tuple[str, str], list[int]] = {}
    for rank in with_gpu:
        owners.setdefault((infos[rank].host, infos[rank].gpu), []).append(rank)
    for (host, _), ranks in owners.items():
        if len(ranks) > 1:
            allowed = infos[ranks[0]].settings.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"
            problem = "ranks take turns on it" if allowed else "NCCL refuses ranks that share a GPU"
            fix = f"start at most as many ranks on {host} as it has GPUs, each with its own LOCAL_RANK"
            level = "warning" if allowed else "error"
            findings.append(Finding(level, "one GPU", f"of {_ranks(ranks)}", problem, fix))
    return findings


def judge_agreement(infos: Sequence[RankInfo]) -> list[Finding]:
    """Whether versions and settings are equal on all ranks."""
    findings = []
    for name in dict.fromkeys(name for info in infos for name in info.versions):
        values = [info.versions.get(name, "none") for info in infos]
        if len(set(values)) > 1:
            level = "error" if name in MUST_AGREE else "warning"
            fix = "use the same environment (container, virtual environment) and hardware on all nodes"
            findings.append(Finding(level, name, _by_value(values), "differs between ranks", fix))
    for name in sorted({name for info in infos for name in info.settings}):
        values = [info.settings.get(name, "not set") for info in infos]
        if len(set(values)) > 1:
            fix = f"set {name} alike on all nodes, in the launcher's environment or ~/.deepspeed_env"
            findings.append(Finding("warning", name, _by_value(values), "differs between ranks", fix))
    return findings or [Finding("ok", "agreement", "versions and settings are equal on all ranks")]


def judge_pairs(found: Sequence[Sequence[PairResult]], hosts: Sequence[str], *, on_gpu: bool) -> list[Finding]:
    """Speed of every pair, from what each rank found; the first finding of each kind holds the numbers.

    Args:
        found: results of each rank in rank order.
        hosts: node of each rank.
        on_gpu: whether links inside a node should be fast.
    """
    findings = []
    results: dict[tuple[int, int], list[PairResult]] = {}
    for rank, row in enumerate(found):
        for result in row:
            results.setdefault((min(rank, result.peer), max(rank, result.peer)), []).append(result)
    speeds: dict[bool, dict[tuple[int, int], float]] = {True: {}, False: {}}
    for pair, both in sorted(results.items()):
        name, errors = f"ranks {pair[0]} and {pair[1]}", [result.error for result in both if result.error]
        if errors:
            fix = "NCCL_DEBUG=INFO names the step; check firewalls, NCCL_SOCKET_IFNAME, `nvidia-smi topo -m`"
            findings.append(Finding("error", name, errors[0][:300], "they cannot talk", fix))
        elif not all(result.right for result in both):
            fix = "try NCCL_P2P_DISABLE=1 to tell the direct link from the rest; check the GPUs' error counters"
            findings.append(Finding("error", name, "wrong bytes arrived", "the link or its driver is broken", fix))
        else:
            speeds[hosts[pair[0]] == hosts[pair[1]]][pair] = min(result.speed for result in both)
    for same, kind in ((True, "inside a node"), (False, "between nodes")):
        findings += _judge_speeds(speeds[same], kind, SLOW_LINK if on_gpu and same else 0.0)
    return sorted(findings, key=lambda finding: finding.data is None)


def _judge_speeds(speeds: Mapping[tuple[int, int], float], kind: str, least: float) -> list[Finding]:
    if not speeds:
        return []
    usual = statistics.median(speeds.values())
    low, high = min(speeds.values()), max(speeds.values())
    value = f"{len(speeds)} pair(s), {low:.3g} to {high:.3g} GB/s each way at once"
    rows = tuple((*pair, round(speed, 3)) for pair, speed in sorted(speeds.items()))
    findings = [Finding("ok", kind, value, data=rows)]
    for (first, second), speed in speeds.items():
        fix = "check `nvidia-smi topo -m`, and keep ep_size inside a group of GPUs with NVLink"
        if speed < least:
            problem = f"slow link (below {least:.0f} GB/s): little can be hidden"
        elif speed < 0.5 * usual:
            problem = f"less than half of the usual {usual:.3g} GB/s: every exchange waits for this pair"
            fix = "look for another job, a cable, a switch port or a network card at these two"
        else:
            continue
        findings.append(Finding("warning", f"ranks {first} and {second}", f"{speed:.3g} GB/s", problem, fix))
    return findings


def _measure_pairs(control: ControlGroup, timeout_seconds: float) -> list[list[PairResult]]:
    """Every pair once, in the rounds of the tournament; stops at the first round in which ranks cannot talk."""
    rank, size = dist.get_rank(), dist.get_world_size()
    exchange = PeerExchange(dist.group.WORLD, rank, size)
    exchange.timeout_seconds = timeout_seconds
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    found: list[list[PairResult]] = [[] for _ in range(size)]
    if device.type == "cuda":
        _connect(device)
    for index in tqdm(range(num_rounds(size)), desc="links", leave=False, disable=None if rank == 0 else True):
        peer, result = round_peer(index, rank, size), None
        if peer is not None:
            exchange.at("doctor", "measurement of links", index)
            try:
                result = _measure_pair(exchange, peer, device)
            except (FluidError, RuntimeError) as error:
                result = PairResult(peer, error=f"{type(error).__name__}: {error}")
        results = control.gather(result, "doctor's measurement of links")
        for row, one in zip(found, results, strict=True):
            row.extend([one] if one is not None else [])
        if any(one is not None and one.error for one in results):
            break
    return found


def _connect(device: torch.device) -> None:
    """NCCL's first call must be one of all ranks; in a round of the tournament one may idle.

    Raises:
        CollectiveError: NCCL does not start here.
    """
    try:
        dist.all_reduce(torch.zeros(1, device=device))
        torch.cuda.synchronize(device)  # host synchronisation: once per report
    except RuntimeError as error:
        raise CollectiveError(
            f"NCCL must start on rank {dist.get_rank()} ({socket.gethostname()}), but: {error} "
            "NCCL_DEBUG=INFO names the step; check the driver, NCCL_SOCKET_IFNAME and firewalls."
        ) from error


def _measure_pair(exchange: PeerExchange, peer: int, device: torch.device) -> PairResult:
    size = COPY_BYTES if device.type == "cuda" else CPU_COPY_BYTES
    sent = torch.full((size,), exchange.rank % 251, dtype=torch.uint8, device=device)
    received = torch.full_like(sent, 255)
    best = float("inf")
    for _ in range(REPEATS):
        best = min(best, _seconds(exchange, peer, sent, received))
    return PairResult(peer, size / best / 1e9, bool((received == peer % 251).all()))


def _seconds(exchange: PeerExchange, peer: int, sent: torch.Tensor, received: torch.Tensor) -> float:
    """Seconds of one exchange.

    Raises:
        PeerError: it did not end in time.
    """
    if not sent.is_cuda:
        begin = time.perf_counter()
        exchange.post([(peer, sent)], [(peer, received)]).wait()
        return time.perf_counter() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    exchange.post([(peer, sent)], [(peer, received)]).wait()
    end.record()
    exchange.wait_for(end, peers=[peer])
    return start.elapsed_time(end) / 1e3


def _check_layer(control: ControlGroup, timeout_seconds: float) -> list[Finding]:
    worst, problem = 0.0, ""
    try:
        worst = compare_layer(dist.group.WORLD, timeout_seconds)
    except (FluidError, RuntimeError) as error:
        problem = f"{type(error).__name__}: {error}"
    results = control.gather((worst, problem), "doctor's check of the layer")
    problem = next((text for _, text in results if text), "")
    values = torch.tensor([value for value, _ in results])
    return judge_layer(float(values.max()), problem, len(results))  # unlike Python's max, NaN wins


def _by_value(values: Sequence[str]) -> str:
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return ", ".join(f"{value} on {_ranks(found)}" for value, found in ranks.items())


def _ranks(ranks: Sequence[int]) -> str:
    """`ranks 0-2, 5`."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and parts[-1][-1] == rank - 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    text = ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
