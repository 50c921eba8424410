"""patch_model and unpatch_model: idempotent, exact undo, and named errors that leave the model as it was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import moe_families
import pytest
import torch
import torch.distributed as dist
from distributed import RankPool, rank_pool
from families import FAMILIES, batch, tiny_model
from remote_code.configuration_tiny_moe import TinyMoeConfig
from remote_code.modeling_tiny_moe import TinyMoeForCausalLM
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fluid_hf
from fluid_hf import FluidConfig

pool2 = rank_pool(2)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    same = after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    return same and not hasattr(model, "fluid") and "save_pretrained" not in model.__dict__


def run_patch_and_unpatch(rank: int, world: int, family: str) -> bool:
    model = tiny_model(family)
    before, modules = weights(model), dict(model.named_modules())
    parameters = dict(model.named_parameters())
    config = FluidConfig(ep_size=world)
    assert fluid_hf.patch_model(model, config) is model
    state = model.fluid
    assert fluid_hf.patch_model(model, config).fluid is state, "patching again does nothing"
    assert f"ep_size={world}" in repr(model) and "held=" in repr(model)
    held = sum(p.numel() for layer in state.layers.values() for p in layer.parameters())
    whole = sum(tensor.numel() for name, tensor in before.items() if ".experts." in name)
    assert held * world == whole
    fluid_hf.unpatch_model(model)
    assert dict(model.named_modules()) == modules
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in parameters.items())
    return unchanged(model, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_patch_and_unpatch(pool2: RankPool, family: str) -> None:
    assert run_patch_and_unpatch(0, 1, family)
    assert pool2.run(run_patch_and_unpatch, family) == [True, True]


def run_unpatch_after_changes(rank: int, world: int, family: str, frozen_first: bool) -> bool:
    """Experts are frozen, or trained, and the mode is another, while patched: none of it is forgotten."""
    makers = {
        "biases": lambda: moe_families.tiny_model("gpt_oss"),
        "list": lambda: TinyMoeForCausalLM(TinyMoeConfig(style="hit_loop")),
    }
    model = makers.get(family, lambda: tiny_model(family))().train(not frozen_first)
    experts = [name for name, _ in model.named_parameters() if ".experts." in name]
    for name in experts:
        model.get_parameter(name).requires_grad_(not frozen_first)
    fluid_hf.patch_model(model, FluidConfig(ep_size=world))
    for parameter in (p for layer in model.fluid.layers.values() for p in layer.parameters()):
        parameter.requires_grad_(frozen_first)
    fluid_hf.unpatch_model(model.train(frozen_first))
    trained = {model.get_parameter(name).requires_grad for name in experts}
    modes = {module.training for module in model.modules()}
    return bool(experts) and trained == modes == {frozen_first}


@pytest.mark.parametrize("frozen_first", [True, False])
@pytest.mark.parametrize("family", [*FAMILIES, "biases", "list"])
def test_unpatch_keeps_what_is_trained_and_the_mode(pool2: RankPool, family: str, frozen_first: bool) -> None:
    assert run_unpatch_after_changes(0, 1, family, frozen_first)
    assert pool2.run(run_unpatch_after_changes, family, frozen_first) == [True, True]


def run_unpatch_after_replacement(rank: int, world: int, ep_size: int, way: str) -> bool:
    """The parameters that a patched model trains are others than those that it was patched with."""
    model, expected = tiny_model("mixtral"), tiny_model("mixtral")
    fluid_hf.patch_model(model, FluidConfig(ep_size=ep_size))
    if way == "assigned":
        other = tiny_model("mixtral", seed=1).state_dict()
        model.load_state_dict(other, assign=True)
        expected.load_state_dict(other)
    else:  # what torch otherwise does where it cannot change the data of a parameter
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            model.to(torch.bfloat16)
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
        expected.to(torch.bfloat16)
    trained = {id(parameter) for parameter in model.parameters()}
    fluid_hf.unpatch_model(model)
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    return same and (ep_size > 1 or trained == {id(parameter) for parameter in model.parameters()})


@pytest.mark.parametrize("way", ["assigned", "converted"])
def test_unpatch_keeps_parameters_that_replaced_others(pool2: RankPool, way: str) -> None:
    assert run_unpatch_after_replacement(0, 1, 1, way)
    assert pool2.run(run_unpatch_after_replacement, 1, way) == [True, True]
    assert pool2.run(run_unpatch_after_replacement, 2, way) == [True, True]


def run_deepspeed_wrap(rank: int, world: int) -> bool:
    import deepspeed

    original = deepspeed.initialize
    models = [fluid_hf.patch_model(tiny_model("mixtral"), FluidConfig(ep_size=world)) for _ in range(2)]
    wrapped = deepspeed.initialize
    assert wrapped is not original and wrapped.__wrapped__ is original
    fluid_hf.unpatch_model(models[0])
    assert deepspeed.initialize is wrapped
    fluid_hf.unpatch_model(models[1])
    return deepspeed.initialize is original


def test_deepspeed_initialize_is_restored(pool2: RankPool) -> None:
    assert pool2.run(run_deepspeed_wrap) == [True, True]


def run_save(rank: int, world: int, family: str, folder: str) -> bool:
    model = fluid_hf.patch_model(tiny_model(family), FluidConfig(ep_size=world))
    fluid_hf.save_pretrained(model, f"{folder}/{family}", max_shard_size="20KB")
    reloaded = AutoModelForCausalLM.from_pretrained(f"{folder}/{family}")
    expected = tiny_model(family)
    fluid_hf.unpatch_model(model)
    ids = batch(0, 2)
    same = all(torch.equal(a, b) for a, b in zip(reloaded.parameters(), expected.parameters(), strict=True))
    return same and torch.equal(reloaded(input_ids=ids).logits, expected(input_ids=ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_save_pretrained_writes_a_plain_checkpoint(pool2: RankPool, tmp_path: Path, family: str) -> None:
    assert pool2.run(run_save, family, str(tmp_path)) == [True, True]
    assert len(list((tmp_path / family).glob("model-*.safetensors"))) > 1
    theirs = tmp_path / "theirs"
    tiny_model(family).save_pretrained(theirs)
    assert (theirs / "config.json").read_text() == (tmp_path / family / "config.json").read_text()
    assert not list(tmp_path.glob(".*")), "temporary files were left"


def run_save_to_file(rank: int, world: int, folder: str) -> None:
    model = fluid_hf.patch_model(tiny_model("mixtral"), FluidConfig(ep_size=world))
    try:
        fluid_hf.save_pretrained(model, folder)
    finally:
        fluid_hf.unpatch_model(model)


def test_unwritable_folder_raises_everywhere_and_leaves_nothing(pool2: RankPool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    messages = pool2.expect("CheckpointError", run_save_to_file, str(tmp_path / "file"))
    assert str(tmp_path / "file") in messages[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "in the way"


def make(kind: str) -> nn.Module:
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 32,
    }
    if kind == "dense":
        return LlamaForCausalLM(LlamaConfig(**small, num_key_value_heads=2))
    model = tiny_model("mixtral")
    if kind == "quantised":
        experts = model.model.layers[0].mlp.experts
        del experts.down_proj
        experts.down_proj = nn.Parameter(torch.zeros(4, 32, 48, dtype=torch.int8), requires_grad=False)
    if kind == "unknown parameter":
        model.model.layers[0].mlp.experts.scale = nn.Parameter(torch.ones(4))
    if kind == "tensor parallel":
        model._tp_size = 2
    if kind == "expert parallel":
        model.model.layers[1].mlp.experts._is_expert_parallel = True
    return model


def run_bad(rank: int, world: int, kind: str, settings: list[dict[str, Any]]) -> None:
    model = make(kind)
    before = weights(model)
    try:
        fluid_hf.patch_model(model, FluidConfig(**settings[rank % len(settings)]))
    finally:
        assert unchanged(model, before), "a failed patch changed the model"


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("dense", "UnsupportedModelError", ["LlamaForCausalLM", "experts"]),
        ("unknown parameter", "UnsupportedModelError", ["MixtralExperts", "parameter scale"]),
        ("quantised", "UnsupportedModelError", ["MixtralExperts", "int8"]),
        ("tensor parallel", "UnsupportedModelError", ["tp_size 2"]),
        ("expert parallel", "UnsupportedModelError", ["expert parallel already"]),
    ],
)
def test_unsupported_models(pool2: RankPool, kind: str, error: str, words: list[str]) -> None:
    messages = pool2.expect(error, run_bad, kind, [{"ep_size": 2}])
    assert all(word in messages[0] for word in words), messages


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ([{"ep_size": 4}], "ConfigError", ["world size (2)", "ep_size (4)", "use ep_size 1 or 2"]),
        ([{"ep_size": 1}, {"ep_size": 2}], "RankMismatchError", ["ep_size (rank 0: 1; rank 1: 2) must be equal"]),
        (
            [{"ep_size": 2, "waves": 2}, {"ep_size": 2, "recompute": True}],
            "RankMismatchError",
            ["waves (rank 0: 2; rank 1: None) must be equal", "that call patch_model, and so must recompute; "],
        ),
        ([{"ep_size": 2}, {"ep_size": 3}], "ConfigError", ["world size (2)", "ep_size (3)"]),
    ],
)
def test_bad_settings(pool2: RankPool, settings: list[dict[str, Any]], error: str, words: list[str]) -> None:
    messages = pool2.expect(error, run_bad, "mixtral", settings)
    assert all(any(word in message for message in messages) for word in words), messages


def run_indivisible(rank: int, world: int) -> None:
    model = tiny_model("qwen3_moe", num_experts=3)
    before = weights(model)
    try:
        fluid_hf.patch_model(model, FluidConfig(ep_size=2))
    finally:
        assert unchanged(model, before)


def test_indivisible_experts(pool2: RankPool) -> None:
    assert (
        "num_experts (3) must be divisible by ep_size (2); use ep_size 1"
        in pool2.expect("ConfigError", run_indivisible)[0]
    )


def run_patch_twice(rank: int, world: int) -> None:
    model = fluid_hf.patch_model(tiny_model("mixtral"), FluidConfig(ep_size=2))
    try:
        fluid_hf.patch_model(model, FluidConfig(ep_size=2, overlap=False))
    finally:
        assert model.fluid.config.overlap
        fluid_hf.unpatch_model(model)


def test_patching_twice_with_other_settings(pool2: RankPool) -> None:
    message = pool2.expect("AlreadyPatchedError", run_patch_twice)[0]
    assert "overlap=True" in message and "overlap=False" in message


class ValueHead(nn.Module):
    """No transformers model, but around one."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_model = tiny_model("mixtral")
        self.head = nn.Linear(32, 1)


@pytest.mark.parametrize("kind", ["built", "offloaded"])
def test_models_that_are_not_loaded_are_refused(kind: str, tmp_path: Path) -> None:
    """Their outputs would be those of whatever is in the memory."""
    if kind == "offloaded":  # as device_map="auto" leaves what has no room on the GPU
        tiny_model("qwen3_moe").save_pretrained(tmp_path / "saved")
        here = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head")
        places = {"model.layers.1": "disk", **dict.fromkeys(here, "cpu")}
        options: dict[str, Any] = {"device_map": places, "offload_folder": tmp_path / "disk"}
        model: nn.Module = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", **options)
    else:
        with torch.device("meta"):
            model = tiny_model("qwen3_moe")
    with pytest.raises(fluid_hf.UnsupportedModelError, match=r"experts of .*layers\.\d.* are on the meta device"):
        fluid_hf.patch_model(model)
    assert not hasattr(model, "fluid")


def test_what_is_no_transformers_model_is_refused() -> None:
    model = ValueHead()
    with pytest.raises(
        fluid_hf.UnsupportedModelError, match=r"ValueHead is no .* the model inside: pretrained_model\."
    ):
        fluid_hf.patch_model(model)
    fluid_hf.unpatch_model(fluid_hf.patch_model(model.pretrained_model))
    with pytest.raises(fluid_hf.UnsupportedModelError, match="Linear is no .* patch a transformers model"):
        fluid_hf.patch_model(model.head)


def test_parts_of_a_patched_model_and_what_is_around_it() -> None:
    model: Any = tiny_model("mixtral")
    for patched, other, words in (
        (model, model.model, "MixtralModel cannot be patched: it is a part of a MixtralForCausalLM that is"),
        (model.model, model, r"MixtralForCausalLM cannot be patched: its part model \(MixtralModel\) is"),
    ):
        fluid_hf.patch_model(patched)
        with pytest.raises(fluid_hf.AlreadyPatchedError, match=words):
            fluid_hf.patch_model(other)
        fluid_hf.unpatch_model(patched)
        fluid_hf.unpatch_model(fluid_hf.patch_model(other))


def test_ep_size_needs_torch_distributed() -> None:
    assert not dist.is_initialized()
    model = tiny_model("mixtral")
    before = weights(model)
    with pytest.raises(fluid_hf.ConfigError, match=r"ep_size \(2\) needs torch.distributed"):
        fluid_hf.patch_model(model, FluidConfig(ep_size=2))
    assert unchanged(model, before)


def test_calls_that_need_a_patched_model() -> None:
    model = tiny_model("mixtral")
    with pytest.raises(fluid_hf.NotPatchedError, match="MixtralForCausalLM is not patched"):
        fluid_hf.unpatch_model(model)
    with pytest.raises(fluid_hf.NotPatchedError, match="MixtralForCausalLM is not patched"):
        fluid_hf.save_pretrained(model, os.devnull)


def run_default(rank: int, world: int) -> int:
    model = fluid_hf.patch_model(tiny_model("mixtral"))
    ep_size = model.fluid.groups.ep_size
    fluid_hf.unpatch_model(model)
    return ep_size


def test_default_ep_size(pool2: RankPool) -> None:
    assert pool2.run(run_default) == [2, 2]
    assert run_default(0, 1) == 1


def run_optimizer_before_patch(rank: int, world: int) -> None:
    import deepspeed

    model = tiny_model("mixtral")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    fluid_hf.patch_model(model, FluidConfig(ep_size=2))
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    try:
        deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    finally:
        fluid_hf.unpatch_model(model)


def test_optimizer_built_before_patching(pool2: RankPool) -> None:
    message = pool2.expect("ConfigError", run_optimizer_before_patch)[0]
    assert "call patch_model before the optimizer is built" in message


class Engine(nn.Module):
    """What engines do: they hold the model as `module`, and pass its attributes on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def __getattr__(self, name: str) -> Any:
        return self._modules[name] if name in self._modules else getattr(self._modules["module"], name)


def run_wrapped(rank: int, world: int, engine: bool, folder: str) -> bool:
    model = tiny_model("qwen3_moe")
    before, attributes = weights(model), set(vars(model))
    fluid_hf.patch_model(model, FluidConfig(ep_size=world))
    wrapper = torch.compile(model)
    wrapper = Engine(wrapper) if engine else wrapper
    fluid_hf.save_pretrained(wrapper, folder)
    assert fluid_hf.unpatch_model(wrapper) is wrapper
    return unchanged(model, before) and vars(model).keys() - {"_is_torch_compile"} == attributes  # torch's own mark


@pytest.mark.parametrize("engine", [False, True])
def test_wrappers_that_pass_attributes_on(pool2: RankPool, tmp_path: Path, engine: bool) -> None:
    assert pool2.run(run_wrapped, engine, str(tmp_path)) == [True, True]
    assert unchanged(AutoModelForCausalLM.from_pretrained(tmp_path), weights(tiny_model("qwen3_moe")))
