"""Properties that hold for any sizes: tournament, waves, routing plan, permutation, wire format, planner, groups."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluid_hf.bench.parity_cells import covering_cells
from fluid_hf.comm.tournament import num_rounds, part_bounds, plan_waves, round_peer
from fluid_hf.moe.permutation import expand_rows, make_pair_plan, reduce_pairs, reduce_rows
from fluid_hf.moe.routing_plan import count_rows, local_expert_ids, place_rows
from fluid_hf.moe.rows import RowFormat
from fluid_hf.overlap.cost_model import SERIAL, Hardware, LayerSizes, backward_seconds, expected_rows, forward_seconds
from fluid_hf.overlap.planner import choose_waves, possible_waves, predicted_seconds
from fluid_hf.process_groups import expert_data_parallel_ranks, expert_parallel_ranks, resolve_ep_size

FEW = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def routings(draw: st.DrawFn) -> tuple[torch.Tensor, int, int]:
    """Expert ids [T, K], distinct within a token and skewed at random; ranks; experts per rank."""
    ranks, local = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    experts = ranks * local
    top_k, tokens = draw(st.integers(1, min(experts, 4))), draw(st.integers(0, 25))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    popularity = torch.rand(experts, generator=generator) ** draw(st.sampled_from([0.0, 1.0, 8.0])) + 1e-6
    if not tokens:
        return torch.zeros(0, top_k, dtype=torch.int64), ranks, local
    return torch.multinomial(popularity.expand(tokens, experts), top_k, generator=generator), ranks, local


@FEW
@given(st.integers(1, 40))
def test_tournament(size: int) -> None:
    met: set[tuple[int, int]] = set()
    for index in range(num_rounds(size)):
        peers = [round_peer(index, rank, size) for rank in range(size)]
        for rank, peer in enumerate(peers):
            if peer is not None:
                assert peer != rank and peers[peer] == rank, "a pairing is mutual, so nobody has two peers"
                met.add((rank, peer))
        assert peers.count(None) == size % 2
    assert len(met) == size * (size - 1), "every pair meets"


@FEW
@given(st.integers(1, 12), st.integers(1, 30))
def test_waves(size: int, waves: int) -> None:
    plans = [plan_waves(rank, size, waves) for rank in range(size)]
    assert len({(len(planned), parts) for planned, parts in plans}) == 1, "as many waves and parts on every rank"
    for rank, (planned, parts) in enumerate(plans):
        messages = [(message.peer, message.part) for wave in planned for message in wave]
        assert sorted(messages) == [(peer, part) for peer in range(size) if peer != rank for part in range(parts)]
        for index, wave in enumerate(planned):
            for message in wave:
                back = [other for other in plans[message.peer][0][index] if other.peer == rank]
                assert [other.part for other in back] == [message.part], "the peer has the same message in this wave"


@FEW
@given(st.integers(0, 1000), st.integers(1, 40))
def test_parts_cover_all_rows_once(rows: int, parts: int) -> None:
    bounds = [part_bounds(rows, part, parts) for part in range(parts)]
    assert [low for low, _ in bounds] == [0, *(high for _, high in bounds[:-1])] and bounds[-1][1] == rows
    sizes = [high - low for low, high in bounds]
    assert max(sizes) - min(sizes) <= 1


@FEW
@given(routings(), st.booleans(), st.integers(1, 4), st.data())
def test_routing_plan(routing: tuple[torch.Tensor, int, int], skips: bool, parts: int, data: st.DataObject) -> None:
    index, ranks, local = routing
    skip = data.draw(st.integers(0, ranks - 1)) if skips else None
    hits = count_rows(index, local, ranks, skip_rank=skip, parts=parts)
    counts = hits.counts_2PC[0].tolist()
    plan = place_rows(hits, tuple(row[0] for row in counts))
    wanted = [(rank, t) for rank in range(ranks) for t in range(len(index)) if rank in (index[t] // local).tolist()]
    rows = [(rank, token) for rank, token in wanted if rank != skip]
    assert list(zip(plan.row_rank_R.tolist(), plan.row_token_R.tolist(), strict=True)) == rows
    for row, (rank, token) in enumerate(rows):
        assert plan.token_row_TP[token, rank] == row
    assert int((plan.token_row_TP < len(rows)).sum()) == len(rows)
    ids = local_expert_ids(index[plan.row_token_R], local, plan.row_rank_R)
    for rank in range(ranks):  # the receiver's counts of pairs, part by part
        start = plan.bounds(rank)[0]
        for part in range(parts if rank != skip else 1):
            low, high = plan.bounds(rank, part, parts) if rank != skip else (0, 0)
            pairs = int((ids[low:high] >= 0).sum()) if rank != skip else int((index // local == rank).sum())
            assert counts[rank][1 + part] == pairs and (low >= start or rank == skip)
    assert sum(sum(row[1:]) for row in counts) == index.numel(), "every pair is counted once"


@FEW
@given(routings())
def test_permutation(routing: tuple[torch.Tensor, int, int]) -> None:
    index, ranks, local = routing
    served = torch.zeros(index.shape, dtype=torch.int64)
    for rank in range(ranks):
        first = rank * local
        here = (index >= first) & (index < first + local)
        plan = make_pair_plan(index, local, int(here.sum()), first)
        experts = torch.repeat_interleave(torch.arange(local), torch.diff(plan.offsets_E, prepend=torch.zeros(1).int()))
        slots = plan.pair_slot_S
        assert torch.equal(index.reshape(-1)[slots] - first, experts), "pairs are sorted by expert"
        assert torch.equal(slots // index.shape[1], plan.pair_row_S)
        served.view(-1)[slots] += 1
        rows = torch.randn(len(index), 3, dtype=torch.float64)
        total = torch.empty_like(rows)
        reduce_pairs([expand_rows(rows, plan)], plan, total)
        assert torch.allclose(total, rows * here.sum(1, keepdim=True)), "back to the row, once per expert"
    assert bool((served == 1).all()), "every pair is served exactly once"


@FEW
@given(routings())
def test_rows_return_to_their_tokens(routing: tuple[torch.Tensor, int, int]) -> None:
    index, ranks, local = routing
    hits = count_rows(index, local, ranks, skip_rank=None, parts=1)
    plan = place_rows(hits, tuple(hits.counts_2PC[0][:, 0].tolist()))
    values = torch.randn(sum(plan.rows), 2, dtype=torch.float64)
    own = torch.randn(len(index), 2, dtype=torch.float64)
    expected = own.clone().index_add_(0, plan.row_token_R, values)
    assert torch.allclose(reduce_rows(own, values, plan.token_row_TP, torch.float64), expected)


@FEW
@given(
    st.integers(1, 70),
    st.integers(1, 9),
    st.integers(0, 5),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_wire_format(hidden: int, top_k: int, rows: int, dtype: torch.dtype) -> None:
    form = RowFormat(hidden, top_k, dtype)
    assert form.stride % 16 == form.gradient_stride % 16 == 0
    buffer = form.new_rows(rows, torch.device("cpu"))
    parts = [form.hidden_of(buffer), form.ids_of(buffer), form.weights_of(buffer)]
    values = [torch.randint(-9, 9, part.shape).to(part.dtype) for part in parts]
    for part, value in zip(parts, values, strict=True):
        part.copy_(value)
    assert all(torch.equal(part, value) for part, value in zip(parts, values, strict=True)), "no part overlaps another"
    back = form.new_gradient_rows(rows, torch.device("cpu"))
    form.hidden_of(back).fill_(1)
    form.weight_gradients_of(back).fill_(2)
    assert bool((form.hidden_of(back) == 1).all())


@FEW
@given(st.integers(0, 10**6), st.integers(1, 16), st.integers(1, 64), st.integers(0, 4))
def test_planner(tokens: int, top_k: int, local: int, power: int) -> None:
    ranks = 2**power
    experts = ranks * local
    top_k = min(top_k, experts)
    sizes = LayerSizes(tokens, top_k, experts, ranks, 1024, 512)
    hardware = Hardware(flops=5e14, memory=2e12, link=4e10)
    waves = choose_waves(sizes, hardware, training=True)
    assert waves in possible_waves(ranks)
    times = {w: forward_seconds(sizes, hardware, w) + backward_seconds(sizes, hardware, w) for w in {1, waves}}
    assert times[waves] <= times[1]
    chosen = choose_waves(sizes, hardware, training=True, serial=True)
    assert predicted_seconds(sizes, hardware, chosen, training=True) <= predicted_seconds(
        sizes, hardware, SERIAL, training=True
    )
    more = dataclasses.replace(sizes, tokens=tokens + 1000)
    assert forward_seconds(more, hardware, waves) >= forward_seconds(sizes, hardware, waves) * (1 - 1e-9) > 0
    rows = expected_rows(tokens, top_k, experts, ranks)
    assert 0 <= rows <= tokens * min(top_k, ranks - 1 if ranks > 1 else 0) + 1e-6


@FEW
@given(st.integers(1, 20000), st.integers(1, 3), st.floats(5e9, 5e11), st.floats(0, 0.9), st.floats(0, 5e-4))
def test_predictions_of_any_link(tokens: int, power: int, speed: float, taken: float, post: float) -> None:
    """No pass is shorter than its GEMMs or its bytes, nor shorter over a link that costs more."""
    ranks = 2**power
    sizes = LayerSizes(tokens, 8, 128, ranks, 2048, 768)
    hardware = Hardware(6e14, 3e12, link=speed, post=post, taken=taken)
    bytes_both = 2 * sizes.rows * sizes.hidden * sizes.element_bytes
    least = max(6 * sizes.pairs * sizes.hidden * sizes.inner / hardware.flops, bytes_both / speed)
    for waves in (SERIAL, *possible_waves(ranks)):
        time = predicted_seconds(sizes, hardware, waves, training=False)
        assert least <= time <= predicted_seconds(sizes, hardware, waves, training=True)
        costly = dataclasses.replace(hardware, post=post + 1e-3)
        assert time <= predicted_seconds(sizes, costly, waves, training=False) * (1 + 1e-9)


@FEW
@given(st.integers(1, 64), st.integers(1, 256))
def test_groups(world: int, experts: int) -> None:
    ep_size = resolve_ep_size(None, world, experts)
    assert world % ep_size == experts % ep_size == 0
    for groups in (expert_parallel_ranks(world, ep_size), expert_data_parallel_ranks(world, ep_size)):
        assert sorted(rank for group in groups for rank in group) == list(range(world))
    for one in expert_parallel_ranks(world, ep_size):
        for other in expert_data_parallel_ranks(world, ep_size):
            assert len(set(one) & set(other)) == 1


@settings(max_examples=3, deadline=None, derandomize=True)
@given(st.integers(0, 1000), st.sampled_from([1, 2, 4]))
def test_covering_cells_are_equal_on_all_ranks(seed: int, world: int) -> None:
    assert covering_cells(world, seed=seed) == covering_cells(world, seed=seed)
