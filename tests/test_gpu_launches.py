"""Kernels of one layer call on a GPU: what the README states, and no more."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

from fluid_hf.bench.layer import LayerBench, measure
from fluid_hf.bench.mirror import init_mirror
from fluid_hf.bench.shapes import SHAPES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture
def mirror() -> Iterator[None]:
    init_mirror(2)
    yield
    dist.destroy_process_group()


def kernels(run: Callable[[], object]) -> int:
    """Kernels that a call queues, copies over the link left out."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    events = [event for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum("Memcpy" not in event.name and "Memset" not in event.name for event in events)


def counts(ranks: int, waves: int) -> tuple[int, int]:
    bench = LayerBench(SHAPES["small"], ranks, 512, torch.device("cuda"))
    layer = bench.ours(overlap=True, waves=waves)

    def forward() -> None:
        with torch.no_grad():
            layer(bench.hidden, bench.index, bench.weights)

    return kernels(forward), kernels(lambda: bench.gradients(layer, layer))


def test_kernels_without_communication() -> None:
    forward, both = counts(1, 1)
    assert forward <= 6 and both <= 16, (forward, both)


@pytest.mark.parametrize(("waves", "forward_limit", "both_limit"), [(1, 15, 38), (2, 20, 46)])
def test_kernels_with_communication(mirror: None, waves: int, forward_limit: int, both_limit: int) -> None:
    forward, both = counts(2, waves)
    assert forward <= forward_limit and both <= both_limit, (forward, both)


def test_mirror_collective_is_waited_for_whole(mirror: None) -> None:
    """The own part is there too when another stream than the posting one has waited, however little crossed."""
    own, there = 1 << 25, 1 << 8
    source = torch.rand(own + there, device="cuda")
    for _ in range(5):
        target, side = torch.zeros_like(source), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            options = dist.AllToAllOptions()
            work = dist.group.WORLD.alltoall_base(target, source, [own, there], [own, there], options)
        work.wait()
        found = target.clone()
        assert torch.equal(found, source)
        torch.cuda.synchronize()


def test_the_gpu_rests_before_each_timed_run() -> None:
    begin = time.monotonic()
    median, _ = measure(lambda: torch.zeros(8, device="cuda"), 5, torch.device("cuda"), pause=0.1)
    assert time.monotonic() - begin >= 0.5 and median < 100, "the pauses are not timed"
