"""What the HF Trainer leaves on disk, and takes back from it, is what it does with an unpatched model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_files_script
from distributed import fresh_ranks
from families import tiny_model
from moe_families import tiny_model as build_family
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_remote_code import build
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Trainer, TrainingArguments

from fluid_hf import CheckpointError, FluidCallback

SPLIT = {"ep_size": 2}
RUNS: list[dict[str, Any]] = [
    {"name": "plain", "stage": 2},
    {"name": "stage2", "stage": 2, "fluid": SPLIT},
    {"name": "stage3", "stage": 3, "fluid": SPLIT},
    {"name": "lora-plain", "stage": 2, "lora": "attention"},
    {"name": "lora-stage2", "stage": 2, "fluid": SPLIT, "lora": "attention"},
    {"name": "lora-experts-plain", "stage": 2, "lora": "experts"},
    {"name": "lora-experts-stage2", "stage": 2, "fluid": SPLIT, "lora": "experts"},
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs")
    with fresh_ranks(2) as ranks:
        ranks.run(trainer_files_script.run_all, RUNS, str(folder))
    return {run["name"]: {**json.loads((folder / f"{run['name']}.json").read_text()), "at": folder} for run in RUNS}


def files(folder: Path) -> set[str]:
    """Files of a Trainer's output folder, but DeepSpeed's own."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if not re.search(r"global_step\d+/", name)}


def plain_run(name: str) -> str:
    """The run of the same model without fluid_hf."""
    return f"{name.rpartition('-')[0]}-plain".removeprefix("-")


@pytest.mark.parametrize("name", ["stage2", "stage3", "lora-stage2", "lora-experts-stage2"])
def test_same_files_and_rotation(runs: dict[str, dict[str, Any]], name: str) -> None:
    plain = plain_run(name)
    folder = runs[name]["at"]
    assert files(folder / name) == files(folder / plain)
    kept = {path.name for path in (folder / name).iterdir()}
    assert kept == ({"checkpoint-4", "checkpoint-6"} if "lora" in name else {"checkpoint-2", "checkpoint-6"})


@pytest.mark.parametrize("name", ["stage2", "stage3", "lora-stage2", "lora-experts-stage2"])
def test_best_model_is_loaded_at_the_end(runs: dict[str, dict[str, Any]], name: str) -> None:
    plain, found = runs[plain_run(name)], runs[name]
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-4) and len(found["losses"]) == 3
    best = found["losses"].index(min(found["losses"]))
    assert best == (2 if "lora" in name else 0) and found["best"].endswith(f"checkpoint-{2 * best + 2}")
    assert found["after"] == pytest.approx(found["metric"], rel=1e-6)
    assert plain["after"] == pytest.approx(plain["metric"], rel=1e-6)


@pytest.mark.parametrize("name", ["stage2", "stage3"])
def test_checkpoints_are_plain_models(runs: dict[str, dict[str, Any]], name: str) -> None:
    for step in (2, 6):
        ours, theirs = (runs[name]["at"] / run / f"checkpoint-{step}" for run in (name, "plain"))
        found, expected = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
        assert found.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-4)
        model = AutoModelForCausalLM.from_pretrained(ours)
        tokenizer = AutoTokenizer.from_pretrained(ours)
        GenerationConfig.from_pretrained(ours)
        ids = tokenizer("w5", return_tensors="pt").input_ids
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 4)


@pytest.mark.parametrize("name", ["lora-stage2", "lora-experts-stage2"])
def test_adapters_are_saved_as_peft_saves_them(runs: dict[str, dict[str, Any]], name: str) -> None:
    ours, theirs = (runs[run]["at"] / run / "checkpoint-6" for run in (name, plain_run(name)))
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs))
    assert found.keys() == expected.keys() and all("lora_" in key for key in found)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-4)
    PeftModel.from_pretrained(tiny_model("qwen2_moe"), ours)


@pytest.mark.parametrize("family", ["hit_loop", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("kind", ["resumed", "best"])
def test_experts_are_taken_back_without_deepspeed(tmp_path: Path, kind: str, family: str) -> None:
    """Also those that transformers writes under other names than they have in the model."""
    torch.manual_seed(1)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 60, (16, 8))]

    def train(resume: str | None = None) -> Trainer:
        # The worst loss counts as the best: that of the first checkpoint.
        best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
        args = TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            max_steps=6,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            **(best if kind == "best" else {}),
        )
        model: Any = build(family) if family == "hit_loop" else tiny_model(family)
        with torch.no_grad():
            for parameter in model.parameters() if resume is not None else ():
                parameter.add_(1)  # nothing of the checkpoint is there by chance
        trainer = Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=[FluidCallback()])
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    trainer = train()
    if kind == "best":
        assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
        assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)
    else:
        trainers = (trainer, train(f"{tmp_path}/checkpoint-2"))
        losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in trainers]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def trainer_of(model: Any, folder: Path) -> Trainer:
    args = TrainingArguments(output_dir=str(folder / "out"), use_cpu=True, report_to="none", disable_tqdm=True)
    return Trainer(model, args, callbacks=[FluidCallback()])


@pytest.mark.parametrize("kind", ["loaded in another dtype", "loaded from other names", "longcat_flash", "lacking"])
def test_weights_are_taken_back_exactly_or_refused(tmp_path: Path, kind: str) -> None:
    def make(seed: int) -> Any:
        if kind == "longcat_flash":
            return build_family(kind, seed)
        model: Any = tiny_model("qwen3_moe", seed=seed)
        if kind == "loaded in another dtype":
            model.config.dtype = torch.bfloat16  # as after from_pretrained(bfloat16).float()
        if kind == "loaded from other names":
            weights = {name.replace("model.layers", "net.blocks"): w for name, w in model.state_dict().items()}
            model.save_pretrained(tmp_path / "hub", state_dict=weights, save_original_format=False)
            model = type(model).from_pretrained(tmp_path / "hub", key_mapping={"^net.blocks": "model.layers"})
        return model

    first, second = make(0), make(1)
    trainer_of(first, tmp_path).save_model(str(tmp_path / "saved"))
    trainer = trainer_of(second, tmp_path)
    if kind == "lacking":
        path = tmp_path / "saved" / "model.safetensors"
        save_file({name: w for name, w in load_file(path).items() if ".experts." not in name}, path, {"format": "pt"})
        with pytest.raises(CheckpointError, match=re.escape("tensor (model.layers.0.mlp.experts.down_proj)")):
            trainer._load_from_checkpoint(str(tmp_path / "saved"))
        return
    trainer._load_from_checkpoint(str(tmp_path / "saved"))
    expected, found = first.state_dict(), second.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
