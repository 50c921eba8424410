"""State dicts of ranks that hold different experts under the same names, and who writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from distributed import RankPool, rank_pool
from families import tiny_model
from torch.distributed.checkpoint.state_dict import get_model_state_dict

import fluid_hf
from fluid_hf import FluidConfig

pool2 = rank_pool(2)


def run_distributed_checkpoint(rank: int, world: int, how: str, folder: str) -> str:
    """What `torch.distributed.checkpoint` says to the state dict of a patched model."""
    model = fluid_hf.patch_model(tiny_model("qwen3_moe"), FluidConfig(ep_size=world))
    state: dict[str, Any] = {"model": model}
    if how == "get_model_state_dict":
        state = {"model": get_model_state_dict(model)}
    elif how != "model":
        state = {"model": model.state_dict()}
    try:
        if how == "async_save":
            dcp.async_save(state, checkpoint_id=folder).result()
        else:
            dcp.save(state, checkpoint_id=folder)
    except dcp.CheckpointException as error:
        return str(error)
    return "written"


@pytest.mark.parametrize("how", ["state_dict", "model", "get_model_state_dict", "async_save"])
def test_distributed_checkpoint_does_not_take_one_ranks_experts_for_all(
    pool2: RankPool, how: str, tmp_path: Path
) -> None:
    for message in pool2.run(run_distributed_checkpoint, how, str(tmp_path / "saved"), timeout=60):
        assert "fluid_hf.errors.CheckpointError: tensor (model.model.layers.0.mlp.experts" in message
        assert "fluid_hf.save_pretrained" in message
    assert not (tmp_path / "saved" / ".metadata").exists()


def run_files(rank: int, world: int, ep_size: int, folder: str) -> bool:
    """A file of each rank's own, read by torch without code; and parameters that are marked by nothing."""
    model = fluid_hf.patch_model(tiny_model("qwen3_moe"), FluidConfig(ep_size=ep_size))
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not any(vars(tensor) for tensor in torch.load(f"{folder}/{rank}.pt").values())
    model.load_state_dict(torch.load(f"{folder}/{rank}.pt", weights_only=True))
    model.load_state_dict(model.state_dict(), assign=True)
    model.state_dict(keep_vars=True)
    assert not any("__getstate__" in vars(parameter) for parameter in model.parameters())
    fluid_hf.unpatch_model(model)
    expected = tiny_model("qwen3_moe").parameters()
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize("ep_size", [1, 2])
def test_a_file_of_each_rank(pool2: RankPool, ep_size: int, tmp_path: Path) -> None:
    assert pool2.run(run_files, ep_size, str(tmp_path)) == [True, True]
