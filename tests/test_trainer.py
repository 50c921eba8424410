"""The HF Trainer on DeepSpeed engines: losses, gradient norms, checkpoints, resuming, reports."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import families
import moe_families
import pytest
import torch
import trainer_script
from distributed import RankError, RankPool, fresh_ranks, rank_pool
from families import batch, relative_error
from safetensors.torch import load_file
from test_remote_code import build
from test_saving import build_stored
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerControl, TrainerState, TrainingArguments

import fluid_hf
from fluid_hf import FluidCallback, FluidConfig
from fluid_hf.errors import ConfigError
from fluid_hf.integrations.trainer_methods import keep_weight_decay, patch_new_models

pool2 = rank_pool(2)

TOLERANCE = 1e-4


def train(runs: list[dict[str, Any]], folder: Path, nproc: int = 2) -> dict[str, list[dict[str, Any]]]:
    """Results of each run by name, one per rank, in rank order; in new processes."""
    runs = [{"output": str(folder / run["name"]), **run} for run in runs]
    with fresh_ranks(nproc) as ranks:
        try:
            ranks.run(trainer_script.run_all, runs, str(folder))
        except RankError:
            if not any("die_after_save" in run for run in runs):
                raise
    results: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        paths = [folder / f"{run['name']}-{rank}.json" for rank in range(nproc)]
        assert "die_after_save" in run or all(path.is_file() for path in paths), run
        results[run["name"]] = [json.loads(path.read_text()) for path in paths if path.is_file()]
    return results


def curve(result: dict[str, Any]) -> list[tuple[float, float]]:
    assert "error" not in result, result
    return [(entry["loss"], entry["grad_norm"]) for entry in result["history"] if "loss" in entry]


def assert_equal(found: list[tuple[float, float]], expected: list[tuple[float, float]]) -> None:
    assert len(found) == len(expected) > 0
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for value, reference in zip(ours, theirs, strict=True):
            assert abs(value - reference) <= TOLERANCE * abs(reference), f"step {step}: {found} != {expected}"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("stages")
    runs: list[dict[str, Any]] = []
    for optimizer in (True, False):
        runs.append({"name": f"plain-{optimizer}", "stage": 1, "json_optimizer": optimizer})
        for stage in range(4):
            run = {"name": f"{stage}-{optimizer}", "stage": stage, "json_optimizer": optimizer, "fluid": {"ep_size": 2}}
            runs.append({**run, "save_model": str(folder / f"saved-{stage}-{optimizer}")})
    return train(runs, folder)


@pytest.mark.parametrize("json_optimizer", [True, False], ids=["json_optimizer", "trainer_optimizer"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stage_equals_unpatched_training(
    results: dict[str, list[dict[str, Any]]], stage: int, json_optimizer: bool
) -> None:
    found, expected = results[f"{stage}-{json_optimizer}"][0], results[f"plain-{json_optimizer}"][0]
    assert_equal(curve(found), curve(expected))
    assert len(curve(found)) == 10


def test_saved_models_are_plain_checkpoints(
    results: dict[str, list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """`trainer.save_model` and `model.save_pretrained`, reloaded in a fresh process that knows transformers only."""
    found = tmp_path_factory.getbasetemp().glob("stages*/saved-*")
    folders = sorted(str(folder) for folder in found if not folder.parent.is_symlink())  # pytest links the newest
    assert len(folders) == 16
    with fresh_ranks(1) as process:
        (losses,) = process.run(families.reloaded_losses, folders, batch(0, 96)[:6])
    for name, loss in ((Path(folder).name, loss) for folder, loss in losses.items()):
        expected = results[name.removeprefix("saved-").removesuffix("_direct")][0]["eval_loss"]
        assert abs(loss - expected) <= TOLERANCE * expected, name
    assert not list(Path(folders[0]).parent.glob(".*")), "temporary files were left"


def test_metrics_are_in_the_history(results: dict[str, list[dict[str, Any]]]) -> None:
    entries = [entry for entry in results["1-True"][0]["history"] if "loss" in entry]
    for entry in entries:
        assert entry["fluid/bytes_sent"] > 0 and entry["fluid/rows_sent"] > 0
        assert entry["fluid/busiest_expert"] >= 1.0
        assert entry["fluid/wgrad_in_window"] == 1.0


def test_reporters_profiles_and_expert_load(tmp_path: Path) -> None:
    run = {"name": "board", "stage": 1, "steps": 3, "fluid": {"ep_size": 2}, "report_to": "tensorboard"}
    callback = {"profile_steps": [2, 3], "expert_load": True, "peak_tflops": 0.5}
    results = train([{**run, "callback": callback}, {**run, "name": "plain", "fluid": None}], tmp_path)
    assert_equal(curve(results["board"][0]), curve(results["plain"][0]))
    entries = [entry for entry in results["board"][0]["history"] if "loss" in entry]
    for entry in entries:
        assert entry["fluid/tokens"] == 2 * batch(0, 2).numel()
        assert entry["fluid/bytes_per_step"] == entry["fluid/bytes_sent"]
        assert entry["fluid/busiest_expert"] >= entry["fluid/busiest_rank"] >= 1.0
        assert entry["fluid/mfu"] == entry["fluid/model_tflops"] / 0.5 > 0
        sampled = entry is not entries[0]
        assert not sampled or (0 <= entry["fluid/overlap_ratio"] <= 1 and entry["fluid/exposed_ms"] > 0)
    folder = tmp_path / "board" / "fluid_profile"
    summary = json.loads((folder / "timeline.json").read_text())
    assert {entry["forward"]["calls"] for entry in summary["layers"].values()} == {2}
    load = json.loads((folder / "expert_load.json").read_text())
    assert load["steps"] == [1, 2, 3] and len(load["load_over_mean"]) == 2
    for steps in load["load_over_mean"].values():
        assert all(abs(sum(step) / len(step) - 1) < 1e-3 for step in steps)
    for name in ("trace.json.gz", "timeline.png", "timeline.svg", "expert_load.png", "expert_load.svg"):
        assert (folder / name).stat().st_size > 1000
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = next((tmp_path / "board").glob("runs/*"))
    events = EventAccumulator(str(logs))
    events.Reload()
    assert "train/fluid/bytes_sent" in events.Tags()["scalars"]
    assert len(events.Scalars("train/fluid/wgrad_in_window")) == 3


def test_every_model_of_model_init_is_patched(tmp_path: Path) -> None:
    """As in a search for hyperparameters, on which `train` is called for every trial; nothing adds up over them."""
    base = {"steps": 3, "trials": 3, "save_model": str(tmp_path / "saved")}
    plain = {**base, "name": "plain", "stage": 1, "save_model": None}
    runs = [plain, *({**base, "name": f"{stage}", "stage": stage, "fluid": {"ep_size": 2}} for stage in (1, 3))]
    runs[1]["callback"] = {"expert_load": True}
    runs[2]["forget"] = True
    results = train(runs, tmp_path)
    for found in (*results["1"], *results["3"]):
        for trial, expected in zip(found["trials"], results["plain"][0]["trials"], strict=True):
            assert_equal(curve({"history": trial}), curve({"history": expected}))
            assert [entry["fluid/tokens"] for entry in trial if "loss" in entry] == [2 * batch(0, 2).numel()] * 3
        assert len(set(found["groups"])) == 1, found["groups"]
    assert json.loads((tmp_path / "1" / "fluid_profile" / "expert_load.json").read_text())["steps"] == [1, 2, 3]


def test_arguments_of_model_init() -> None:
    def with_trial(trial: Any) -> tuple[str, Any]:
        return "with", trial

    trainer = Trainer.__new__(Trainer)
    trainer.model = None
    for make, expected in (
        (with_trial, ("with", None)),
        (functools.partial(with_trial, 1), ("with", 1)),
        (functools.partial(with_trial, trial=2), ("with", 2)),
        (lambda: ("without",), ("without",)),
    ):
        trainer.model_init, patched = make, []  # type: ignore[assignment]
        patch_new_models(trainer, patched.append)
        assert trainer.call_model_init() == expected == patched[0]
    trainer.model_init = None  # type: ignore[assignment]
    patch_new_models(trainer, patched.append)
    assert trainer.model_init is None


def test_metrics_of_epochs_and_of_what_was_not_logged(tmp_path: Path) -> None:
    base = {"stage": 1, "fluid": {"ep_size": 2}, "callback": {"expert_load": True}}
    epochs = {**base, "name": "epochs", "epochs": 2, "samples": 12, "logging_strategy": "epoch"}
    results = train([epochs, {**base, "name": "rare", "steps": 5, "logging_steps": 3}], tmp_path)
    entries = [entry for entry in results["epochs"][0]["history"] if "loss" in entry]
    assert [(entry["step"], entry["fluid/tokens"]) for entry in entries] == [(3, 12 * 12), (6, 12 * 12)]
    for name, steps in (("epochs", [3, 6]), ("rare", [3, 5])):
        load = json.loads((tmp_path / name / "fluid_profile" / "expert_load.json").read_text())
        assert load["steps"] == steps


@pytest.mark.parametrize("stage", [1, 3])
def test_resume_after_a_kill(tmp_path: Path, stage: int) -> None:
    run = {"stage": stage, "fluid": {"ep_size": 2}, "steps": 6, "save_steps": 3}
    killed = {**run, "name": "killed", "die_after_save": 3, "output": str(tmp_path / "run")}
    train([killed], tmp_path)
    assert (tmp_path / "run" / "checkpoint-3").is_dir()
    resumed = {**run, "name": "resumed", "output": str(tmp_path / "run"), "resume": str(tmp_path / "run/checkpoint-3")}
    other = {**resumed, "name": "other", "fluid": {"ep_size": 1}}
    results = train([{**run, "name": "whole"}, resumed, other], tmp_path)
    assert_equal(curve(results["resumed"][0])[3:], curve(results["whole"][0])[3:])
    assert [result["error"] for result in results["other"]] == ["CheckpointError"] * 2
    assert "ep_size (1) must equal the ep_size (2)" in results["other"][0]["message"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-6")
    assert torch.isfinite(model(input_ids=batch(0, 1)).logits).all()


def test_expert_data_parallel_with_accumulation(tmp_path: Path) -> None:
    run = {
        "stage": 2,
        "steps": 4,
        "accumulation": 2,
        "family": "qwen2_moe",
        "predict": 7,
    }  # the last batch is filled up
    patched = {**run, "name": "patched", "fluid": {"ep_size": 2}}
    results = train([{**run, "name": "plain"}, patched], tmp_path, nproc=4)
    assert_equal(curve(results["patched"][0]), curve(results["plain"][0]))
    for found in results["patched"]:
        assert len(found["predicted"]) == 1 + 7 * 4
        assert found["predicted"] == pytest.approx(results["plain"][0]["predicted"], rel=1e-3, abs=1e-4)


def test_generation_in_evaluation(tmp_path: Path) -> None:
    """Ranks are done after different numbers of tokens; one that is goes on until all are."""
    ends = {"eos_token_id": list(range(3, 24)), "pad_token_id": 0}
    run = {"stage": 1, "steps": 1, "generate": True, "predict": 6, "model": ends}
    runs = [{**run, "name": "plain"}, {**run, "name": "fluid", "fluid": {"ep_size": 2, "timeout_seconds": 20}}]
    results = train(runs, tmp_path)
    assert curve(results["fluid"][0]) and curve(results["plain"][0])
    expected = results["plain"][0]["generated"]
    lengths = [sum(token != 0 for token in row[12:]) for row in expected]
    assert len(expected) == 6 and max(lengths[:3]) != max(lengths[3:])  # three rows are one rank's batch
    for result in results["fluid"]:
        assert result["generated"] == expected


def test_weight_decay_of_experts_with_biases(tmp_path: Path) -> None:
    """What the Trainer's optimizer leaves alone by name, it leaves alone where DeepSpeed gives the names."""
    base = {"steps": 4, "weight_decay": 20.0, "folder": "gpt_oss"}  # six percent a step
    kinds: dict[str, dict[str, Any]] = {
        "plain": {"stage": 1},
        "whole": {"stage": 1, "fluid": {"ep_size": 1}},
        "split": {"stage": 1, "fluid": {"ep_size": 2}},
        "zero3": {"stage": 3, "fluid": {"ep_size": 2}},
    }
    runs = [
        {**base, **kind, "name": name, "save_model": str(tmp_path / "saved" / name)} for name, kind in kinds.items()
    ]
    results = train(runs, tmp_path)
    weights = {name: load_file(tmp_path / "saved" / name / "model.safetensors") for name in kinds}
    for name, found in weights.items():
        assert_equal(curve(results[name][0]), curve(results["plain"][0]))
        assert found.keys() == weights["plain"].keys()
        for key, expected in weights["plain"].items():
            assert relative_error(found[key], expected) < 1e-3, (name, key)


def num_decayed(trainer: Trainer, model: nn.Module) -> tuple[int, int]:
    """Values of the experts, over all ranks, and others that are decayed."""
    state = getattr(model, "fluid", None)
    split = {id(p) for layer in state.layers.values() for p in layer.split_parameters()} if state else set()
    chosen = set(trainer.get_decay_parameter_names(model))
    assert chosen <= {name for name, _ in model.named_parameters()}
    counts = [0, 0]
    for name, parameter in model.named_parameters():
        counts["experts" in name] += parameter.numel() * (name in chosen) * (2 if id(parameter) in split else 1)
    return counts[0], counts[1]


def run_decay_names(rank: int, world: int, kind: str) -> None:
    """Also of a Trainer that chooses otherwise, and of one whose model is unpatched again."""

    class Own(Trainer):
        def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
            return [name for name, _ in model.named_parameters() if "attn" not in name]

    for trainer_class in (Trainer, Own):
        model = build_stored(kind) if kind.startswith("pairs") else moe_families.tiny_model(kind)
        trainer = trainer_class.__new__(trainer_class)
        expected, names = num_decayed(trainer, model), trainer.get_decay_parameter_names(model)
        keep_weight_decay(trainer)
        children = [name for name, _ in fluid_hf.patch_model(model, FluidConfig(ep_size=world)).named_modules()]
        assert num_decayed(trainer, model) == expected
        assert [name for name, _ in model.named_modules()] == children
        fluid_hf.unpatch_model(model)
        assert trainer.get_decay_parameter_names(model) == names


KINDS = ["gpt_oss", "muse_spark", "nemotron_h", "pairs with biases", "dbrx"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if " " in kind or kind in moe_families.folders()])
def test_the_same_parameters_are_decayed(pool2: RankPool, kind: str) -> None:
    pool2.run(run_decay_names, kind)


def test_bad_settings_raise_on_every_rank_before_training(tmp_path: Path) -> None:
    base = {"stage": 1, "steps": 1}
    runs = [
        {**base, "name": "unknown key", "fluid": {"ep_sise": 2}},
        {**base, "name": "autoep", "fluid": {"ep_size": 2}, "deepspeed": {"expert_parallel": {"enabled": True}}},
        {**base, "name": "world", "fluid": {"ep_size": 4}},
        {**base, "name": "reference", "fluid": {"ep_size": 2}, "stage": 3, "attributes": {"sync_ref_model": True}},
    ]
    runs.append({**base, "name": "whole", "fluid": {"ep_size": 2}, "attributes": {"sync_ref_model": True}})
    runs[-1] |= {"reference": True}  # not patched
    results = train(runs, tmp_path)
    messages = {"unknown key": "'ep_size'", "autoep": "expert_parallel", "world": "world size (2)"}
    messages |= {"reference": "sync_ref_model (true)", "whole": "or ref_model patched with the settings of the model"}
    for name, message in messages.items():
        assert [result["error"] for result in results[name]] == ["ConfigError"] * 2, results[name]
        assert message in results[name][0]["message"]


def test_an_optimizer_of_weights_that_are_gone_is_refused(tmp_path: Path) -> None:
    """Experts of a `ModuleList` are stored anew: what was built before would train all but them."""
    args = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, report_to="none", save_strategy="no")
    data = [{"input_ids": ids, "labels": ids} for ids in batch(0, 8, vocab_size=60)]
    for patch_first in (False, True):
        model: Any = build("hit_loop")
        if patch_first:
            fluid_hf.patch_model(model, FluidConfig(ep_size=1))
        given = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = Trainer(model, args, train_dataset=data, callbacks=[FluidCallback()], optimizers=(given, None))
        if patch_first:
            assert trainer.train().global_step == 1
        else:
            with pytest.raises(ConfigError, match="parameters that are not the model's, and not its experts"):
                trainer.train()


def begin_without_engine(rank: int, world: int, folder: str) -> None:
    model = fluid_hf.patch_model(families.tiny_model("qwen3_moe"), FluidConfig(ep_size=world))
    args = TrainingArguments(folder, use_cpu=True, report_to="none")
    FluidCallback().on_train_begin(args, TrainerState(), TrainerControl(), model=model)


def test_split_experts_are_not_trained_without_an_engine(pool2: RankPool, tmp_path: Path) -> None:
    """As after `evaluate()`, which keeps the Trainer from wrapping the model: nothing would average the gradients."""
    for text in pool2.expect("ConfigError", begin_without_engine, str(tmp_path)):
        assert "ep_size (2) over 1 needs DeepSpeed in the Trainer" in text
