"""The whole layer on several ranks with the kernels of a GPU, against plain code in one process.

With TRITON_INTERPRET=1 only: the CPU computes what `use_kernels` says of CUDA. New memory holds NaN and the largest
integers, so that whatever reads what nobody wrote is seen.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import textwrap
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed import RankPool, rank_pool
from families import relative_error

from fluid_hf import ExpertParallelExperts
from fluid_hf.moe.layer import WaveChoice
from fluid_hf.overlap.wgrad import WgradScheduler

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton's interpreter",
)
pool2 = rank_pool(2)
pool4 = rank_pool(4)

E = 8
# Tokens of each rank (of four), and how they are routed.
CALLS = [
    ((9, 5, 3, 8), "even"),
    ((9, 7, 1, 0), "skewed"),
    ((0, 12, 4, 1), "even"),
    ((20, 0, 0, 9), "last rank"),
    ((20, 3, 7, 2), "one expert"),
    ((0, 0, 0, 0), "even"),
    ((1, 1, 1, 1), "even"),
    ((3, 14, 5, 6), "last rank"),
    ((25, 22, 8, 9), "even"),
]
WAYS: list[dict[str, Any]] = [
    {"waves": 1, "top_k": 2},
    {"waves": 3, "top_k": 3, "hidden": 20, "inner": 24},
    {"waves": 2, "top_k": 1, "wgrad": "off", "recompute": True, "evaluate": True},
    {"waves": 4, "hidden": 17, "inner": 9, "between": True},
    {"overlap": False, "recompute": True},
    {"waves": 2, "top_k": 3, "accumulate": True, "kinds": True},
    {"waves": 2, "dtype": torch.float16, "hidden": 16, "inner": 16, "evaluate": True},
    {"waves": 2, "dtype": torch.float64},
    {"waves": 2, "copied": True, "evaluate": True},
    {"overlap": False, "dtype": torch.float64},
]


@contextlib.contextmanager
def kernels(copied: bool = False) -> Iterator[None]:
    """Kernels serve tensors on the CPU, and places for the own tokens' pairs are short; rows are read, or `copied`."""
    for package in ("attention", "moe", "models"):
        path = importlib.import_module(f"fluid_hf.{package}").__path__
        for found in pkgutil.iter_modules(path):
            importlib.import_module(f"fluid_hf.{package}.{found.name}")
    from fluid_hf.moe import layer_call, own_tokens

    text = textwrap.dedent(inspect.getsource(own_tokens.OwnTokens.start_early))
    assert "9 / 8) + 256" in text
    space = dict(vars(own_tokens))
    exec("from __future__ import annotations\n" + text.replace("9 / 8) + 256", "9 / 8)"), space)
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("fluid_hf.") and hasattr(module, "use_kernels"):
                serves = lambda tensor: tensor.dtype != torch.float64  # noqa: E731
                stack.enter_context(mock.patch.object(module, "use_kernels", serves))
        stack.enter_context(mock.patch.object(own_tokens.OwnTokens, "start_early", space["start_early"]))
        stack.enter_context(mock.patch.object(layer_call, "input_status", lambda *given: layer_call.GOOD))
        if copied:
            experts, gemm_kernels = (sys.modules[f"fluid_hf.moe.{name}"] for name in ("experts", "gemm_kernels"))
            linear_kernels = sys.modules["fluid_hf.moe.linear_kernels"]
            stack.enter_context(mock.patch.object(linear_kernels, "can_describe", lambda weight: True))
            # torch's products give memory back that they work in, and end the process where places are too few.
            stack.enter_context(mock.patch.object(experts, "grouped_linear", None))
            for name in ("prefers_fused", "prefers_gathered", "prefers_gathered_wgrad"):
                stack.enter_context(mock.patch.object(gemm_kernels, name, lambda *of: False))
            stack.enter_context(mock.patch.object(experts, "_measured_faster", experts._measured_faster.__wrapped__))
        torch.use_deterministic_algorithms(True)  # fills new memory
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def route(tokens: int, top_k: int, how: str, generator: torch.Generator) -> torch.Tensor:
    chosen = torch.arange(top_k)
    if how in ("one expert", "last rank"):
        return (chosen if how == "one expert" else E - 1 - chosen)[None].expand(tokens, top_k).contiguous()
    scores = torch.rand(tokens, E, generator=generator)
    if how == "skewed":
        scores += torch.linspace(0, 2, E)
    return scores.topk(top_k, 1).indices


def tokens_of(step: int, rank: int, hidden: int, top_k: int) -> dict[str, torch.Tensor]:
    (*counts,), how = CALLS[step]
    generator = torch.Generator().manual_seed(10 * step + rank)
    return {
        "x": torch.randn(counts[rank], hidden, generator=generator),
        "index": route(counts[rank], top_k, how, generator),
        "w": torch.rand(counts[rank], top_k, generator=generator, dtype=torch.float64),
        "dy": torch.randn(counts[rank], hidden, generator=generator),
    }


def pair_of_layers(
    rank: int, world: int, way: dict[str, Any], hidden: int, dtype: torch.dtype
) -> tuple[ExpertParallelExperts, ExpertParallelExperts]:
    """All experts in float64, with outputs of about 1; and those of this rank."""
    inner = way.get("inner", 10)
    torch.manual_seed(0)
    full = ExpertParallelExperts(E, hidden, inner, dtype=torch.float64)
    settings = {name: way[name] for name in ("waves", "overlap", "recompute") if name in way}
    settings |= {"group": dist.group.WORLD, "scheduler": WgradScheduler(way.get("wgrad", "layer"))}
    layer = ExpertParallelExperts(E, hidden, inner, dtype=dtype, **settings)
    for ours, theirs in zip(layer.parameters(), full.parameters(), strict=True):
        theirs.data = (10 * theirs.data).to(dtype).double()
        ours.data = theirs.data[rank * E // world : (rank + 1) * E // world].to(dtype)
    return full, layer


def run_layer(rank: int, world: int, way: dict[str, Any]) -> list[str]:
    """What differs from one rank with plain code, over calls with very different tokens."""
    hidden, dtype = way.get("hidden", 12), way.get("dtype", torch.float32)
    tolerance = {torch.float16: 5e-3, torch.float64: 1e-12}.get(dtype, 1e-5)
    full, layer = pair_of_layers(rank, world, way, hidden, dtype)
    held = slice(rank * E // world, (rank + 1) * E // world)
    wrong, sums = [], [0.0, 0.0]
    for step in range(len(CALLS)):
        top_k = way.get("top_k", 2)
        if way.get("kinds"):
            layer.wave_choice, top_k = WaveChoice(1 + step % 3), 1 + (step // 2) % 3
        parts = [tokens_of(step, other, hidden, top_k) for other in range(world)]
        given = {name: t.to(dtype) if name != "index" else t for name, t in parts[rank].items()}
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        x, w = (whole[name].to(dtype).double().requires_grad_() for name in ("x", "w"))
        full.zero_grad()
        y = full(x, whole["index"], w)
        y.backward(whole["dy"].to(dtype).double())
        first = sum(CALLS[step][0][:rank])
        mine = slice(first, first + CALLS[step][0][rank])
        expected = [y[mine], x.grad[mine], w.grad[mine]]  # type: ignore[index]
        sums = [
            total * bool(way.get("accumulate")) + p.grad[held] for total, p in zip(sums, full.parameters(), strict=True)
        ]  # type: ignore[index]
        expected += sums  # type: ignore[arg-type]
        with kernels(way.get("copied", False)):
            if way.get("evaluate") and step % 2:
                layer.eval()
                with torch.inference_mode():
                    found = layer(given["x"], given["index"], given["w"])
                if relative_error(found, expected[0]) > tolerance:
                    wrong.append(f"step {step}: evaluation")
                layer.train()
            ours, weights = given["x"].clone().requires_grad_(), given["w"].clone().requires_grad_()
            if not way.get("accumulate"):
                layer.zero_grad()
            if way.get("between"):
                result, _ = layer(ours, given["index"], weights, lambda tokens=ours: 2 * tokens)
            else:
                result = layer(ours, given["index"], weights)
            result.backward(given["dy"])
        found = [result, ours.grad, weights.grad, *(p.grad for p in layer.parameters())]
        for name, value, wanted in zip("y dx dw gate_up down".split(), found, expected, strict=True):
            # Of next to nothing the roundings are all there is.
            error = float((value.detach().double() - wanted.detach()).norm() / wanted.detach().norm().clamp(min=1e-3))
            if not error <= tolerance:
                wrong.append(f"step {step}: {name} {error:.1e}")
        layer.context.scheduler.finish_batch()
    return wrong


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_two_ranks(pool2: RankPool, way: dict[str, Any]) -> None:
    assert pool2.run(run_layer, way) == [[], []]


@pytest.mark.parametrize("way", [WAYS[0], WAYS[1], WAYS[4]], ids=str)
def test_four_ranks(pool4: RankPool, way: dict[str, Any]) -> None:
    assert pool4.run(run_layer, way) == [[]] * 4


def run_family(rank: int, world: int, family: str, way: dict[str, Any]) -> dict[str, float]:
    from test_equivalence import run_model

    with kernels():
        return run_model(rank, world, family, world, **way)


@pytest.mark.parametrize(
    ("family", "way"),
    [("qwen2_moe", {"waves": 3}), ("mixtral", {"recompute": True, "checkpointing": "non_reentrant"})],
    ids=str,
)
def test_models_on_two_ranks(pool2: RankPool, family: str, way: dict[str, Any]) -> None:
    for errors in pool2.run(run_family, family, way):
        assert max(errors.values()) <= 1e-5, errors


def run_sequence(rank: int, world: int, family: str, in_pieces: bool, way: dict[str, Any]) -> dict[str, float]:
    from test_sequence_parallel import run_model

    from fluid_hf.attention import attention_call

    pieces = mock.patch.object(
        attention_call, "travels_in_pieces", lambda b, chunks, size, *speed: chunks == 1 and in_pieces
    )
    with kernels(), pieces:
        return run_model(rank, world, family, 2, **way)


@pytest.mark.parametrize(
    ("family", "in_pieces", "way"),
    [
        ("qwen3_moe", True, {"model_args": {"num_key_value_heads": 4}}),
        ("mixtral", False, {"waves": 2, "wgrad": "off", "packed": True, "model_args": {"num_key_value_heads": 1}}),
        ("qwen2_moe", True, {"ep_size": 2}),
        ("qwen3_moe", False, {"ep_size": 2, "waves": 3, "recompute": True, "length": 5}),
    ],
    ids=str,
)
def test_sequences_on_two_ranks(pool2: RankPool, family: str, in_pieces: bool, way: dict[str, Any]) -> None:
    for errors in pool2.run(run_sequence, family, in_pieces, way):
        assert max(errors.values()) <= 1e-5, errors


def test_ids_out_of_range_touch_no_other_memory() -> None:
    """Where nothing is exchanged the error comes late: until then every place of a pair must be one that exists."""
    from fluid_hf.moe.permutation import make_pair_plan

    index = torch.tensor([[0, 1], [2, 3], [1, 4], [0, -1], [2, 3]])
    with kernels():
        plan = make_pair_plan(index, 4, index.numel(), flag=torch.zeros(1, dtype=torch.int32))
    for places, end in ((plan.pair_row_S, index.shape[0]), (plan.pair_slot_S, index.numel())):
        assert places.min() >= 0 and places.max() < end, places.tolist()
