"""Leaks, determinism, generation and evaluation of patched models, and what is read from files."""

from __future__ import annotations

import ast
from typing import Any

import pytest
import soak
import torch
from distributed import ROOT, RankPool, rank_pool
from families import batch, relative_error, tiny_model

import fluid_hf
from fluid_hf import FluidConfig

pool2 = rank_pool(2)


def run_short_soak(rank: int, world: int) -> list[list[str]]:
    steps = soak.growth(soak.run_steps(rank, world, 60, 20))
    patches = soak.growth(soak.run_patches(rank, world, 16, 6))
    return [soak.leaks(steps, 16), soak.leaks(patches, 16)]


def test_nothing_leaks(pool2: RankPool) -> None:
    assert pool2.run(run_short_soak) == [[[], []], [[], []]]


def test_leaks_are_seen() -> None:
    first = {"rss": 10, "threads": 3, "descriptors": 7}
    grown = soak.growth([first, {"rss": 10 + 2**24, "threads": 3, "descriptors": 8}])
    assert soak.leaks(grown, 17) == ["descriptors grew by 1"]
    assert soak.leaks(grown, 15)[0].startswith("rss grew by")


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
}


def run_generate(rank: int, world: int, way: str) -> bool:
    """Prompts of other lengths on every rank; ranks that finish early go on, as `synced_gpus` says."""
    prompt = batch(rank, 1 + rank, length=5 + 3 * rank)
    options = {"max_new_tokens": 5, "pad_token_id": 0, **WAYS[way]}
    plain = tiny_model("qwen3_moe")
    torch.manual_seed(rank)
    expected = plain.generate(prompt, **options)
    model = fluid_hf.patch_model(tiny_model("qwen3_moe"), FluidConfig(ep_size=world))
    torch.manual_seed(rank)
    found = model.generate(prompt, synced_gpus=True, **options)
    fluid_hf.unpatch_model(model)
    return torch.equal(found, expected)


@pytest.mark.parametrize("way", WAYS)
def test_generation_equals_the_unpatched_model(pool2: RankPool, way: str) -> None:
    assert pool2.run(run_generate, way) == [True, True]


def run_evaluation(rank: int, world: int) -> float:
    """Left-padded batches under `no_grad` in evaluation mode."""
    model = fluid_hf.patch_model(tiny_model("mixtral").eval(), FluidConfig(ep_size=world))
    ids = batch(rank, 2, length=9)
    mask = torch.ones_like(ids)
    mask[0, : 2 + rank] = 0
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        expected = tiny_model("mixtral").eval()(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    fluid_hf.unpatch_model(model)
    return relative_error(found, expected)


def test_evaluation_equals_the_unpatched_model(pool2: RankPool) -> None:
    assert max(pool2.run(run_evaluation)) <= 1e-5


def run_twice(rank: int, world: int) -> bool:
    """The same bits from run to run: loss and every gradient."""
    runs = []
    for _ in range(2):
        model = fluid_hf.patch_model(tiny_model("qwen2_moe"), FluidConfig(ep_size=world, waves=3))
        ids = batch(rank, 3)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        runs.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        fluid_hf.unpatch_model(model)
    return all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_same_seed_same_bits(pool2: RankPool) -> None:
    assert pool2.run(run_twice) == [True, True]


def unsafe_calls(source: str) -> list[str]:
    """Calls that run what they read: unpickling, `eval`, `exec`, a shell, YAML's full loader."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {option.arg: ast.unparse(option.value) for option in node.keywords}
        if name.endswith(("pickle.load", "pickle.loads", "joblib.load", "yaml.load", "os.system")):
            found.append(name)
        elif name in ("eval", "exec", "compile", "__import__"):
            found.append(name)
        elif name == "torch.load" and options.get("weights_only") != "True":
            found.append(name)
        elif options.get("shell") == "True" or options.get("allow_pickle") == "True":
            found.append(name)
    return found


# DeepSpeed's own checkpoints are pickles that hold its classes; DeepSpeed unpickles them as well when it resumes.
DEEPSPEED_FILES = {"universal.py", "zero_to_fp32.py"}


def test_nothing_that_is_read_is_run() -> None:
    files = [*(ROOT / "fluid_hf").rglob("*.py"), *(ROOT / "integrations").rglob("*.py")]
    assert len(files) > 40
    found = {path.name: unsafe_calls(path.read_text(encoding="utf-8")) for path in files}
    found = {name: calls for name, calls in found.items() if calls}
    assert set(found) <= DEEPSPEED_FILES
    assert {call for calls in found.values() for call in calls} <= {"torch.load"}


@pytest.mark.parametrize(
    "line",
    [
        "pickle.loads(x)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "eval(text)",
        "subprocess.run(command, shell=True)",
        "numpy.load(path, allow_pickle=True)",
    ],
)
def test_unsafe_calls_are_seen(line: str) -> None:
    assert len(unsafe_calls(line)) == 1
    assert unsafe_calls("torch.load(path, weights_only=True)\nmodel.eval()\njson.loads(text)") == []
