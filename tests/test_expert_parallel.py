"""The expert-parallel layer against transformers' own experts: outputs, input, weight and routing-weight gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import RankPool, rank_pool
from families import relative_error
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from fluid_hf import ExpertParallelExperts
from fluid_hf.overlap.wgrad import WgradScheduler

pool2 = rank_pool(2)
pool4 = rank_pool(4)

E, H, INNER, K = 8, 16, 12, 3
CASES = ("even", "uneven", "no_tokens_on_one", "one_token", "all_elsewhere", "idle_expert", "one_expert")
TOLERANCE = 1e-5


def reference_experts() -> Qwen3MoeExperts:
    config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=INNER, num_experts=E, num_experts_per_tok=K)
    config._experts_implementation = "eager"
    experts = Qwen3MoeExperts(config)
    generator = torch.Generator().manual_seed(0)
    for weight in experts.parameters():
        weight.data.normal_(std=0.3, generator=generator)
    return experts


def routing(case: str, rank: int, world: int, tokens: int) -> torch.Tensor:
    """Expert ids [tokens, K] of one rank, distinct within a token."""
    generator = torch.Generator().manual_seed(17 + rank)
    allowed = list(range(E))
    local = E // world
    if case == "all_elsewhere" and rank == 0 and world > 1:  # rank 0 keeps none of its own tokens
        allowed = list(range(local, E))
    if case == "idle_expert":
        allowed = [expert for expert in allowed if expert != E - 1]
    if case == "one_expert":  # every token takes the same experts, all on one rank if they fit
        allowed = allowed[:K]
    picks = [torch.tensor(allowed)[torch.randperm(len(allowed), generator=generator)[:K]] for _ in range(tokens)]
    return torch.stack(picks) if tokens else torch.zeros(0, K, dtype=torch.int64)


def token_counts(case: str, world: int) -> list[int]:
    return {
        "uneven": [5 + 4 * rank for rank in range(world)],
        "no_tokens_on_one": [0] + [6] * (world - 1),
        "one_token": [1] + [0] * (world - 1),
    }.get(case, [9] * world)


def inputs(case: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    tokens = token_counts(case, world)[rank]
    generator = torch.Generator().manual_seed(100 + rank)
    return {
        "x": torch.randn(tokens, H, generator=generator),
        "w": torch.rand(tokens, K, generator=generator),
        "dy": torch.randn(tokens, H, generator=generator),
        "index": routing(case, rank, world, tokens),
    }


def reference(case: str, world: int) -> dict[str, torch.Tensor]:
    experts = reference_experts()
    parts = [inputs(case, rank, world) for rank in range(world)]
    joint = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    x, w = joint["x"].requires_grad_(), joint["w"].requires_grad_()
    y = experts(x, joint["index"], w)
    y.backward(joint["dy"])
    assert x.grad is not None and w.grad is not None
    return {
        "y": y.detach(),
        "dx": x.grad,
        "dw": w.grad,
        "gate_up": experts.gate_up_proj.grad,
        "down": experts.down_proj.grad,
    }


def run_layer(rank: int, world: int, case: str, **settings: Any) -> dict[str, float]:
    """Errors of one rank against the reference."""
    expected = reference(case, world)
    full = reference_experts()
    policy = settings.pop("wgrad", "layer")
    group = dist.group.WORLD if world > 1 else None
    layer = ExpertParallelExperts(E, H, INNER, group=group, scheduler=WgradScheduler(policy), **settings)
    held = slice(rank * E // world, (rank + 1) * E // world)
    layer.gate_up_proj.data, layer.down_proj.data = (
        full.gate_up_proj.data[held].clone(),
        full.down_proj.data[held].clone(),
    )
    mine = inputs(case, rank, world)
    counts = token_counts(case, world)
    span = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    x, w = mine["x"].requires_grad_(), mine["w"].requires_grad_()
    y = layer(x, mine["index"], w)
    y.backward(mine["dy"])
    layer.context.scheduler.finish_batch()
    got = {"y": y.detach(), "dx": x.grad, "dw": w.grad}
    errors = {name: relative_error(value, expected[name][span]) for name, value in got.items()}
    for name, weight in (("gate_up", layer.gate_up_proj), ("down", layer.down_proj)):
        errors[name] = relative_error(weight.grad, expected[name][held])
    return errors


def run_all_settings(rank: int, world: int, case: str) -> dict[str, float]:
    """The largest error of each quantity over all ways of running the layer."""
    worst: dict[str, float] = {}
    ways = [{"overlap": False}, *({"waves": waves} for waves in (1, 2, 3, 5))]
    for way, wgrad, recompute in itertools.product(ways, ("layer", "off"), (False, True)):
        for name, error in run_layer(rank, world, case, wgrad=wgrad, recompute=recompute, **way).items():
            worst[name] = max(error, worst.get(name, 0.0))
    return worst


@pytest.mark.parametrize("case", CASES)
def test_single_rank(case: str) -> None:
    if sum(token_counts(case, 1)):
        assert max(run_all_settings(0, 1, case).values()) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_two_ranks(pool2: RankPool, case: str) -> None:
    for errors in pool2.run(run_all_settings, case):
        assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("case", CASES)
def test_four_ranks(pool4: RankPool, case: str) -> None:
    for errors in pool4.run(run_all_settings, case):
        assert max(errors.values()) <= TOLERANCE, errors


def run_three_ranks(rank: int, world: int) -> bool:
    """An odd group inside four ranks: one rank idles in every round."""
    group = dist.new_group([0, 1, 2])
    if rank == 3:
        return True
    experts, hidden, inner = 6, 8, 10
    torch.manual_seed(0)
    full = ExpertParallelExperts(experts, hidden, inner)
    x_all, index_all = torch.randn(3, 7, hidden), torch.stack([torch.randperm(6)[:2] for _ in range(21)]).view(3, 7, 2)
    w_all = torch.rand(3, 7, 2)
    expected = full(x_all.view(21, hidden), index_all.view(21, 2), w_all.view(21, 2)).view(3, 7, hidden)
    for waves in (1, 2, 3, 7):
        layer = ExpertParallelExperts(experts, hidden, inner, group=group, waves=waves)
        held = slice(rank * 2, rank * 2 + 2)
        layer.gate_up_proj.data, layer.down_proj.data = full.gate_up_proj.data[held], full.down_proj.data[held]
        y = layer(x_all[rank], index_all[rank], w_all[rank])
        if relative_error(y, expected[rank]) > TOLERANCE:
            return False
    return True


def test_odd_group(pool4: RankPool) -> None:
    assert pool4.run(run_three_ranks) == [True] * 4


def run_equal_bits(rank: int, world: int) -> bool:
    torch.manual_seed(rank)
    layer = ExpertParallelExperts(E, H, INNER, group=dist.group.WORLD, waves=3)
    mine = inputs("uneven", rank, world)
    results = []
    for _ in range(3):
        x = mine["x"].clone().requires_grad_()
        layer.zero_grad()
        y = layer(x, mine["index"], mine["w"])
        y.backward(mine["dy"])
        results.append((y.detach(), x.grad, layer.gate_up_proj.grad.clone(), layer.down_proj.grad.clone()))
    return all(torch.equal(a, b) for later in results[1:] for a, b in zip(results[0], later, strict=True))


def test_results_are_equal_bit_for_bit_from_run_to_run(pool2: RankPool) -> None:
    assert pool2.run(run_equal_bits) == [True, True]


def test_gelu_activation_matches_autograd() -> None:
    torch.manual_seed(0)
    layer = ExpertParallelExperts(4, 8, 6, act=torch.nn.functional.gelu, dtype=torch.float64)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(5)])
    w = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: layer(a, index, b), (x, w))


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_under_autocast_each_projection_may_have_its_own_type(name: str) -> None:
    """As where only one of them is trained, in float32: autocast gives transformers' layer both in its type."""
    mine, results = inputs("even", 0, 1), []
    for types in ({}, {name: torch.bfloat16}):
        layer = reference_experts()
        for weight, dtype in types.items():
            parameter = layer.get_parameter(weight)
            parameter.data = parameter.data.to(dtype)
        experts = ExpertParallelExperts(E, H, INNER)
        experts.gate_up_proj, experts.down_proj = layer.gate_up_proj, layer.down_proj
        x = mine["x"].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = experts(x, mine["index"], mine["w"])
        y.backward(mine["dy"])
        assert {p.grad.dtype == p.dtype for p in experts.parameters()} == {True}
        results.append((y, x.grad, *[p.grad.bfloat16() for p in experts.parameters()]))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True)), "equal weights, once rounded"


def run_bf16_error(rank: int, world: int) -> tuple[float, float]:
    """Error of the layer and of transformers' layer in bfloat16, both against float64."""
    mine = inputs("even", rank, world)
    full = reference_experts()
    exact = full.double()(mine["x"].double(), mine["index"], mine["w"].double())
    half = full.bfloat16()
    x, w = mine["x"].bfloat16(), mine["w"].bfloat16()
    theirs = half(x, mine["index"], w)
    layer = ExpertParallelExperts(E, H, INNER, group=dist.group.WORLD, dtype=torch.bfloat16)
    held = slice(rank * E // world, (rank + 1) * E // world)
    layer.gate_up_proj.data, layer.down_proj.data = half.gate_up_proj.data[held], half.down_proj.data[held]
    return relative_error(layer(x, mine["index"], w), exact), relative_error(theirs, exact)


def test_bfloat16_is_no_worse_than_transformers(pool2: RankPool) -> None:
    for ours, theirs in pool2.run(run_bf16_error):
        assert ours <= 1.05 * theirs, (ours, theirs)
