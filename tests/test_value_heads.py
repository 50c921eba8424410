"""Modules of the user's own around a patched model, as DeepSpeed trains them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from distributed import RankPool, rank_pool
from families import tiny_model
from safetensors.torch import load_file
from test_deepspeed import Curve, assert_near, settings, train

import fluid_hf
from fluid_hf import FluidConfig

pool2 = rank_pool(2)


class ValueHead(torch.nn.Module):
    """A module of the user's own around one or more models, of which the first is trained."""

    def __init__(self, *models: Any) -> None:
        super().__init__()
        self.models = torch.nn.ModuleList(models)
        self.head = torch.nn.Linear(96, 1)
        torch.nn.init.constant_(self.head.weight, 0.1)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, **inputs: Any) -> Any:
        output = self.models[0](**inputs)
        output.loss = output.loss + self.head(output.logits).square().mean()
        return output


def run_value_head(rank: int, world: int, stage: int, patched: bool, folder: str) -> Curve:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    inner = tiny_model("qwen2_moe")
    model = ValueHead(fluid_hf.patch_model(inner, FluidConfig(ep_size=world)) if patched else inner)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, config=settings(stage), optimizer=optimizer)
    curve = train(engine, rank)
    if patched:
        inner.save_pretrained(folder)
    engine.destroy()
    return curve


def test_a_module_around_the_patched_model_is_trained(pool2: RankPool, tmp_path: Path) -> None:
    expected = pool2.run(run_value_head, 1, False, "")[0]
    for stage in (0, 2, 3):
        for curve in pool2.run(run_value_head, stage, True, str(tmp_path)):
            assert_near(curve, expected)
        saved = load_file(tmp_path / "model.safetensors")
        assert {name: tensor.shape for name, tensor in saved.items()} == saved_shapes(tmp_path / "plain")


def saved_shapes(folder: Path) -> dict[str, torch.Size]:
    """Those of the unpatched model."""
    tiny_model("qwen2_moe").save_pretrained(folder)
    return {name: tensor.shape for name, tensor in load_file(folder / "model.safetensors").items()}


def run_two_models(rank: int, world: int) -> None:
    import deepspeed

    models = [fluid_hf.patch_model(tiny_model("mixtral"), FluidConfig(ep_size=world)) for _ in range(2)]
    try:
        deepspeed.initialize(model=ValueHead(*models), config=settings(1))
    finally:
        for model in models:
            fluid_hf.unpatch_model(model)


def test_two_patched_models_in_one_engine(pool2: RankPool) -> None:
    message = pool2.expect("ConfigError", run_two_models)[0]
    assert "must hold one patched model, but holds 2 (models.0, models.1)" in message
