"""`zero_to_fp32.py` of a patched model's checkpoints writes the whole model, of experts of every format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed import RankError, RankPool, rank_pool, run_script
from safetensors.torch import load_file
from test_resharding import run_and_save
from transformers import AutoModelForCausalLM

from fluid_hf.integrations.zero_to_fp32 import write_fp32_model

pool2 = rank_pool(2)


@pytest.mark.parametrize("stage", [1, 3])
def test_zero_to_fp32_writes_a_whole_model(pool2: RankPool, tmp_path: Path, stage: int) -> None:
    pool2.run(run_and_save, str(tmp_path), stage, 2, "qwen2_moe")
    arguments = [str(tmp_path), str(tmp_path / "out"), "--max_shard_size", "20KB"]
    run_script(tmp_path / "zero_to_fp32.py", *arguments, nproc=1)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").state_dict()  # trained in float32
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert sorted(path.name for path in tmp_path.glob(".*")) == []
    (tmp_path / "latest").unlink()
    with pytest.raises(RankError, match=r"CheckpointError: file \(.*latest\) is missing"):
        run_script(tmp_path / "zero_to_fp32.py", *arguments, nproc=1)


@pytest.mark.parametrize(
    ("stage", "family"),
    [(0, "qwen3_moe"), (0, "gpt_oss"), (3, "gpt_oss"), (1, "nemotron_h"), (2, "llama4"), (1, "dbrx")],
)
def test_zero_to_fp32_of_every_format(pool2: RankPool, tmp_path: Path, stage: int, family: str) -> None:
    """Biases, transposed weights, no gate, two dimensions; what no ZeRO has split, and what is frozen."""
    pool2.run(run_and_save, str(tmp_path), stage, 2, family, frozen=stage in (1, 2))
    write_fp32_model(tmp_path, tmp_path / "out")
    found, expected = load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "plain/model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
