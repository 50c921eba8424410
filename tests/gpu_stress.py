"""Races: training steps with delayed streams and memory that is reused at once give the bits of quiet ones.

    python tests/gpu_stress.py                                 one GPU, its peers on a mirror link
    torchrun --nproc_per_node 2 tests/gpu_stress.py            ranks over NCCL
    python tests/gpu_stress.py --plant                         waits are left out: must fail
    torchrun --nproc_per_node 2 tests/gpu_stress.py --cpu      what it does, on the CPU

Each case is a model with random sizes and settings. At the events of its layers a rank, at random, lets the computing
stream or the one that posts communication sleep, allocates and frees tensors full of NaN, and empties the cache, under
a limit of memory that is just above what a quiet step takes. Outputs and gradients must equal a quiet step's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "garbage_collection_threshold:0.5,max_split_size_mb:20")

import torch
import torch.distributed as dist
from families import batch, tiny_model
from gpu_world import _start as start_ranks

import fluid_hf
from fluid_hf import FluidConfig
from fluid_hf.bench.mirror import init_mirror
from fluid_hf.comm.peer_exchange import ExchangeHandle

SPARE = 96 << 20  # bytes that a stressed step may hold beyond a quiet one
LARGEST = 1 << 20  # elements of the largest tensor of noise
CYCLES = 1_500_000  # longest sleep of a stream: about a millisecond


class Noise:
    """What else a busy rank does at an event of a layer."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.random = random.Random(seed)
        self.device = device
        self.held: list[torch.Tensor] = []
        self.counts = {"sleeps": 0, "tensors": 0, "emptied": 0, "refused": 0}

    def __call__(self, context: Any) -> None:
        chance = self.random.random()
        if chance < 0.5:
            self.sleep(context if chance < 0.25 else None)
        if self.random.random() < 0.7:
            self.allocate(self.random.randint(1, 5))
        if self.random.random() < 0.02 and self.device.type == "cuda":
            torch.cuda.empty_cache()
            self.counts["emptied"] += 1

    def sleep(self, context: Any) -> None:
        """Delay the current stream, or the one that posts an exchange."""
        self.counts["sleeps"] += 1
        share = self.random.random()
        if self.device.type != "cuda":
            time.sleep(0.002 * share)
            return
        side = context.exchange.side_stream.alone(self.device) if context is not None else contextlib.nullcontext()
        with side:
            torch.cuda._sleep(int(CYCLES * share))

    def allocate(self, times: int) -> None:
        """Take memory that was just freed, spoil it, and give it back at a random later moment."""
        for _ in range(times):
            size = int(LARGEST ** self.random.random())
            try:
                self.held.append(torch.full((size,), float("nan"), device=self.device))
                self.counts["tensors"] += 1
            except torch.OutOfMemoryError:
                self.held.clear()
                self.counts["refused"] += 1
        while len(self.held) > 6:
            self.held.pop(self.random.randrange(len(self.held)))


def contexts(model: Any) -> list[Any]:
    return [layer.context for layer in model.fluid.layers.values()]


@contextlib.contextmanager
def listening(model: Any, noise: Callable[[Any], None] | None) -> Iterator[None]:
    """Call the noise at every event of every layer."""
    for context in contexts(model):
        if noise is not None:
            context.record = lambda event, context=context: noise(context)
    try:
        yield
    finally:
        for context in contexts(model):
            context.record = None


def step(model: Any, ids: torch.Tensor, noise: Noise | None) -> dict[str, torch.Tensor]:
    """Bits of a step: loss, logits, every gradient."""
    model.zero_grad()
    with listening(model, noise):
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        model.fluid.finish_batch()
    found = {"loss": output.loss.detach(), "logits": output.logits.detach()}
    found.update({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    return {name: tensor.cpu() for name, tensor in found.items()}  # waits for the device


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors whose bits differ; a NaN differs from everything."""
    assert found.keys() == expected.keys()
    return [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


def build(plan: random.Random, world: int, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """A patched model of random sizes and settings, equal on all ranks."""
    big = device.type == "cuda"
    family = plan.choice(["qwen3_moe", "qwen2_moe", "mixtral"])
    sizes = {"hidden_size": plan.choice([64, 256]) if big else 32, "num_hidden_layers": plan.choice([2, 4])}
    ways: list[dict[str, Any]] = [{"overlap": False}, {"waves": 1}, {"waves": 3}, {"waves": 5}, {"waves": None}]
    settings = {**plan.choice(ways), "wgrad": plan.choice(["layer", "cross_layer", "off"])}
    settings["recompute"] = plan.random() < 0.3
    model: Any = tiny_model(family, num_experts=4 * world, attn_implementation="eager", **sizes)
    dtype = plan.choice([torch.bfloat16, torch.float32]) if big else torch.float32
    model = fluid_hf.patch_model(model.to(device, dtype), FluidConfig(ep_size=world, **settings))
    return model, {"family": family, "dtype": str(dtype), **sizes, **settings}


def run_case(seed: int, rank: int, world: int, device: torch.device, repeats: int) -> str:
    """One random case, quiet twice and stressed a few times; what it was.

    Raises:
        AssertionError: a stressed step gave other bits than a quiet one, or quiet ones differ among themselves.
    """
    plan = random.Random(seed)
    model, described = build(plan, world, device)
    rows, length = plan.choice([1, 3, 8]), plan.choice([5, 33, 60])
    ids = batch(rank, rows + rank, length=length, step=seed).to(device)
    expected = step(model, ids, None)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    again = differing(step(model, ids, None), expected)
    assert not again, f"quiet steps differ, without any stress, in {again[:3]} of {described}"
    noise = Noise(1000 * seed + rank, device)
    with limited_memory(device):
        for _ in range(repeats):
            bad = differing(step(model, ids, noise), expected)
            noise.held.clear()
            assert not bad, f"rank {rank}, case {seed}: {len(bad)} tensors differ, {bad[:3]}; {described}"
    fluid_hf.unpatch_model(model)
    return f"{described}, {ids.numel()} tokens, {noise.counts}"


@contextlib.contextmanager
def limited_memory(device: torch.device) -> Iterator[None]:
    """Allow what a quiet step reserved and a little more."""
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.max_memory_reserved() + SPARE) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="random cases")
    parser.add_argument("--repeats", type=int, default=6, help="stressed steps of each case")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--cpu", action="store_true", help="on the CPU with gloo")
    parser.add_argument("--plant", action="store_true", help="leave out waits, to see that it is found")
    options = parser.parse_args()
    if not (options.cpu or torch.cuda.is_available()):
        parser.error("needs a GPU; `torchrun --nproc_per_node 2 tests/gpu_stress.py --cpu` runs the same on the CPU")
    if "RANK" in os.environ:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        device = start_ranks(rank, options.cpu)
    else:
        rank, world, device = 0, 2, torch.device("cpu" if options.cpu else "cuda")
        init_mirror(world)
    if options.plant:
        assert callable(ExchangeHandle._wait_for_all)
        ExchangeHandle._wait_for_all = lambda self: None  # type: ignore[method-assign]
    begin = time.monotonic()
    for seed in range(options.seed, options.seed + options.rounds):
        described = run_case(seed, rank, world, device, options.repeats)
        if rank == 0:
            print(f"case {seed}, {time.monotonic() - begin:.1f} s: {described}", flush=True)
    print(
        f"OK rank {rank} of {world}: {options.rounds} cases x {options.repeats} stressed steps, same bits", flush=True
    )
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
