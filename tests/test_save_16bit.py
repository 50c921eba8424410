"""`engine.save_16bit_model` of a patched model: one file with what the unpatched engine would have written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed import RankPool, rank_pool
from families import tiny_model
from test_deepspeed import settings

import fluid_hf
from fluid_hf import FluidConfig

pool2 = rank_pool(2)


def run_save_16bit(rank: int, world: int, stage: int, folder: str, gather: bool = True) -> bool:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # saves a minute of compilation
    config = settings(stage)
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = gather
    model = fluid_hf.patch_model(tiny_model("qwen3_moe", tie_word_embeddings=True), FluidConfig(ep_size=world))
    model.model.layers[0].mlp.experts.requires_grad_(stage == 3)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    try:
        saved: bool = engine.save_16bit_model(folder)
        if saved:
            engine.save_16bit_model(folder, "trained.bin", exclude_frozen_parameters=True)
        return saved
    finally:
        engine.destroy()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_save_16bit_model_writes_the_whole_model(pool2: RankPool, tmp_path: Path, stage: int) -> None:
    assert pool2.run(run_save_16bit, stage, str(tmp_path)) == [True, True]
    expected = tiny_model("qwen3_moe", tie_word_embeddings=True).state_dict()
    saved = torch.load(tmp_path / "pytorch_model.bin")
    assert saved.keys() == expected.keys()
    assert all(saved[name].dtype == w.dtype and torch.equal(saved[name], w) for name, w in expected.items())
    frozen = {name for name in expected if stage != 3 and ".layers.0.mlp.experts." in name}
    assert torch.load(tmp_path / "trained.bin").keys() == expected.keys() - frozen


def test_save_16bit_model_that_cannot_write(pool2: RankPool, tmp_path: Path) -> None:
    assert pool2.run(run_save_16bit, 3, str(tmp_path), gather=False) == [False, False]
    (tmp_path / "pytorch_model.bin").mkdir()
    for message in pool2.expect("CheckpointError", run_save_16bit, 0, str(tmp_path), timeout=60):
        assert f"checkpoint ({tmp_path / 'pytorch_model.bin'}) cannot be written: " in message
