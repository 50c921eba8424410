"""A PEFT model that is patched after it was wrapped: its adapters are saved as PEFT's, and merged it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import RankPool, rank_pool
from families import batch, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import fluid_hf
from fluid_hf import FluidConfig

pool2 = rank_pool(2)

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TARGETS = [pytest.param(None, id="attention"), pytest.param(EXPERTS, id="experts")]


def adapted(experts: list[str] | None) -> Any:
    """A model with random adapters on q and v, and on expert weights."""
    torch.manual_seed(3)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], target_parameters=experts, init_lora_weights=False)
    return get_peft_model(tiny_model("qwen3_moe").eval(), lora)


def is_close(model: Any, expected: Any) -> bool:
    found, wanted = model.state_dict(), expected.state_dict()
    same = all(torch.allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6) for name in wanted)
    ids = batch(0, 2)
    with torch.no_grad():
        logits = model(input_ids=ids).logits, expected(input_ids=ids).logits
    return found.keys() == wanted.keys() and same and torch.allclose(*logits, rtol=1e-5, atol=1e-5)


def is_unpatched(model: Any) -> bool:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = {"fluid", "save_pretrained", "state_dict", "generate", "__deepcopy__", "__reduce_ex__"}
    return not hasattr(model, "fluid") and not names & (vars(model).keys() | vars(inner).keys())


def run_save(rank: int, world: int, experts: list[str] | None, folder: str) -> bool:
    model = fluid_hf.patch_model(adapted(experts), FluidConfig(ep_size=world))
    model.save_pretrained(f"{folder}/own")
    fluid_hf.save_pretrained(model, f"{folder}/ours")
    fluid_hf.unpatch_model(model)
    return is_unpatched(model) and is_close(model, adapted(experts))


@pytest.mark.parametrize("experts", TARGETS)
def test_adapters_are_saved_alone(pool2: RankPool, tmp_path: Path, experts: list[str] | None) -> None:
    assert pool2.run(run_save, experts, str(tmp_path)) == [True, True]
    adapted(experts).save_pretrained(tmp_path / "theirs")
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "theirs").glob("*adapter*")}
    for way in ("own", "ours"):
        found = {path.name: path.read_bytes() for path in (tmp_path / way).iterdir() if path.name != "README.md"}
        assert found.keys() == wanted.keys() == {"adapter_config.json", "adapter_model.safetensors"}
        assert found["adapter_model.safetensors"] == wanted["adapter_model.safetensors"]
        assert is_close(PeftModel.from_pretrained(tiny_model("qwen3_moe"), tmp_path / way).eval(), adapted(experts))


def run_folder(rank: int, world: int, experts: list[str] | None, folder: str) -> bool:
    """A folder of adapters, which says itself where its model is, read by shares."""
    if rank == 0:
        tiny_model("qwen3_moe").save_pretrained(f"{folder}/base")
        model = adapted(experts)
        model.peft_config["default"].base_model_name_or_path = f"{folder}/base"
        model.save_pretrained(f"{folder}/adapters")
    torch.distributed.barrier()
    model = fluid_hf.from_pretrained(f"{folder}/adapters", FluidConfig(ep_size=world))
    whole = AutoModelForCausalLM.from_pretrained(f"{folder}/adapters")
    fluid_hf.unpatch_model(model)
    return type(model) is type(whole) and is_close(model, whole)


def test_a_folder_of_adapters_is_read_by_shares(pool2: RankPool, tmp_path: Path) -> None:
    assert pool2.run(run_folder, None, str(tmp_path)) == [True, True]
    for message in pool2.expect("UnsupportedModelError", run_folder, EXPERTS, str(tmp_path)):
        assert "adapters" in message and "of experts (model.layers.0.mlp.experts)" in message, message


def run_save_to_file(rank: int, world: int, folder: str) -> None:
    model = fluid_hf.patch_model(adapted(None), FluidConfig(ep_size=world))
    try:
        fluid_hf.save_pretrained(model, folder)
    finally:
        fluid_hf.unpatch_model(model)


def test_unwritable_folder_raises_everywhere(pool2: RankPool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert str(tmp_path / "file") in pool2.expect("CheckpointError", run_save_to_file, str(tmp_path / "file"))[0]


def run_more_adapters(rank: int, world: int) -> None:
    """Adapters on the experts of a merged model, which is patched still."""
    model = fluid_hf.patch_model(adapted(EXPERTS), FluidConfig(ep_size=world)).merge_and_unload()
    try:
        get_peft_model(model, LoraConfig(target_parameters=EXPERTS))(input_ids=batch(0, 2))
    finally:
        fluid_hf.unpatch_model(model)


def run_loaded_adapters(rank: int, world: int, wrapped: bool, folder: str) -> None:
    """Adapters on the experts that are loaded into a patched model, to be used without an engine."""
    if rank == 0:
        adapted(EXPERTS).save_pretrained(folder)
    torch.distributed.barrier()
    model = fluid_hf.patch_model(tiny_model("qwen3_moe"), FluidConfig(ep_size=world))
    if wrapped:
        model = PeftModel.from_pretrained(model, folder)
    else:
        model.load_adapter(folder)
    with torch.no_grad():
        model(input_ids=batch(0, 2))


@pytest.mark.parametrize("wrapped", [True, False])
def test_adapters_that_are_loaded_too_late(pool2: RankPool, tmp_path: Path, wrapped: bool) -> None:
    for message in pool2.expect("ConfigError", run_loaded_adapters, wrapped, str(tmp_path)):
        assert "target_parameters" in message and "load the adapters" in message, message


def run_linear_adapters(rank: int, world: int) -> None:
    """PEFT counts the experts among what is linear, under names without "experts"."""
    model = fluid_hf.patch_model(tiny_model("qwen3_moe"), FluidConfig(ep_size=world))
    get_peft_model(model, LoraConfig(target_modules="all-linear"))(input_ids=batch(0, 2))


def run_saved_modules(rank: int, world: int) -> None:
    """Whole blocks that are trained and saved with the adapters."""
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"])
    fluid_hf.patch_model(get_peft_model(tiny_model("qwen3_moe"), lora), FluidConfig(ep_size=world))


@pytest.mark.parametrize(
    ("run", "error", "words"),
    [
        (run_more_adapters, "ConfigError", ["target_parameters", "ep_size (2)", "call get_peft_model first"]),
        (run_linear_adapters, "ConfigError", ["target_parameters (down_proj)", "first", "all-linear"]),
        (run_saved_modules, "UnsupportedModelError", ["model.layers.0.mlp", "modules_to_save", "set ep_size 1"]),
    ],
)
def test_adapters_that_experts_in_shares_cannot_have(pool2: RankPool, run: Any, error: str, words: list[str]) -> None:
    for message in pool2.expect(error, run):
        assert all(word in message for word in words), message


def run_merge(rank: int, world: int, experts: list[str] | None, unpatch: str, folder: str) -> bool:
    model = fluid_hf.patch_model(adapted(experts), FluidConfig(ep_size=world, wgrad="cross_layer"))
    merged = model.merge_and_unload()
    expected = adapted(experts).merge_and_unload()
    merged.save_pretrained(f"{folder}/own")
    fluid_hf.save_pretrained(merged, f"{folder}/ours")
    fluid_hf.unpatch_model(model if unpatch == "wrapper" else merged)
    return is_unpatched(merged) and not hasattr(model, "fluid") and is_close(merged, expected)


@pytest.mark.parametrize("unpatch", ["wrapper", "merged"])
@pytest.mark.parametrize("experts", TARGETS)
def test_merged_model_is_whole(pool2: RankPool, tmp_path: Path, experts: list[str] | None, unpatch: str) -> None:
    assert pool2.run(run_merge, experts, unpatch, str(tmp_path)) == [True, True]
    for way in ("own", "ours"):
        assert is_close(AutoModelForCausalLM.from_pretrained(tmp_path / way), adapted(experts).merge_and_unload())
