"""The order of events is the published schedule, and the bytes on the wire are the deduplicated rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import RankPool, rank_pool
from families import batch, tiny_model

import fluid_hf
from fluid_hf import ExpertParallelExperts, FluidConfig
from fluid_hf.comm.calibration import measure_link
from fluid_hf.comm.peer_exchange import PeerExchange
from fluid_hf.moe.rows import RowFormat

pool2 = rank_pool(2)
pool4 = rank_pool(4)


def record(rank: int, world: int, family: str, **settings: Any) -> dict[str, list[str]]:
    model = fluid_hf.patch_model(tiny_model(family), FluidConfig(ep_size=world, **settings))
    ids = batch(rank, 2)
    with model.fluid.record_events() as events:
        output = model(input_ids=ids, labels=ids)
        forward = len(events)
        output.loss.backward()
    last = list(model.fluid.layers)[-1]
    model.fluid.finish_batch()
    fluid_hf.unpatch_model(model)
    return {
        "forward": [event for name, event in events[:forward] if name == last],
        "backward": [event for name, event in events[forward:] if name == last],
    }


def test_events_of_two_waves(pool2: RankPool) -> None:
    for events in pool2.run(record, "qwen3_moe", waves=2):
        assert events["forward"] == [
            "post dispatch",
            "wait dispatch 0",
            "post combine 0",
            "wait dispatch 1",
            "post combine 1",
            "wait combine 0",
            "wait combine 1",
        ]
        assert events["backward"] == [
            "post output grad",
            "dgrad own",
            "wait output grad 0",
            "dgrad 0",
            "post return 0",
            "wait output grad 1",
            "dgrad 1",
            "post return 1",
            "wgrad down",
            "wgrad up",
            "wgrad gate",
            "wait return 0",
            "wait return 1",
        ]


def test_policy_off_computes_weight_gradients_before_the_last_return(pool2: RankPool) -> None:
    for events in pool2.run(record, "mixtral", waves=2, wgrad="off"):
        backward = events["backward"]
        assert backward.index("post return 0") < backward.index("dgrad 1") < backward.index("post return 1")


def test_serial_reference_exchanges_once(pool2: RankPool) -> None:
    for events in pool2.run(record, "mixtral", overlap=False):
        assert events["forward"] == ["post dispatch", "wait dispatch 0", "post combine 0", "wait combine 0"]


@pytest.mark.parametrize("waves", [1, 2, 3, 6])
def test_every_rank_posts_the_same_waves(pool4: RankPool, waves: int) -> None:
    results = pool4.run(record, "qwen3_moe", waves=waves)
    assert len({tuple(events["backward"]) for events in results}) == 1


def run_statistics(rank: int, world: int, **settings: Any) -> tuple[int, int, int]:
    model = fluid_hf.patch_model(tiny_model("qwen3_moe"), FluidConfig(ep_size=world, **settings))
    ids = batch(rank, 2)
    model(input_ids=ids, labels=ids).loss.backward()
    held = model.fluid.scheduler.held_bytes
    stats = model.fluid.finish_batch()
    complete = all(parameter.grad is not None for parameter in model.parameters())
    assert complete and held == 0 and (stats.peak_bytes > 0)
    fluid_hf.unpatch_model(model)
    return stats.inside, stats.outside, held


def test_weight_gradients_run_inside_windows(pool2: RankPool) -> None:
    weights = 2 * 3  # layers x (gate, up, down)
    assert [(inside, outside) for inside, outside, _ in pool2.run(run_statistics)] == [(weights, 0)] * 2
    assert [(inside, outside) for inside, outside, _ in pool2.run(run_statistics, wgrad="off", waves=1)] == [
        (0, weights)
    ] * 2


def count_bytes(rank: int, world: int, waves: int | None, overlap: bool) -> list[tuple[float, float]]:
    """(bytes counted at the process group, bytes of the unique token-rank rows) of dispatch, combine and backward."""
    hidden, top_k, experts, tokens = 1024, 2, 8, 50 + 10 * rank
    torch.manual_seed(rank)
    group = torch.distributed.group.WORLD
    layer = ExpertParallelExperts(experts, hidden, 8, group=group, waves=waves, overlap=overlap)
    x = torch.randn(tokens, hidden, requires_grad=True)
    index = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    w = torch.rand(tokens, top_k, requires_grad=True)
    owner = index // (experts // world)
    pairs = {(token, int(peer)) for token in range(tokens) for peer in owner[token] if int(peer) != rank}
    sent = len(pairs)
    received_from: list[int] = [0] * world
    counts = torch.zeros(world, dtype=torch.int64)
    for _, peer in pairs:
        counts[peer] += 1
    gathered = [torch.zeros_like(counts) for _ in range(world)]
    torch.distributed.all_gather(gathered, counts)
    received_from = [int(gathered[source][rank]) for source in range(world)]
    row = hidden * 4
    exchange = layer.context.exchange
    layer.wave_choice.get(layer, tokens, top_k, x.device)
    start = exchange.bytes_sent
    y = layer(x, index, w)
    forward = exchange.bytes_sent - start
    start = exchange.bytes_sent
    y.sum().backward()
    backward = exchange.bytes_sent - start
    both = (sent + sum(received_from)) * row  # out and back
    return [(forward, both), (backward, both)]


@pytest.mark.parametrize("overlap", [True, False])
def test_bytes_are_those_of_unique_rows(pool4: RankPool, overlap: bool) -> None:
    for waves in (None, 1, 5) if overlap else (None,):
        for passes in pool4.run(count_bytes, waves, overlap):
            for counted, needed in passes:
                assert needed <= counted <= 1.03 * needed, (counted, needed)


def test_metadata_share_at_real_sizes() -> None:
    for hidden, top_k in ((4096, 2), (3584, 8), (2048, 8)):
        row = hidden * 2
        form = RowFormat(hidden, top_k, torch.bfloat16)
        assert row <= form.stride <= 1.03 * row and row <= form.gradient_stride <= 1.03 * row


def run_drain(rank: int, world: int) -> bool:
    """Communication that nobody waited for is finished by the next call, and its buffers are released."""
    exchange = PeerExchange(torch.distributed.group.WORLD, rank, world)
    received = torch.zeros(3)
    exchange.post([(1 - rank, torch.full((3,), float(rank)))], [(1 - rank, received)])
    assert len(exchange._in_flight) == 1
    exchange.drain()
    return not exchange._in_flight and received.tolist() == [float(1 - rank)] * 3


def test_forgotten_exchanges_are_drained(pool2: RankPool) -> None:
    assert pool2.run(run_drain) == [True, True]


def measure(rank: int, world: int) -> tuple[float, ...]:
    exchange = PeerExchange(dist.group.WORLD, rank, world)
    link = measure_link(exchange, torch.device("cpu"), repeats=2)
    assert exchange.bytes_sent == 0, "what is measured is not counted"
    return float(link), link.latency, link.post, link.taken


def test_ranks_agree_on_the_speed_of_the_link(pool2: RankPool) -> None:
    first, second = pool2.run(measure)
    assert first == second
    assert min(first[:3]) > 0 and 0 <= first[3] <= 0.9


def run_gpu_case(rank: int, world: int, seed: int) -> tuple[float, float]:
    import gpu_ranks
    import gpu_sequence_ranks

    device = torch.device("cpu")
    return gpu_ranks.compare(seed, rank, world, device), gpu_sequence_ranks.compare(seed, rank, world, device)


def test_cases_of_the_gpu_scripts_are_right_on_the_cpu(pool2: RankPool) -> None:
    for errors in pool2.run(run_gpu_case, 3):
        assert max(errors) <= 1e-5


def run_between_two(rank: int, world: int) -> list[float]:
    """As over NCCL, where two ranks exchange what each sends by one all-to-all: rows that differ in number, or none."""
    exchange, peer = PeerExchange(dist.group.WORLD, rank, world), 1 - rank
    for counts in ((3, 5), (0, 4), (4, 0)):
        sent, received = torch.full((counts[rank], 2, 3), float(rank)), torch.full((counts[peer], 2, 3), -1.0)
        exchange._track([exchange._start_between_two(*_pairs(peer, sent, received))], [sent, received]).wait()
        assert bool((received == peer).all())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            PeerExchange, "_start", lambda self, *pairs: [self._start_between_two(*pairs)] if any(pairs) else []
        )
        return [max(run_gpu_case(rank, world, seed)) for seed in (3, 4)]


def _pairs(peer: int, *tensors: torch.Tensor) -> list[list[tuple[int, torch.Tensor]]]:
    return [[(peer, tensor)] if tensor.numel() else [] for tensor in tensors]


def test_two_ranks_exchange_by_one_all_to_all(pool2: RankPool) -> None:
    for errors in pool2.run(run_between_two):
        assert max(errors) <= 1e-5
