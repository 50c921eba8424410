"""Leaks, determinism, generation and evaluation of patched models, and what is read from files."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import soak
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from distributed import ROOT, RankPool, rank_pool
from families import batch, relative_error, tiny_model
from transformers import MixtralForCausalLM

import fluid_hf
from fluid_hf import CheckpointError, FluidConfig
from fluid_hf.integrations.safe_files import check_files, read_file, read_tag
from fluid_hf.integrations.zero_to_fp32 import _model_class

pool2 = rank_pool(2)
pool4 = rank_pool(4)


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


def run_generate(rank: int, world: int, way: str, ep_size: int, sp_size: int, stop: bool) -> bool:
    """Other prompts and lengths on every rank; ranks that are done early go on, by themselves."""
    prompt = batch(rank, 1 + rank % 2, length=5 + 3 * rank)
    options = {"max_new_tokens": 3 + 2 * rank, "pad_token_id": 0, **WAYS[way]}
    plain = tiny_model("qwen3_moe").eval()
    if stop:  # at a token that comes up on the way
        options |= {"max_new_tokens": 8, "eos_token_id": int(plain.generate(prompt, **options)[0, -1])}
    torch.manual_seed(rank)
    expected = plain.generate(prompt, **options)
    model = fluid_hf.patch_model(tiny_model("qwen3_moe").eval(), FluidConfig(ep_size=ep_size, sp_size=sp_size))
    torch.manual_seed(rank)
    found = model.generate(prompt, **options)
    fluid_hf.unpatch_model(model)
    assert "generate" not in vars(model)
    return torch.equal(found, expected)


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_generation_equals_the_unpatched_model(pool2: RankPool, way: str, stop: bool) -> None:
    assert pool2.run(run_generate, way, 2, 1, stop) == [True, True]


@pytest.mark.parametrize("sp_size", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_generation_on_four_ranks(pool4: RankPool, way: str, sp_size: int) -> None:
    assert pool4.run(run_generate, way, 2, sp_size, False) == [True] * 4


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


# Methods of the model's own class, which Python runs anyway: conditions on its settings, a forward with one call of all
# experts. Nothing of it comes from a file that is not imported already, or from a command line.
MODEL_CODE = {"code_reading.py": ["eval"], "shared_methods.py": ["exec", "compile"]}


def test_nothing_that_is_read_is_run() -> None:
    files = [*(ROOT / "fluid_hf").rglob("*.py"), *(ROOT / "integrations").rglob("*.py")]
    assert len(files) > 40
    found = {path.name: unsafe_calls(path.read_text(encoding="utf-8")) for path in files}
    assert {name: calls for name, calls in found.items() if calls} == MODEL_CODE


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


class Planted:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_files_that_call_something_are_refused(tmp_path: Path) -> None:
    path, made = tmp_path / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", tmp_path / "made"
    torch.save({"param": torch.ones(3), "scaler": Planted(made)}, path)
    with pytest.raises(CheckpointError, match=r"optim_states.pt\) must hold tensors .* but names posix.mkdir; if"):
        read_file(path)
    with pytest.raises(CheckpointError, match=r"names posix.mkdir"):
        check_files([path])
    assert not made.exists()
    path.write_bytes(pickle.dumps(Planted(made)))
    with pytest.raises(CheckpointError, match="cannot be read"):
        check_files([path])
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_file(path)
    assert not made.exists()


def test_files_of_deepspeed_are_read(tmp_path: Path) -> None:
    held = {"param": torch.arange(3.0), "scaler": DynamicLossScaler(2**8, 10, 1, 1, False, False, torch.float16)}
    torch.save({**held, "stage": ZeroStageEnum(2), "at": fragment_address(3, 4)}, tmp_path / "states.pt")
    found = read_file(tmp_path / "states.pt", mmap=True)
    assert torch.equal(found["param"], held["param"]) and found["stage"] is ZeroStageEnum.gradients
    assert found["scaler"].cur_scale == 2**8 and found["at"] == fragment_address(3, 4)


class AsOldPythons:
    """Pickled as Python 3.11.0 to 3.11.3 do members of an enumeration."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple[object, ...]:
        return getattr, self.arguments


def test_members_of_enumerations_are_read_as_old_pythons_write_them(tmp_path: Path) -> None:
    path = tmp_path / "states.pt"
    torch.save({"stage": AsOldPythons(ZeroStageEnum, "gradients")}, path)
    assert read_file(path)["stage"] is ZeroStageEnum.gradients
    for other in ((ZeroStageEnum, "mro"), (DynamicLossScaler, "update_scale"), (fragment_address, "count")):
        torch.save({"stage": AsOldPythons(*other)}, path)
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_file(path)


@pytest.mark.parametrize("tag", ["../other", "/etc", "a/../../b", ""])
def test_tags_stay_in_their_folder(tmp_path: Path, tag: str) -> None:
    (tmp_path / "latest").write_text("global_step4\n")
    assert read_tag(tmp_path, "latest", "") == "global_step4"
    (tmp_path / "latest").write_text(tag)
    with pytest.raises(CheckpointError, match=r"latest\) must be the name of a folder"):
        read_tag(tmp_path, "latest", "")


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/model.safetensors", "a/../../model.safetensors"])
def test_indices_stay_in_their_folder(tmp_path: Path, file: str) -> None:
    """Also when the file that is named exists."""
    tiny_model("mixtral").save_pretrained(tmp_path / "model", max_shard_size="40KB")
    index = tmp_path / "model" / "model.safetensors.index.json"
    text = json.loads(index.read_text())
    name, old = next(iter(text["weight_map"].items()))
    target = (tmp_path / "model" / file).resolve()
    if target.is_relative_to(tmp_path):
        shutil.copy(tmp_path / "model" / old, target)
    text["weight_map"] = {key: file if value == old else value for key, value in text["weight_map"].items()}
    index.write_text(json.dumps(text))
    with pytest.raises((CheckpointError, OSError)) as caught:
        fluid_hf.from_pretrained(str(tmp_path / "model"), FluidConfig(ep_size=1))
    if target.is_relative_to(tmp_path):
        assert f"file ({file}) of tensor ({name}) by the index must be in" in str(caught.value)


@pytest.mark.parametrize("name", ["pipeline", "AutoConfig", "nothing", None])
def test_configurations_name_models_only(tmp_path: Path, name: str | None) -> None:
    assert _model_class(["MixtralForCausalLM"], tmp_path) is MixtralForCausalLM
    with pytest.raises(CheckpointError, match="must name a model of transformers"):
        _model_class([name] if name else None, tmp_path)
