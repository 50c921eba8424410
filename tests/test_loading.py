"""fluid_hf.from_pretrained: equal to loading everything and patching, in the memory of a share; broken files named."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import RankPool, rank_pool
from families import FAMILIES, batch, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

import fluid_hf
from fluid_hf import FluidConfig

pool2 = rank_pool(2)

LAYOUTS: dict[str, dict[str, Any]] = {
    "per expert": {},
    "fused": {"save_original_format": False},
    "shards": {"max_shard_size": "20KB"},
    "fused shards": {"save_original_format": False, "max_shard_size": "20KB"},
}


def run_equal(rank: int, world: int, folders: list[str], ep_size: int, **options: Any) -> None:
    config = FluidConfig(ep_size=ep_size)
    for folder in folders:
        model = fluid_hf.from_pretrained(folder, config, **options)
        whole = AutoModelForCausalLM.from_pretrained(folder, **options)
        names = set(whole.state_dict())
        fluid_hf.patch_model(whole, config)
        ours, theirs = dict(model.named_parameters()), dict(whole.named_parameters())
        assert type(model) is type(whole) and ours.keys() == theirs.keys()
        for name, parameter in theirs.items():
            assert torch.equal(ours[name], parameter) and ours[name].dtype == parameter.dtype, name
            assert ours[name].requires_grad == parameter.requires_grad and ours[name].device == parameter.device
        assert {n: b.dtype for n, b in model.named_buffers()} == {n: b.dtype for n, b in whole.named_buffers()}
        assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
        assert model.training is whole.training and repr(model) == repr(whole)
        ids = batch(rank, 2)
        assert torch.equal(model(input_ids=ids).logits, whole(input_ids=ids).logits)
        fluid_hf.unpatch_model(whole)
        fluid_hf.unpatch_model(model)
        state, expected = model.state_dict(), whole.state_dict()
        assert state.keys() == expected.keys() == names
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        fluid_hf.patch_model(model, config)  # nothing of the loading is left behind
        assert all(torch.equal(ours[name], tensor) for name, tensor in model.named_parameters())


def save_all(family: str, folder: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> list[str]:
    model = tiny_model(family, **overrides).to(dtype)
    for name, options in LAYOUTS.items():
        model.save_pretrained(folder / name, **options)
    return [str(folder / name) for name in LAYOUTS]


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_loading_everything(pool2: RankPool, tmp_path: Path, family: str) -> None:
    folders = save_all(family, tmp_path)
    run_equal(0, 1, folders, 1)
    pool2.run(run_equal, folders, 2)


def test_dtypes_and_tied_weights(pool2: RankPool, tmp_path: Path) -> None:
    folders = save_all("qwen2_moe", tmp_path, torch.bfloat16, tie_word_embeddings=True)
    pool2.run(run_equal, folders[:2], 2)
    pool2.run(run_equal, folders[:2], 2, dtype=torch.float32, attn_implementation="eager")


def run_model_class(rank: int, world: int, folder: str) -> None:
    model, report = fluid_hf.from_pretrained(folder, auto_class=MixtralForCausalLM, output_loading_info=True)
    assert not report["missing_keys"]
    assert type(model) is MixtralForCausalLM and model.fluid.groups.ep_size == world
    fluid_hf.unpatch_model(model)


def test_model_class_and_default_settings(pool2: RankPool, tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    pool2.run(run_model_class, str(tmp_path))


def status(field: str) -> int:
    """Bytes by /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def run_peak_memory(rank: int, world: int, folder: str, small: str) -> tuple[int, int]:
    """Bytes held by the model, and highest memory of the process while it was loaded."""
    fluid_hf.unpatch_model(fluid_hf.from_pretrained(small, FluidConfig(ep_size=world)))  # imports, thread pools
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    model = fluid_hf.from_pretrained(folder, FluidConfig(ep_size=world))
    peak = status("VmHWM") - before
    return sum(parameter.nbytes for parameter in model.parameters()), peak


@pytest.mark.parametrize("layout", ["per expert", "fused"])
def test_peak_memory_is_that_of_a_share(pool2: RankPool, tmp_path: Path, layout: str) -> None:
    sizes = {"hidden_size": 256, "num_hidden_layers": 12, "vocab_size": 2048}
    model = tiny_model("mixtral", num_experts=16, **sizes)
    tiny_model("mixtral").save_pretrained(tmp_path / "small")
    for block in model.model.layers:  # the tiny model's experts are too small to measure
        block.mlp.experts.gate_up_proj = torch.nn.Parameter(torch.zeros(16, 2 * 512, 256))
        block.mlp.experts.down_proj = torch.nn.Parameter(torch.zeros(16, 256, 512))
    model.config.intermediate_size = 512
    model.save_pretrained(tmp_path / "big", max_shard_size="40MB", **LAYOUTS[layout])
    total = sum(parameter.nbytes for parameter in model.parameters())
    assert total > 300e6
    # One shard's slice: the largest tensor that is read at once.
    one_slice = 512 * 256 * 4 if layout == "per expert" else 8 * 2 * 512 * 256 * 4
    pool2.restart()
    for held, peak in pool2.run(run_peak_memory, str(tmp_path / "big"), str(tmp_path / "small")):
        print(f"{layout}: model {total / 1e6:.0f} MB, share {held / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
        assert held < 0.55 * total
        assert held < peak <= 1.15 * held + one_slice


def run_load(rank: int, world: int, folder: str) -> None:
    fluid_hf.from_pretrained(folder, FluidConfig(ep_size=2))


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / str(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][tensor])


EXPERT = "model.layers.1.block_sparse_moe.experts.3.w1.weight"  # held by rank 1 only
NORM = "model.layers.1.input_layernorm.weight"


def change(folder: Path, tensor: str, make: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    path = shard_of(folder, tensor)
    tensors = load_file(path)
    value = make(tensors.pop(tensor))
    save_file(tensors if value is None else {**tensors, tensor: value}, path, {"format": "pt"})


def drop_everywhere(folder: Path, tensor: str) -> None:
    change(folder, tensor, lambda _: None)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][tensor]
    path.write_text(json.dumps(index))


def cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def reconfigure(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


BROKEN: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "shard missing": (lambda f: shard_of(f, EXPERT).unlink(), ["No such file", "block_sparse_moe", ".safetensors"]),
    "shard cut in its data": (
        lambda f: cut(shard_of(f, EXPERT), shard_of(f, EXPERT).stat().st_size - 10),
        ["cut off", "tensor (model.layers", ".safetensors"],
    ),
    "shard cut in its header": (lambda f: cut(shard_of(f, EXPERT), 100), ["cut off in its header", ".safetensors"]),
    "shard empty": (
        lambda f: cut(shard_of(f, EXPERT), 0),
        ["cut off in its header", "which the index says has tensor"],
    ),
    "shard of noise": (lambda f: shard_of(f, EXPERT).write_bytes(b"\1" * 4000), [".safetensors", "cannot be read"]),
    "expert not in its shard": (lambda f: change(f, EXPERT, lambda _: None), [EXPERT, "as the index says"]),
    "expert missing": (lambda f: drop_everywhere(f, EXPERT), ["expert 3 is missing", "model.layers.1", ".safetensors"]),
    "tensor missing": (lambda f: drop_everywhere(f, NORM), [NORM, "must be in the checkpoint"]),
    "expert of another shape": (lambda f: change(f, EXPERT, lambda t: t[:-1].clone()), [EXPERT, "[47, 32]"]),
    "tensor of another shape": (lambda f: change(f, NORM, lambda t: t[:-1].clone()), [NORM, "[31]", "[32]"]),
    "expert quantised": (lambda f: change(f, EXPERT, lambda t: t.to(torch.int8)), [EXPERT, "I8"]),
    "config of a larger model": (lambda f: reconfigure(f, num_local_experts=8), ["(4)", "num_experts (8)", "tensor ("]),
    "config of a smaller model": (
        lambda f: reconfigure(f, num_local_experts=2),
        ["(4)", "num_experts (2)", "tensor ("],
    ),
    "config of wider experts": (lambda f: reconfigure(f, intermediate_size=96), ["config.json", "96", "tensor"]),
    "config missing": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "index of noise": (lambda f: (f / "model.safetensors.index.json").write_text("{"), ["cannot be loaded"]),
    "no weights": (lambda f: [path.unlink() for path in f.glob("model*")], ["model.safetensors"]),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files(pool2: RankPool, tmp_path: Path, kind: str) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "model", max_shard_size="20KB")
    damage, words = BROKEN[kind]
    damage(tmp_path / "model")
    messages = pool2.expect("CheckpointError", run_load, str(tmp_path / "model"))
    for message in messages:
        assert all(word in message for word in words), message


def run_load_own(rank: int, world: int, folder: str) -> None:
    fluid_hf.from_pretrained(f"{folder}/{rank}", FluidConfig(ep_size=2))


def test_files_broken_for_one_rank(pool2: RankPool, tmp_path: Path) -> None:
    """Folders local to each node: what only rank 1 finds is raised on rank 0, too."""
    tiny_model("mixtral").save_pretrained(tmp_path / "0", max_shard_size="20KB")
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    shard_of(tmp_path / "1", EXPERT).unlink()
    messages = pool2.expect("CheckpointError", run_load_own, str(tmp_path))
    assert all("No such file" in message for message in messages)
    assert "rank 1" in messages[0]
    (tmp_path / "1" / "config.json").unlink()  # now it fails before it looks at the shards
    assert "rank 1" in pool2.expect("CheckpointError", run_load_own, str(tmp_path))[0]
    shutil.rmtree(tmp_path / "1")
    messages = pool2.expect("CheckpointError", run_load_own, str(tmp_path))
    assert "rank 1" in messages[0] and all("must be there for every rank" in message for message in messages)


def run_bad_settings(rank: int, world: int, folder: str) -> None:
    fluid_hf.from_pretrained(folder, FluidConfig(ep_size=3))


def test_settings_and_models_that_do_not_fit(pool2: RankPool, tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "mixtral")
    assert "ep_size (3)" in pool2.expect("ConfigError", run_bad_settings, str(tmp_path / "mixtral"))[0]
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    LlamaForCausalLM(LlamaConfig(**small, num_attention_heads=2)).save_pretrained(tmp_path / "dense")
    message = pool2.expect("UnsupportedModelError", run_load, str(tmp_path / "dense"))[0]
    assert "LlamaForCausalLM" in message


def run_relative_path(rank: int, world: int, folder: str) -> None:
    path = Path(os.path.relpath(Path(folder) / "model"))
    assert not path.is_absolute()
    fluid_hf.unpatch_model(fluid_hf.from_pretrained(path, FluidConfig(ep_size=world)))


def run_models_own_config(rank: int, world: int, folder: str) -> None:
    fluid_hf.from_pretrained(folder, config=AutoConfig.from_pretrained(folder))


def test_paths_and_configurations_of_transformers(pool2: RankPool, tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "model")
    pool2.run(run_relative_path, str(tmp_path))
    for message in pool2.expect("ConfigError", run_models_own_config, str(tmp_path / "model")):
        assert "config (MixtralConfig) must be a FluidConfig" in message and "by keyword" in message
    with pytest.raises(fluid_hf.ConfigError, match="use FluidConfig.from_dict"):
        fluid_hf.from_pretrained(str(tmp_path / "model"), {"ep_size": 1})  # type: ignore[arg-type]


def run_load_whole(rank: int, world: int, family: str) -> None:
    model = tiny_model(family)
    weights = {name: t + 1 for name, t in model.state_dict().items()}
    fluid_hf.patch_model(model, FluidConfig(ep_size=world))
    model.load_state_dict(weights)
    model.load_state_dict(model.state_dict())  # this rank's
    name = next(name for name in reversed(weights) if name.endswith(".experts.down_proj"))
    for broken in ({n: t for n, t in weights.items() if n != name}, {**weights, name: weights[name][1:]}):
        with pytest.raises(fluid_hf.CheckpointError, match=re.escape(f"tensor ({name}) must have shape")):
            model.load_state_dict(broken)
    dense = {name: t for name, t in weights.items() if "experts" not in name}
    assert model.load_state_dict(dense, strict=False).missing_keys, "the experts stay as they are"
    model.fluid.engine_bound = True
    for found in (model.state_dict(), {**dense, **weights}):
        with pytest.raises(fluid_hf.CheckpointError, match="must be loaded by the engine that drives the model"):
            model.load_state_dict(found)
    model.fluid.engine_bound = False
    state = fluid_hf.unpatch_model(model).state_dict()
    assert all(torch.equal(state[name], weights[name]) for name in weights)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_split_experts_are_loaded_from_all(pool2: RankPool, family: str) -> None:
    pool2.run(run_load_whole, family)
