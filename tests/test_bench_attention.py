"""The attention benchmark in a mirror world of this process."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from fluid_hf.bench.attention import AttentionBench
from fluid_hf.bench.attention_peers import ATTENTION_SHAPES
from fluid_hf.bench.mirror import init_mirror

CPU = torch.device("cpu")


@pytest.fixture
def mirror() -> Iterator[None]:
    init_mirror(2)
    yield
    dist.destroy_process_group()


class CoreBackward(TorchDispatchMode):
    """Gradient layouts that the core attention's backward was given, by the layouts of queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Any, set[Any]] = defaultdict(set)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in str(function) and "backward" in str(function):
            grad, *inputs = args[:4]
            key = tuple((tuple(tensor.shape), tensor.stride()) for tensor in inputs)
            # Along an axis of size 1 the stride says nothing.
            self.found[key].add(tuple(step for step, size in zip(grad.stride(), grad.shape, strict=True) if size > 1))
        return function(*args, **(kwargs or {}))


def test_one_gradient_layout_for_each_layout_of_the_core(mirror: None) -> None:
    """PyTorch's cache of cuDNN graphs presumes it: a second layout would be read as the first."""
    bench = AttentionBench(ATTENTION_SHAPES["tiny"], 2, 64, CPU, dtype=torch.float32, layers=1)
    with CoreBackward() as seen:
        bench.limits(repeats=1)
        for build in bench.variants([1, 2]).values():
            bench.gradients(*build())
    assert len(seen.found) >= 3
    assert all(len(layouts) == 1 for layouts in seen.found.values()), dict(seen.found)
