"""Every family that is listed as sequence parallel, on two CPU ranks against one process on the whole sequences."""

from __future__ import annotations

import traceback
from typing import Any

import moe_families
import pytest
import torch
from distributed import RankPool, rank_pool
from families import errors_by_name, relative_error
from transformers import PreTrainedModel

import fluid_hf
from fluid_hf import FluidConfig
from fluid_hf.models.attention import find_attention
from fluid_hf.models.mask_code import MaskCode, read_mask_code

LISTED = [model.family for model in fluid_hf.supported_models() if model.served and model.sequence_parallel]
FOLDERS = [folder for folder in LISTED if folder in moe_families.folders()]
TOLERANCE = 1e-5
pool2 = rank_pool(2)
SLIDING = ["full_attention", "sliding_attention"]
# Layers whose heads are not the config's: by its own settings.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "twice the key/value heads in sliding layers": ("mimo_v2_flash", {"layer_types": SLIDING}),
    "values of another size": ("mimo_v2_flash", {"layer_types": ["full_attention"] * 2, "head_dim": 12}),
    "heads by layer": ("laguna", {"num_attention_heads_per_layer": [4, 8], "layer_types": SLIDING}),
}
# transformers gives the masks of these no positions, or not those of two dimensions
NOT_BY_POSITION = ("afmoe", "ernie4_5_vl_moe", "glm4v_moe", "gpt_oss")


def build(folder: str, settings: dict[str, Any]) -> PreTrainedModel:
    """The tiny model of a folder, in float64, so that a sensitive model does not amplify roundings."""
    special, small = moe_families.SPECIAL.get(folder, {}), dict(moe_families.SMALL)
    try:
        moe_families.SPECIAL[folder] = {**special, **settings}
        for name in settings:
            moe_families.SMALL.pop(name, None)
        return moe_families.tiny_model(folder).double()
    finally:
        moe_families.SPECIAL[folder] = special
        moe_families.SMALL.update(small)


def errors_of(rank: int, world: int, folder: str, settings: dict[str, Any], packed: bool) -> dict[str, float]:
    """Relative errors of the output and of every gradient, sequences cut against whole."""
    generator = torch.Generator().manual_seed(5)
    inputs = {"input_ids": torch.randint(3, 90, (1, 12), generator=generator)}
    if packed:
        inputs["position_ids"] = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    expected = build(folder, settings)
    whole = expected(**inputs, use_cache=False)[0]
    weight = torch.randn(whole.shape, generator=generator)
    (whole * weight).mean().backward()
    model = fluid_hf.patch_model(build(folder, settings), FluidConfig(ep_size=1, sp_size=world))
    output = model(**model.fluid.shard_batch(inputs))[0]
    length = whole.shape[1] // world
    piece = slice(rank * length, (rank + 1) * length)
    (output * weight[:, piece]).mean().backward()
    model.fluid.finish_batch()
    model.fluid.reduce_gradients(model)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    wanted = {name: p.grad for name, p in expected.named_parameters() if p.grad is not None}
    assert all(not found[name].any() for name in found.keys() - wanted.keys())
    assert found.keys() >= wanted.keys()
    errors = {"output": relative_error(output, whole[:, piece]), **errors_by_name(found, wanted)}
    fluid_hf.unpatch_model(model)
    return errors


def check_all(rank: int, world: int, cases: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Errors of each case, not packed and packed; the text of an exception for one that raised."""
    found: list[Any] = []
    for folder, settings in cases:
        try:
            found.append([errors_of(rank, world, folder, settings, packed) for packed in (False, True)])
        except Exception:
            found.append(traceback.format_exc())
    return found


CASES = {folder: (folder, {}) for folder in FOLDERS} | {
    name: case for name, case in SETTINGS.items() if case[0] in FOLDERS
}


@pytest.fixture(scope="module")
def results(pool2: RankPool) -> list[list[Any]]:
    return pool2.run(check_all, list(CASES.values()))


@pytest.mark.parametrize(
    "index", range(len(CASES)), ids=[*FOLDERS, *(name for name, case in SETTINGS.items() if case[0] in FOLDERS)]
)
def test_family(results: list[list[Any]], index: int) -> None:
    for rank, result in enumerate(results):
        assert isinstance(result[index], list), result[index]
        for errors in result[index]:
            name = max(errors, key=lambda key: errors[key])
            assert errors[name] <= TOLERANCE, f"rank {rank}: {name} is off by {errors[name]:.1e}"


def test_code_of_masks_is_read() -> None:
    found = {folder: read_mask_code(build(folder, {}).base_model) for folder in FOLDERS}
    assert [folder for folder, code in found.items() if not code.by_position] == [
        folder for folder in NOT_BY_POSITION if folder in FOLDERS
    ]
    assert not found["qwen3_omni_moe"].windowed and found["mixtral"].windowed
    assert read_mask_code(torch.nn.Linear(1, 1)) == MaskCode()


@pytest.mark.skipif("step3p7" not in FOLDERS, reason="this transformers has no step3p7")
def test_attention_that_looks_ahead_is_refused() -> None:
    with pytest.raises(fluid_hf.UnsupportedModelError, match="use_bidirectional_attention \\(True\\) must be off"):
        find_attention(build("step3p7", {"use_bidirectional_attention": True}), 2)
