"""Which heads go to which rank, and how they are cut into chunks; the fused projection against the plain ones."""

from __future__ import annotations

import pytest
import torch

from fluid_hf.attention.fused_projection import HeadPlan
from fluid_hf.attention.heads import HeadChunk, plan_heads
from fluid_hf.attention.planner import choose_head_chunks, travels_in_pieces
from fluid_hf.errors import ConfigError


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "expected"),
    [
        (8, 8, 2, ((0, 1, 2, 3), (4, 5, 6, 7))),  # multi-head
        (8, 4, 2, ((0, 1), (2, 3))),
        (8, 2, 2, ((0,), (1,))),
        (8, 2, 4, ((0,), (0,), (1,), (1,))),  # fewer than ranks: replicas
        (8, 1, 4, ((0,), (0,), (0,), (0,))),  # multi-query
        (6, 3, 2, ((0, 0, 1), (1, 2, 2))),  # no even groups: one replica for each query head
    ],
)
def test_key_value_heads_of_each_rank(
    heads: int, kv_heads: int, size: int, expected: tuple[tuple[int, ...], ...]
) -> None:
    layout = plan_heads(heads, kv_heads, size)
    assert layout.kv_heads == expected
    assert layout.replicated == (len(layout.kv_index()) != kv_heads)
    for rank in range(size):  # every query head finds its own key/value head
        for q in range(layout.local_q):
            assert layout.kv_heads[rank][q // layout.group] == (rank * layout.local_q + q) * kv_heads // heads


def test_indivisible_heads_name_the_remedy() -> None:
    with pytest.raises(
        ConfigError, match=r"num_attention_heads \(6\) must be divisible by sp_size \(4\); use sp_size 2"
    ):
        plan_heads(6, 6, 4)


def test_chunks() -> None:
    assert plan_heads(16, 8, 2).chunks(2) == (HeadChunk((0, 4), (0, 2), (0, 2)), HeadChunk((4, 8), (2, 4), (2, 4)))
    first, middle, last = plan_heads(16, 8, 2).chunks(3)  # small ends
    assert (first.q, middle.q, last.q) == ((0, 2), (2, 6), (6, 8)) and middle.kv == middle.used == (1, 3)
    assert [chunk.num_q for chunk in plan_heads(16, 2, 2).chunks(3)] == [2, 4, 2]
    assert [chunk.num_kv for chunk in plan_heads(16, 2, 2).chunks(3)] == [1, 0, 0]
    assert plan_heads(16, 8, 2).chunks(5) == plan_heads(16, 8, 2).chunks(4)  # 5 does not divide 4
    assert len(plan_heads(8, 4, 2).chunks(3)) == 2
    first, second = plan_heads(8, 2, 2).chunks(2)  # one key/value head: it comes first
    assert (first.num_q, first.num_kv, second.num_q, second.num_kv, second.used) == (2, 1, 2, 0, (0, 1))
    assert len(plan_heads(6, 3, 2).chunks(3)) == 1


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(8, 8, 2), (8, 4, 2), (8, 2, 2), (8, 2, 4), (8, 1, 4), (6, 3, 2)]
)
@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
def test_fused_projection(heads: int, kv_heads: int, size: int, chunks: int) -> None:
    """Products by rank, and the gradients of weights and input, against autograd on the plain projections."""
    dim, hidden, tokens = 4, 10, 7
    torch.manual_seed(0)
    layout = plan_heads(heads, kv_heads, size)
    weights = {
        name: torch.randn(n * dim, hidden, dtype=torch.double)
        for name, n in zip("qkv", (heads, kv_heads, kv_heads), strict=True)
    }
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    x = torch.randn(tokens, hidden, dtype=torch.double, requires_grad=True)
    q, k, v = ((x @ leaves[name].t()).unflatten(1, (-1, dim)) for name in "qkv")
    plan = HeadPlan(layout, dim, chunks)
    loss = torch.zeros((), dtype=torch.double)
    packed = torch.full((tokens, (heads + 2 * kv_heads) * dim), torch.nan, dtype=torch.double)
    rows = plan.travelling(weights)
    apart = plan.apart(rows)
    if not layout.replicated:
        assert torch.equal(plan.home(rows), torch.cat([weights[name] for name in "qkv"]))
    for index, (chunk, right) in enumerate(zip(plan.chunks, plan.by_rank(rows), strict=True)):
        found = torch.bmm(x.detach().expand(size, -1, -1), right)
        for rank, one in enumerate(apart[index]):
            torch.testing.assert_close(x.detach() @ one, found[rank])
        grad = torch.randn_like(found)
        for rank in range(size):
            start = rank * layout.local_q
            kv = list(layout.kv_heads[rank][chunk.kv[0] : chunk.kv[1]])
            wanted = torch.cat([q[:, start + chunk.q[0] : start + chunk.q[1]], k[:, kv], v[:, kv]], dim=1).flatten(1)
            torch.testing.assert_close(found[rank], wanted)
            loss = loss + (wanted * grad[rank]).sum()
        plan.pack_gradient(index, grad, packed)
    into = plan.split(packed.t() @ x.detach())
    grad_x = packed @ torch.cat([weights[name] for name in "qkv"])
    loss.backward()
    torch.testing.assert_close(grad_x, x.grad)
    for name, leaf in leaves.items():
        torch.testing.assert_close(into[name], leaf.grad)


@pytest.mark.parametrize(
    ("num_bytes", "size", "chunks"),
    [
        (0, 2, 1),
        (18 << 20, 8, 1),
        (18 << 20, 2, 1),
        (40 << 20, 8, 1),
        (40 << 20, 2, 2),
        (70 << 20, 8, 3),
        (1 << 30, 2, 3),
    ],
)
def test_chunks_where_they_pay(num_bytes: int, size: int, chunks: int) -> None:
    assert choose_head_chunks(num_bytes, size) == chunks
    assert choose_head_chunks(10 * num_bytes, size, speed=460e9) == chunks


@pytest.mark.parametrize(
    ("num_bytes", "chunks", "size", "expected"),
    [(36 << 20, 1, 2, True), (18 << 20, 1, 2, False), (36 << 20, 1, 4, False), (144 << 20, 3, 2, False)],
)
def test_pieces_where_no_core_hides_an_exchange(num_bytes: int, chunks: int, size: int, expected: bool) -> None:
    assert travels_in_pieces(num_bytes, chunks, size) == expected
