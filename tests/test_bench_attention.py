"""The attention benchmark in a mirror world of this process."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fluid_hf import cli
from fluid_hf.bench.attention import AttentionBench, AttentionLayer
from fluid_hf.bench.attention_peers import ATTENTION_SHAPES
from fluid_hf.bench.mirror import MirrorGroup, init_mirror

CPU = torch.device("cpu")


@pytest.fixture(params=[2, 8])
def mirror(request: pytest.FixtureRequest) -> Iterator[int]:
    init_mirror(request.param)
    yield request.param
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


def test_one_gradient_layout_for_each_layout_of_the_core(mirror: int) -> None:
    """PyTorch's cache of cuDNN graphs presumes it: a second layout would be read as the first."""
    bench = AttentionBench(ATTENTION_SHAPES["tiny"], mirror, 64, CPU, dtype=torch.float32, layers=1)
    with CoreBackward() as seen:
        bench.limits(repeats=1)
        for build in bench.variants([1, 2, 3]).values():
            bench.gradients(*build())
    assert len(seen.found) >= 3
    assert all(len(layouts) == 1 for layouts in seen.found.values()), dict(seen.found)


class Operations(TorchDispatchMode):
    """Counts what the host has PyTorch do: kernels, views and allocations alike."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def as_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the work that one kernel does on a GPU, and the link's, count as little as there: shapes only."""

    def from_wire(received: torch.Tensor, batch: int, chunk: Any, tables: Any, norms: Any) -> tuple[torch.Tensor, ...]:
        heads = chunk.num_q + 2 * chunk.num_kv
        dim, tokens = received.shape[2] // heads, received.shape[0] * received.shape[1]
        counts = (chunk.num_q, chunk.num_kv, chunk.num_kv)[: 3 if chunk.num_kv else 1]
        shapes = [(1, count, tokens, dim) for count in counts]
        return tuple(received.as_strided(shape, (0, dim, heads * dim, 1)) for shape in shapes)

    def to_wire(grads: Any, batch: int, chunk: Any, tables: Any, norms: Any, raw: Any, sent: Any, sums: Any) -> None:
        sent.zero_()

    def all_to_all(self: Any, output: torch.Tensor, *args: Any) -> Any:
        return self._work([output], [])

    monkeypatch.setattr("fluid_hf.attention.overlapped.heads_from_wire", from_wire)
    monkeypatch.setattr("fluid_hf.attention.overlapped.heads_to_wire", to_wire)
    monkeypatch.setattr(
        "fluid_hf.attention.fused_projection.pack_gradient", lambda layout, chunk, grad, *_: grad.zero_()
    )
    monkeypatch.setattr(
        "fluid_hf.attention.fused_projection.order_rows",
        lambda tensors, index: tensors[0].new_zeros(len(index), *tensors[0].shape[1:]),
    )
    monkeypatch.setattr(MirrorGroup, "alltoall_base", all_to_all)
    monkeypatch.setattr(MirrorGroup, "all_to_all_single", all_to_all)


def count_operations(bench: AttentionBench, layer: AttentionLayer, module: nn.Module) -> tuple[int, int]:
    """Operations of one forward and one backward, after a first one."""
    bench.gradients(layer, module)
    hidden = bench.hidden.detach().requires_grad_()
    with Operations() as forward:
        output = layer(hidden)
    with Operations() as backward:
        output.backward(bench.grad)
    return forward.count, backward.count


LIMITS = {("tiny", 1): (26, 34), ("tiny", 2): (42, 48), ("tiny-normed", 1): (26, 40), ("tiny-normed", 2): (40, 56)}
MORE_IN_PIECES = (10, 16)


def test_operations_of_a_call(mirror: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer, forward and backward: what the README states, and with one chunk less than half of DeepSpeed's."""
    as_kernels(monkeypatch)
    for shape in ("tiny", "tiny-normed"):
        sizes = dataclasses.replace(ATTENTION_SHAPES[shape], heads=16)
        bench = AttentionBench(sizes, mirror, 8 * mirror, CPU, dtype=torch.float32, layers=1)
        counts = {}
        for name, build in bench.variants([1, 2]).items():
            counts[name] = count_operations(bench, *build())
        theirs = counts["UlyssesSPAttentionHF"]
        for chunks in (1, 2):
            found, limits = counts[f"overlap {chunks}"], LIMITS[shape, chunks]
            assert found[0] <= limits[0] and found[1] <= limits[1], (shape, chunks, found)
            assert sum(found) < sum(theirs), (shape, found, theirs)
        assert 2 * sum(counts["overlap 1"]) < sum(theirs)
        further = [more - one for more, one in zip(counts["overlap 2"], counts["overlap 1"], strict=True)]
        assert max(further) <= 20, (shape, further)


@pytest.mark.parametrize("shape", ["tiny", "tiny-normed"])
def test_operations_of_a_call_in_pieces(monkeypatch: pytest.MonkeyPatch, shape: str) -> None:
    """Of two ranks with one chunk: operations more, forward and backward."""
    as_kernels(monkeypatch)
    init_mirror(2)
    found = []
    for least in (1 << 60, 0):
        monkeypatch.setattr("fluid_hf.attention.planner.MIN_SECONDS_IN_PIECES", least)
        bench = AttentionBench(ATTENTION_SHAPES[shape], 2, 16, CPU, dtype=torch.float32, layers=1)
        found.append(count_operations(bench, *bench.ours(overlap=True)))
    dist.destroy_process_group()
    more = [pieces - whole for whole, pieces in zip(*found, strict=True)]
    assert all(a <= b for a, b in zip(more, MORE_IN_PIECES, strict=True)), (more, found)


@pytest.mark.parametrize("trained", ["q_proj", "k_proj", "o_proj", "k_norm", "hidden"])
@pytest.mark.parametrize("least", [0, 1 << 60])
def test_gradients_of_one_part_alone(mirror: int, trained: str, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody wants a gradient of is not sent back, and the rest is as with plain all-to-alls, in pieces or not."""
    monkeypatch.setattr("fluid_hf.attention.planner.MIN_SECONDS_IN_PIECES", least)
    shape = dataclasses.replace(ATTENTION_SHAPES["tiny-normed"], heads=8)
    bench = AttentionBench(shape, mirror, 8 * mirror, CPU, dtype=torch.float32, layers=1)
    found = []
    for build in (lambda: bench.ours(overlap=False), *(lambda n=n: bench.ours(overlap=True, chunks=n) for n in (1, 2))):
        layer, module = build()
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
        hidden = bench.hidden.detach().requires_grad_(trained == "hidden")
        layer(hidden).backward(bench.grad)
        grads = [hidden.grad, *(parameter.grad for parameter in module.parameters())]
        found.append([grad for grad in grads if grad is not None])
    for ours in found[1:]:
        assert len(ours) == len(found[0]) == 1
        torch.testing.assert_close(ours[0], found[0][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("least", [0, 1 << 60])
def test_steps_on_each_gradient_as_it_comes(mirror: int, least: int, chunks: int, monkeypatch: Any) -> None:
    """An optimizer in the backward pass changes o_proj's weight before the gradient of the input is computed."""
    monkeypatch.setattr("fluid_hf.attention.planner.MIN_SECONDS_IN_PIECES", least)
    shape = dataclasses.replace(ATTENTION_SHAPES["tiny"], heads=8)
    bench = AttentionBench(shape, mirror, 8 * mirror, CPU, dtype=torch.float32, layers=1)
    layer, module = bench.ours(overlap=True, chunks=chunks)
    wanted = bench.gradients(layer, module)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    def step(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        with torch.no_grad():
            parameter.sub_(parameter.grad)

    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    hidden = bench.hidden.detach().requires_grad_()
    layer(hidden).backward(bench.grad)
    torch.testing.assert_close(hidden.grad, wanted["hidden"], rtol=1e-5, atol=1e-5)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - wanted[name], rtol=1e-5, atol=1e-5)


def test_benchmark_checks_every_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Outputs and gradients of all variants, DeepSpeed's UlyssesSPAttentionHF among them, on mirror worlds."""
    file = tmp_path / "attention.json"
    command = ["bench", "attention", "--shapes", "tiny", "tiny-normed"]
    options = ["--sp", "1", "2", "8", "--tokens", "64", "--layers", "2", "--json", str(file)]
    assert cli.main([*command, *options]) == 0
    cells = json.loads(file.read_text())["cells"]
    assert [(cell["shape"], cell["sp_size"]) for cell in cells] == [
        (shape, size) for size in (1, 2, 8) for shape in ("tiny", "tiny-normed")
    ]
    for cell in cells:
        wanted = {"serial", "overlap 1", "UlyssesSPAttentionHF"} if cell["sp_size"] > 1 else {"transformers"}
        assert wanted <= set(cell["errors"])
        assert all(isinstance(error, float) and error <= 1e-5 for error in cell["errors"].values()), cell["errors"]
    capsys.readouterr()
    assert cli.main(["bench", "table", "--json", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(cells) and lines[2].startswith("| tiny SP1")
    assert torch.cuda.is_available() or "0.00" not in "".join(lines)  # what was not timed is no time of zero


def test_report_says_where_the_time_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "attention.json"
    options = ["--shapes", "tiny", "--sp", "1", "2", "--tokens", "64", "--chunks", "2", "--report", "--json", str(out)]
    assert cli.main(["bench", "attention", *options]) == 0
    alone, shared = json.loads(out.read_text())["cells"]
    assert not alone["report"] and sorted(shared["report"]) == ["overlap 1", "serial"]
    for passes in shared["report"].values():
        for found in passes.values():
            # Computing, messages alone and neither are all there is.
            parts = found["compute_ms"] + found["exposed_ms"] + found["idle_ms"]
            assert parts == pytest.approx(found["ms"], rel=1e-2) and found["compute_ms"] > 0 and found["link_ms"] > 0
        assert sorted(passes) == ["both", "forward"]
    waits = shared["report"]["overlap 1"]["both"]["waits"]
    assert {"heads", "head gradients"} <= waits.keys() and "exchange" not in waits
    table = capsys.readouterr().out.split("\n\n")[-1]
    assert table.count("| tiny SP2, 64 tokens |") == 4 and "| overlap 1 | forward |" in table


def test_memory_of_a_step_falls_with_the_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What autograd keeps; the rest is counted on GPUs only."""
    file = tmp_path / "memory.json"
    options = ["--model", "tiny", "--tokens", "64", "128", "--sp", "1", "2", "8", "--json", str(file)]
    assert cli.main(["bench", "attention", "--memory", *options]) == 0
    cells = {(cell["tokens"], cell["sp_size"]): cell for cell in json.loads(file.read_text())["cells"]}
    for tokens, sp_size in ((64, 2), (64, 8), (128, 2), (128, 8)):
        assert cells[tokens, sp_size]["held"] == cells[tokens, 1]["held"] > 0
        assert cells[tokens, sp_size]["saved"] * sp_size <= 1.05 * cells[tokens, 1]["saved"]
    capsys.readouterr()
    assert cli.main(["bench", "table", "--json", str(file)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 6
