"""Saving: the same bytes as transformers, weights one at a time, and a whole model in the folder at every moment."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import LAUNCH_ENV, ROOT, RankError, RankPool, rank_pool
from families import FAMILIES, batch, tiny_model
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects
from moe_families import tiny_model as build_family
from safetensors.torch import load_file, save_file
from test_remote_code import build as build_listed
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

import fluid_hf
from fluid_hf import FluidConfig
from fluid_hf.checkpoint import saving
from fluid_hf.checkpoint.files import SafetensorsFile, TensorSpec, new_folder, remove_folder

pool2 = rank_pool(2)


def same_weights(folder: Path, model: torch.nn.Module) -> bool:
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    expected = model.state_dict()
    return loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)


def run_save(rank: int, world: int, family: str, folder: str, dtype: torch.dtype, **overrides: Any) -> None:
    model = fluid_hf.patch_model(tiny_model(family, **overrides).to(dtype), FluidConfig(ep_size=2))
    model.save_pretrained(folder)
    fluid_hf.unpatch_model(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_bytes_as_transformers(pool2: RankPool, tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    tiny_model(family).to(dtype).save_pretrained(tmp_path / "theirs")
    pool2.run(run_save, family, str(tmp_path / "ours"), dtype)
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "ours").iterdir())
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name


def build_stored(kind: str) -> Any:
    """A model that stores its experts in a way of its own."""
    if kind in ("dbrx", "longcat_flash"):
        return build_family(kind)
    model = build_listed(kind.removesuffix(" with biases"))
    for name, linear in list(model.named_modules()) if "biases" in kind else ():
        if ".experts." in name and isinstance(linear, torch.nn.Linear):
            linear.bias = torch.nn.Parameter(torch.randn(linear.out_features))
    return model


def run_load_state_dict(rank: int, world: int, kind: str) -> None:
    model = build_stored(kind)
    weights = {name: t + 1 if t.is_floating_point() else t for name, t in model.state_dict().items()}
    fluid_hf.patch_model(model, FluidConfig(ep_size=world))
    model.load_state_dict(weights)
    model.load_state_dict(model.state_dict())  # the layer's own names are taken as ever
    name = next(name for name in reversed(weights) if ".experts." in name)
    for broken in ({n: t for n, t in weights.items() if n != name}, {**weights, name: weights[name][1:]}):
        with pytest.raises(fluid_hf.CheckpointError, match=re.escape(f"tensor ({name}) must have shape")):
            model.load_state_dict(broken, strict=False)
    state = fluid_hf.unpatch_model(model).state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], weights[name]) for name in weights)


@pytest.mark.parametrize("kind", ["hit_loop", "pairs", "pairs with biases", "dbrx", "longcat_flash"])
def test_the_unpatched_models_state_dict_is_loaded(pool2: RankPool, kind: str) -> None:
    run_load_state_dict(0, 1, kind)
    pool2.run(run_load_state_dict, kind)


@pytest.mark.parametrize("kind", ["pairs", "longcat_flash"])
def test_models_that_store_experts_otherwise_are_saved(tmp_path: Path, kind: str) -> None:
    """Also a state dict that has all experts, as accelerate's users save, and weights staged for an engine."""
    model = build_stored(kind)
    model.save_pretrained(tmp_path / "theirs")
    fluid_hf.patch_model(model, FluidConfig(ep_size=1))
    model.save_pretrained(tmp_path / "plain")
    fluid_hf.save_pretrained(model, tmp_path / "streamed")
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    model.save_pretrained(tmp_path / "staged", state_dict=saving.stage_weights(model, model.fluid))
    expected = load_file(tmp_path / "theirs" / "model.safetensors")
    for way in ("plain", "streamed", "given", "staged"):
        found = load_file(tmp_path / way / "model.safetensors")
        assert found.keys() == expected.keys(), way
        assert all(torch.equal(found[name], expected[name]) for name in expected), way


def tiny_vision_model() -> Any:
    """A whole one, whose converter asks the model for the shape of each weight of the experts."""
    text = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 4,
        "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    torch.manual_seed(0)
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision))


def run_save_vision(rank: int, world: int, folder: str) -> None:
    model = fluid_hf.patch_model(tiny_vision_model(), FluidConfig(ep_size=world))
    model.save_pretrained(folder)
    assert "get_parameter" not in vars(model)
    fluid_hf.unpatch_model(model)


def test_a_converter_that_asks_for_shapes(pool2: RankPool, tmp_path: Path) -> None:
    tiny_vision_model().save_pretrained(tmp_path / "theirs")
    pool2.run(run_save_vision, str(tmp_path / "ours"))
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("ours", "theirs"))
    assert ours == theirs


def run_save_part(rank: int, world: int, folder: str) -> None:
    model = fluid_hf.patch_model(tiny_model("qwen3_moe"), FluidConfig(ep_size=world))
    model.model.save_pretrained(folder)
    with pytest.raises(fluid_hf.NotPatchedError, match="Qwen3MoeModel is not patched, but it is a part of a Qwen3MoeF"):
        fluid_hf.save_pretrained(model.model, folder)
    with pytest.raises(fluid_hf.CheckpointError, match=r"state_dict \(model.layers.0.mlp.experts.* without state_dict"):
        model.save_pretrained(folder, state_dict=model.state_dict())
    weights = dict(saving.stage_weights(model, model.fluid))
    model.save_pretrained(f"{folder}.given", state_dict=weights, is_main_process=rank == 0)
    fluid_hf.unpatch_model(model)
    assert not any("save_pretrained" in vars(module) for module in model.modules())


def test_a_part_of_the_patched_model_is_saved_whole(pool2: RankPool, tmp_path: Path) -> None:
    tiny_model("qwen3_moe").model.save_pretrained(tmp_path / "theirs")
    pool2.run(run_save_part, str(tmp_path / "ours"))
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("ours", "theirs"))
    assert ours == theirs


def run_save_around(rank: int, world: int, kind: str, folder: str) -> None:
    model = tiny_model(kind) if kind in FAMILIES else build_stored(kind)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fluid_hf.patch_model(model.model, FluidConfig(ep_size=world))
    around = f"{type(model).__name__} cannot be written.*{type(model.model).__name__} that was given to patch_model"
    with pytest.raises(fluid_hf.CheckpointError, match=around):
        model.save_pretrained(folder, is_main_process=rank == 0)
    with pytest.raises(fluid_hf.CheckpointError, match="cannot be written"):
        PreTrainedModel.save_pretrained(model.model, folder, is_main_process=rank == 0)
    with pytest.raises(fluid_hf.NotPatchedError, match="is not patched, but its part model"):
        fluid_hf.save_pretrained(model, folder)
    assert not list(Path(folder).glob("*.safetensors"))
    model.load_state_dict(model.state_dict())  # who asks for what this rank has gets it
    fluid_hf.unpatch_model(model.model)
    if rank == 0:
        model.save_pretrained(folder)
        saved = type(model).from_pretrained(folder).state_dict()
        assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())


def test_a_model_around_the_patched_one_is_not_saved_in_part(pool2: RankPool, tmp_path: Path) -> None:
    pool2.run(run_save_around, "qwen3_moe", str(tmp_path))
    run_save_around(0, 1, "longcat_flash", str(tmp_path / "stored"))


def test_tied_weights_are_saved_once(pool2: RankPool, tmp_path: Path) -> None:
    tiny_model("qwen3_moe", tie_word_embeddings=True).save_pretrained(tmp_path / "theirs")
    pool2.run(run_save, "qwen3_moe", str(tmp_path / "ours"), torch.float32, tie_word_embeddings=True)
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("ours", "theirs"))
    assert ours == theirs


def run_save_options(rank: int, world: int, folder: str, **options: Any) -> None:
    model = fluid_hf.patch_model(tiny_model("mixtral"), FluidConfig(ep_size=world))
    fluid_hf.save_pretrained(model, folder, **options)
    fluid_hf.unpatch_model(model)


def test_shards_over_an_older_save(pool2: RankPool, tmp_path: Path) -> None:
    """From one file to shards, to as many shards, to fewer, to one: one model each time, other files untouched."""
    folder = tmp_path / "out"
    for size in ("10GB", "20KB", "20KB", "60KB", "10GB"):
        pool2.run(run_save_options, str(folder), max_shard_size=size)
        (folder / "tokenizer.json").touch()
        assert same_weights(folder, tiny_model("mixtral"))
        files = sorted(path.name for path in folder.glob("*.safetensors*"))
        if size == "10GB":
            assert files == ["model.safetensors"]
            continue
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert sorted({*index["weight_map"].values(), "model.safetensors.index.json"}) == files
        assert index["metadata"]["total_size"] == sum(
            tensor.numel() * 4
            for name in set(files) - {"model.safetensors.index.json"}
            for tensor in load_file(folder / name).values()
        )
        limit = {"20KB": 20_000, "60KB": 60_000}[size]
        assert all((folder / name).stat().st_size < limit + 2_000 for name in files)
        assert all("-of-" in name and len(name) == 32 for name in files if "index" not in name), files
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == [folder]


def test_variant_and_runtime_layout(pool2: RankPool, tmp_path: Path) -> None:
    pool2.run(run_save_options, str(tmp_path), variant="fp16")
    pool2.run(run_save_options, str(tmp_path), save_original_format=False)
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"model.fp16.safetensors", "model.safetensors"}
    assert set(load_file(tmp_path / "model.safetensors")) == set(tiny_model("mixtral").state_dict())
    assert same_weights(tmp_path, tiny_model("mixtral"))


def test_push_to_hub_is_refused(pool2: RankPool, tmp_path: Path) -> None:
    message = pool2.expect("ConfigError", run_save_options, str(tmp_path / "out"), push_to_hub=True)[0]
    assert "push_to_hub (True)" in message and not (tmp_path / "out").exists()


def run_disk_full(rank: int, world: int, folder: str, error: Exception) -> None:
    """The disk is full after a few weights; the other ranks must not wait for rank 0, and the old model must stay."""
    write, written = SafetensorsFile.write, 0

    def fail(self: SafetensorsFile, name: str, tensor: torch.Tensor) -> None:
        nonlocal written
        written += 1
        if written > 5:
            raise error
        write(self, name, tensor)

    SafetensorsFile.write = fail  # type: ignore[method-assign]
    model = fluid_hf.patch_model(tiny_model("mixtral", seed=1), FluidConfig(ep_size=world))
    try:
        fluid_hf.save_pretrained(model, folder)
    finally:
        SafetensorsFile.write = write  # type: ignore[method-assign]
        fluid_hf.unpatch_model(model)


def test_full_disk_leaves_the_old_model(pool2: RankPool, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    pool2.run(run_save_options, str(folder))
    for error, words in (
        (OSError(28, "No space left on device"), f"directory ({folder}) cannot be written: [Errno 28] No space left"),
        (ValueError("odd"), f"model cannot be written to directory ({folder}): ValueError: odd"),
    ):
        with pytest.raises(RankError) as caught:
            pool2.run(run_disk_full, str(folder), error)
        failures = caught.value.failures
        assert [failures[rank].kind for rank in (0, 1)] == ["CheckpointError"] * 2, "the same error on every rank"
        assert words in failures[0].message
    assert same_weights(folder, tiny_model("mixtral"))
    assert list(tmp_path.iterdir()) == [folder]


def memory_or(folder: Path) -> Path:
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) else folder


def test_a_folder_that_links_to_another_file_system(tmp_path: Path) -> None:
    """Nothing is written beside the link; what a killed writer left is in no upload, and goes with the next save."""
    with tempfile.TemporaryDirectory() as beside, tempfile.TemporaryDirectory(dir=memory_or(tmp_path)) as folder:
        if os.stat(folder).st_dev == os.stat(beside).st_dev:
            pytest.skip("/dev/shm is no file system of its own")
        link = Path(beside) / "out"
        link.symlink_to(folder)
        for size in ("10GB", "20KB", "20KB", "10GB"):
            new_folder(link).joinpath("model.safetensors").touch()
            left = [path.relative_to(link) for path in link.rglob("*.tmp/*")]
            assert len(left) == 1
            assert not list(filter_repo_objects(map(str, left), ignore_patterns=DEFAULT_IGNORE_PATTERNS))
            run_save_options(0, 1, str(link), max_shard_size=size)
            assert same_weights(link, tiny_model("mixtral")) and not list(link.glob(".*"))
        assert list(Path(beside).iterdir()) == [link]


@pytest.mark.parametrize("kind", ["new", "there"])
def test_leftovers_of_the_same_target_only(tmp_path: Path, kind: str) -> None:
    others = [".model.best.0123abcd.tmp", ".model.x.tmp", ".m1.0123abcd.tmp", ".model.0123abcd.tmp.old"]
    for name in (*others, ".model.0123abcd.tmp", ".m[1].0123abcd.tmp"):
        (tmp_path / name).mkdir()
    for name in ("model", "m[1]"):
        if kind == "there":
            (tmp_path / name).mkdir()
        remove_folder(new_folder(tmp_path / name))
    assert sorted(path.name for path in tmp_path.glob(".*")) == sorted(others)
    shared = tmp_path / "model" / ".cache" / "huggingface"
    shared.mkdir(parents=True)
    (shared / "download").mkdir()
    remove_folder(new_folder(tmp_path / "model"))
    assert [path.name for path in shared.iterdir()] == ["download"]


@pytest.mark.parametrize("sizes", [("20KB",), ("10GB", "20KB", "60KB")], ids=["same shards", "other shards"])
def test_killed_writer_leaves_a_whole_model(tmp_path: Path, sizes: tuple[str, ...]) -> None:
    """SIGKILL at 20 random moments of saving: the folder always loads, with the weights of one save."""
    # In memory where that can be: what a dying process leaves does not depend on how fast the disk is.
    base = memory_or(tmp_path)
    known = {
        name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")
    }  # it forks and is killed
    env = {**known, **LAUNCH_ENV, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with tempfile.TemporaryDirectory(prefix="fluid_hf.", dir=base) as folder:
        command = [sys.executable, str(ROOT / "tests" / "crash_writer.py"), f"{folder}/out", "20", *sizes]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report["found"]) >= 5
    for case in report["found"]:
        assert len(case["values"]) == 1, case
        # What was reported as saved is there, or the save after it.
        assert case["saved"] == "0" or case["values"][0] - float(case["saved"]) in (0.0, 1.0), case
    assert sum(case["aside"] for case in report["found"]) > 0, "no writer was killed while it wrote"
    assert report["left"] == []


def run_staged(rank: int, world: int, folder: str) -> None:
    model = fluid_hf.patch_model(tiny_model("qwen2_moe"), FluidConfig(ep_size=world))
    model.fluid.staging_folder = folder
    (Path(folder) / ".fluid_hf.dead.staged").touch()
    torch.distributed.barrier()
    weights = saving.stage_weights(model, model.fluid)
    expected = tiny_model("qwen2_moe").state_dict() if rank == 0 else {}
    assert set(weights) == set(expected) and len(weights) == len(expected)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert type(pickle.loads(pickle.dumps(weights))) is dict
    torch.distributed.barrier()  # rank 0 has opened it and removed its name
    assert list(Path(folder).iterdir()) == []
    model.save_pretrained(f"{folder}/{rank}", state_dict=weights)  # without is_main_process, on all ranks
    assert Path(folder, str(rank)).exists() == (rank == 0), "a rank without weights wrote, where another one does"
    fluid_hf.unpatch_model(model)


def test_staged_weights(pool2: RankPool, tmp_path: Path) -> None:
    pool2.run(run_staged, str(tmp_path))


def test_safetensors_file(tmp_path: Path) -> None:
    """Written in any order, the same file as safetensors writes at once."""
    tensors = {
        "z": torch.randn(3, 5).to(torch.bfloat16),
        "a": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "flag": torch.tensor([True, False, True]),
        "count": torch.arange(3),
        "transposed": torch.randn(4, 6).T,
    }
    file = SafetensorsFile(tmp_path / "ours", {name: TensorSpec.of(tensor) for name, tensor in tensors.items()})
    for name in reversed(tensors):
        assert not file.complete
        file.write(name, tensors[name])
    file.close()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    with pytest.raises(ValueError, match="planned was"):
        file.write("a", torch.zeros(2))


def test_logits_after_a_round_trip(pool2: RankPool, tmp_path: Path) -> None:
    pool2.run(run_save, "mixtral", str(tmp_path / "out"), torch.float32)
    loaded, model = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tiny_model("mixtral").eval()
    assert torch.equal(loaded(input_ids=batch(0, 2)).logits, model(input_ids=batch(0, 2)).logits)
