"""Parity on real NCCL: random sizes, uneven counts, delayed streams. Prints OK per rank.

torchrun --nproc_per_node 2 tests/gpu_ranks.py --rounds 30
"""

from __future__ import annotations

import contextlib
import random
from unittest import mock

import torch
import torch.distributed as dist
from families import relative_error
from gpu_world import run_cases
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from fluid_hf import ExpertParallelExperts
from fluid_hf.moe.expert_math import GatedMath
from fluid_hf.overlap.wgrad import WgradScheduler


def compare(seed: int, rank: int, world: int, device: torch.device) -> float:
    """Worst error of one random case in float32, with a stream delayed at random."""
    plan = random.Random(seed)  # equal on all ranks
    experts = world * plan.choice([1, 2, 5, 8])
    top_k, hidden, inner = plan.randint(1, min(4, experts)), plan.choice([24, 72, 136]), plan.choice([16, 40, 104])
    counts = [plan.choice([0, 1, 7, 50, 333]) for _ in range(world)]
    ways = [{"overlap": False}, {"waves": 1}, {"waves": 3}, {"waves": 5, "recompute": True}, {"waves": None}]
    settings, policy = plan.choice(ways), plan.choice(["layer", "off"])
    config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=inner, num_experts=experts)
    config._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(seed)
    full = Qwen3MoeExperts(config)
    for weight in full.parameters():
        weight.data.normal_(std=0.3, generator=generator)
    total = sum(counts)
    x_all, dy_all = (torch.randn(total, hidden, generator=generator).to(device) for _ in range(2))
    w_all = torch.rand(total, top_k, generator=generator).to(device).requires_grad_()
    index_all = torch.rand(total, experts, generator=generator).argsort(1)[:, :top_k].to(device)
    full.to(device)
    x_all.requires_grad_()
    y_all = full(x_all, index_all, w_all)
    if total:
        y_all.backward(dy_all)
    layer = ExpertParallelExperts(
        experts, hidden, inner, group=dist.group.WORLD, scheduler=WgradScheduler(policy), device=device, **settings
    )
    held = slice(rank * experts // world, (rank + 1) * experts // world)
    layer.gate_up_proj.data, layer.down_proj.data = full.gate_up_proj.data[held], full.down_proj.data[held]
    span = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    x, w = x_all.detach()[span].requires_grad_(), w_all.detach()[span].requires_grad_()
    # A call before, with fewer or more tokens: what the ranks promise each other fits badly.
    earlier = int(plan.choice([0, 0.5, 1, 2]) * len(x))
    inputs = [torch.cat([tensor, tensor]).detach()[:earlier] for tensor in (x, index_all[span], w)]
    layer(*inputs).sum().backward()
    layer.context.scheduler.finish_batch()
    layer.zero_grad()
    if plan.random() < 0.5 and plan.randrange(world) == rank and device.type == "cuda":
        torch.cuda._sleep(20_000_000)
    y = layer(x, index_all[span], w)
    y.backward(dy_all[span])
    layer.context.scheduler.finish_batch()
    if not total:
        return 0.0
    errors = [relative_error(y, y_all[span]), relative_error(x.grad, x_all.grad[span])]
    errors.append(relative_error(w.grad, w_all.grad[span]))
    errors.append(relative_error(layer.gate_up_proj.grad, full.gate_up_proj.grad[held]))
    errors.append(relative_error(layer.down_proj.grad, full.down_proj.grad[held]))
    return max(*errors, float(seed % 3 == 0 and differs_by_start(plan, rank, world, device)))


def differs_by_start(plan: random.Random, rank: int, world: int, device: torch.device) -> bool:
    """Whether a bit of a layer with large experts depends on when its own tokens' first projection is queued."""
    tokens, top_k = [plan.choice([3, 900, 1300]) for _ in range(world)][rank], 2
    generator = torch.Generator().manual_seed(plan.randrange(2**20) + rank)
    layer = ExpertParallelExperts(
        2 * world, 64, 4104, group=dist.group.WORLD, dtype=torch.bfloat16, device=device, waves=plan.randint(1, 3)
    )
    for weight in layer.parameters():
        weight.data = torch.randn(weight.shape, generator=generator).mul_(0.1).to(device, torch.bfloat16)
    scores = torch.rand(tokens, 2 * world, generator=generator)
    scores[:, :2] += 0.8  # so many for the first rank that the first call has too few places for them
    hidden = torch.randn(tokens, 64, generator=generator).to(device, torch.bfloat16).requires_grad_()
    weights = torch.rand(tokens, top_k, generator=generator).to(device).requires_grad_()
    index, found = scores.topk(top_k, 1).indices.to(device), []
    for early in (True, True, False):
        late = mock.patch.object(GatedMath, "starts_early", lambda *arguments: False)
        with contextlib.nullcontext() if early else late:
            if device.type == "cuda" and plan.randrange(world) == rank:
                torch.cuda._sleep(5_000_000)
            output = layer(hidden, index, weights)
        gradients = torch.autograd.grad(output.float().square().sum(), [hidden, weights, *layer.parameters()])
        layer.context.scheduler.finish_batch()
        found.append([output.detach(), *gradients])
    return not all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


if __name__ == "__main__":
    run_cases(__doc__, 30, compare)
