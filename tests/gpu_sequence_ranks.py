"""Sequence parallelism on real NCCL: random models, layouts and delayed streams.

torchrun --nproc_per_node 2 tests/gpu_sequence_ranks.py --rounds 12
"""

from __future__ import annotations

import random

import torch
from families import FAMILIES, batch, relative_error, tiny_model
from gpu_world import run_cases

import fluid_hf
from fluid_hf import FluidConfig


def compare(seed: int, rank: int, world: int, device: torch.device) -> float:
    """Worst error of one random case in float32: loss, logits and every gradient that is not an expert's."""
    plan = random.Random(seed)  # equal on all ranks
    sp_size = plan.choice([n for n in (2, 4) if world % n == 0])
    heads = plan.choice([{"num_key_value_heads": n} for n in (1, 2, 4, 8)]) | {
        "num_attention_heads": 8,
        "hidden_size": 64,
    }
    family, length, packed = plan.choice(FAMILIES), plan.choice([8, 13, 40]), plan.random() < 0.5
    ways = [{"overlap": False}, {"waves": 1}, {"waves": 2}, {"waves": 4}]
    settings = {**plan.choice(ways), "wgrad": plan.choice(["layer", "off"]), "ep_size": plan.choice([1, world])}
    wholes = []
    for group in range(world // sp_size):
        ids = batch(group, plan.randint(1, 3), length=length, step=seed)
        positions = torch.cat([torch.arange(5), torch.arange(length - 5)]) if packed else torch.arange(length)
        whole = {"input_ids": ids, "labels": ids, "position_ids": positions.expand(len(ids), -1)}
        wholes.append({name: value.to(device) for name, value in whole.items()})
    expected = tiny_model(family, **heads).to(device)
    references = [expected(**whole, use_cache=False) for whole in wholes]
    (sum(reference.loss for reference in references) / len(references)).backward()
    model = fluid_hf.patch_model(
        tiny_model(family, **heads).to(device), FluidConfig(sp_size=sp_size, **settings)
    ).train()
    if plan.random() < 0.5 and plan.randrange(world) == rank and device.type == "cuda":
        torch.cuda._sleep(20_000_000)
    group, place = divmod(rank, sp_size)
    shard = model.fluid.shard_batch(wholes[group])
    logits = model(**shard).logits
    loss = model.fluid.sequence_loss(logits, shard["shift_labels"])
    loss.backward()
    model.fluid.finish_batch()
    model.fluid.reduce_gradients(model)
    piece = logits.shape[1]
    wanted = references[group].logits[:, place * piece : (place + 1) * piece]
    errors = [relative_error(loss, references[group].loss)]
    if wanted.numel():
        errors.append(relative_error(logits[:, : wanted.shape[1]], wanted))
    grads = {name: parameter.grad for name, parameter in expected.named_parameters()}
    found = [(name, p) for name, p in model.named_parameters() if name in grads and p.shape == grads[name].shape]
    assert sum("self_attn" in name for name, _ in found) >= 8
    errors += [relative_error(parameter.grad, grads[name]) for name, parameter in found]
    fluid_hf.unpatch_model(model)
    return max(errors)


if __name__ == "__main__":
    run_cases(__doc__, 12, compare)
