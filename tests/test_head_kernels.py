"""Kernels between the wire and the core against the plain code. On a GPU, or on the CPU with TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
import torch.distributed as dist

from fluid_hf.attention import head_layouts
from fluid_hf.attention.head_layouts import HeadNorms, NormSums
from fluid_hf.attention.heads import plan_heads
from fluid_hf.attention.rotary import RotaryTables
from fluid_hf.bench.attention import AttentionBench
from fluid_hf.bench.attention_peers import ATTENTION_SHAPES
from fluid_hf.bench.mirror import init_mirror

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
AVAILABLE = importlib.util.find_spec("triton") is not None and (torch.cuda.is_available() or INTERPRETED)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not AVAILABLE, reason="needs Triton and a GPU, or its interpreter")]
if AVAILABLE:
    from fluid_hf.attention import head_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def plain_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared with is the plain code, on a GPU too."""
    monkeypatch.setattr(head_layouts, "use_kernels", lambda tensor: False)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("batch", "tables_of"), [(1, 1), (3, 1), (3, 3)])
@pytest.mark.parametrize(("heads", "kv_heads", "size", "dim"), [(8, 4, 2, 8), (8, 2, 4, 12), (6, 6, 2, 32)])
def test_heads_from_and_to_the_wire(
    monkeypatch: pytest.MonkeyPatch,
    heads: int,
    kv_heads: int,
    size: int,
    dim: int,
    batch: int,
    tables_of: int,
    normed: bool,
) -> None:
    torch.manual_seed(0)
    length = 19
    layout = plan_heads(heads, kv_heads, size)
    tokens = size * length
    tables = RotaryTables.shaped(*(torch.rand(tables_of, tokens, dim, device=DEVICE) for _ in range(2)), size)
    norms = HeadNorms(*(torch.rand(dim, device=DEVICE) for _ in range(2)), 1e-6) if normed else None
    of_norms = []
    for kernels in (False, True):
        monkeypatch.setattr(head_layouts, "use_kernels", lambda tensor, kernels=kernels: kernels)
        of_norms.append(NormSums(layout, torch.empty(size, batch * length, 1, device=DEVICE), dim))
    monkeypatch.setattr(head_layouts, "use_kernels", lambda tensor: False)
    for chunk in layout.chunks(3):
        columns = (chunk.num_q + 2 * chunk.num_kv) * dim
        wire = torch.randn(size, batch * length, columns, device=DEVICE)
        expected = head_layouts.heads_from_wire(wire.clone(), batch, chunk, tables, norms)
        found = head_kernels.heads_from_wire(wire.clone(), batch, chunk, tables, norms)
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        # As eager, sdpa and a transposed result lay gradients out.
        grads = [torch.randn(batch, tokens, one.shape[1], dim, device=DEVICE).transpose(1, 2) for one in expected]
        grads[0] = grads[0].contiguous()
        sent = [torch.empty_like(wire) for _ in range(2)]
        for module, buffer, sums in zip((head_layouts, head_kernels), sent, of_norms, strict=True):
            module.heads_to_wire(tuple(grads), batch, chunk, tables, norms, wire, buffer, sums)
        torch.testing.assert_close(sent[1], sent[0])
    if norms is not None:
        for theirs, ours in zip(*(sums.total(norms) for sums in of_norms), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(8, 8, 2), (8, 4, 2), (8, 2, 4), (8, 1, 4)])
@pytest.mark.parametrize("own", [None, 1])
def test_packed_gradients(heads: int, kv_heads: int, size: int, own: int | None) -> None:
    torch.manual_seed(0)
    layout, dim, tokens = plan_heads(heads, kv_heads, size), 12, 45
    packed = [torch.full((tokens, (heads + 2 * kv_heads) * dim), 7.0, device=DEVICE) for _ in range(2)]
    for chunk in layout.chunks(2):
        grad = torch.randn(size, tokens, (chunk.num_q + 2 * chunk.num_kv) * dim, device=DEVICE)
        mine = None if own is None else torch.randn_like(grad[own])
        for module, target in zip((head_layouts, head_kernels), packed, strict=True):
            module.pack_gradient(layout, chunk, grad.clone(), target, own or 0, mine)
    torch.testing.assert_close(packed[1], packed[0])


@pytest.mark.parametrize("width", [24, 2049])
def test_rows_in_travel_order(width: int) -> None:
    tensors = [torch.randn(rows, width, device=DEVICE) for rows in (6, 4, 4)]
    index = torch.tensor([13, 0, 5, 6, 9, 10, 10, 3], device=DEVICE)
    found = head_kernels.order_rows(tensors, index)
    assert torch.equal(found, head_layouts.order_rows(tensors, index))


@pytest.mark.parametrize("shape", ["tiny", "tiny-normed"])
@pytest.mark.parametrize(("size", "chunks"), [(2, 1), (2, 2), (2, 3), (4, 2), (8, 1)])
@pytest.mark.parametrize("least", [0, 1 << 60])
def test_whole_layer(monkeypatch: pytest.MonkeyPatch, shape: str, size: int, chunks: int, least: int) -> None:
    """One layer's output and gradients with the kernels and with the plain code, in pieces or not."""
    monkeypatch.setattr("fluid_hf.attention.planner.MIN_SECONDS_IN_PIECES", least)
    init_mirror(size)
    try:
        bench = AttentionBench(ATTENTION_SHAPES[shape], size, 16 * size, DEVICE, dtype=torch.float32, layers=1)
        expected = bench.gradients(*bench.ours(overlap=True, chunks=chunks))
        monkeypatch.setattr(head_layouts, "use_kernels", lambda tensor: True)
        found = bench.gradients(*bench.ours(overlap=True, chunks=chunks))
    finally:
        dist.destroy_process_group()
    for name, theirs in expected.items():
        torch.testing.assert_close(found[name], theirs, rtol=1e-4, atol=1e-4)
