"""Operations per token against torch's own counter; imbalance; settings of the callback."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import batch, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainerCallback, TrainingArguments

import fluid_hf
from fluid_hf import ConfigError, FluidCallback, cli
from fluid_hf.comm.side_stream import SideStream
from fluid_hf.integrations.step_metrics import LoadHistory, ProfiledSteps, StepMetrics
from fluid_hf.metrics import global_load, imbalance, model_flops_per_token, peak_tflops, read_loads
from fluid_hf.moe.statistics import LayerStats
from fluid_hf.overlap.sampler import OverlapSampler


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "mixtral"])
def test_operations_per_token_are_those_torch_counts(family: str) -> None:
    model = tiny_model(family)
    model.set_experts_implementation("eager")  # plain matrix products, which the counter knows
    model.set_attn_implementation("eager")
    ids = batch(0, 2)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    counted = counter.get_total_flops() / ids.numel()
    fluid_hf.patch_model(model)
    found = model_flops_per_token(model, model.fluid.layers, ids.shape[1])
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # torch counts the scores in full, not the half that a causal mask leaves, and forward alone
    scores = 2.0 * config.num_hidden_layers * config.num_attention_heads * head_dim * ids.shape[1]
    assert found / 3 + scores == pytest.approx(counted, rel=0.01)


def test_frozen_weights_have_no_weight_gradient() -> None:
    model = fluid_hf.patch_model(tiny_model("qwen3_moe"))
    trained = model_flops_per_token(model, model.fluid.layers, 0)
    model.requires_grad_(False)
    assert model_flops_per_token(model, model.fluid.layers, 0) == pytest.approx(trained * 4 / 6)


def test_metrics_of_one_process() -> None:
    model = fluid_hf.patch_model(tiny_model("qwen3_moe"))
    ids = batch(0, 3)
    model(input_ids=ids)
    metrics = model.fluid.metrics(tokens=ids.numel())
    assert metrics["fluid/tokens"] == ids.numel() and metrics["fluid/bytes_sent"] == 0
    assert metrics["fluid/busiest_expert"] >= 1 == metrics["fluid/busiest_rank"]
    pairs = ids.numel() * model.config.num_experts_per_tok
    assert [sum(load) for load in model.fluid.expert_load.values()] == [pairs] * model.config.num_hidden_layers
    assert model.fluid.metrics()["fluid/busiest_expert"] == 0  # nothing ran since


def test_evaluation_does_not_count() -> None:
    """Neither what it routes nor what it sends."""
    model = fluid_hf.patch_model(tiny_model("qwen3_moe"))
    metrics = StepMetrics(model, model.fluid, peak=None)
    ids = batch(0, 2)
    model.train()(input_ids=ids)
    model.eval()(input_ids=ids)
    model.train()(input_ids=ids)
    metrics.collect()
    pairs = 2 * ids.numel() * model.config.num_experts_per_tok
    assert [sum(load) for load in model.fluid.expert_load.values()] == [pairs] * model.config.num_hidden_layers
    model.eval()(input_ids=ids)
    metrics.close()
    model(input_ids=ids)
    model.fluid.metrics()
    assert [sum(load) for load in model.fluid.expert_load.values()] == [pairs / 2] * model.config.num_hidden_layers


def test_passes_without_gradients_add_no_tokens() -> None:
    model = fluid_hf.patch_model(tiny_model("qwen3_moe")).train()
    metrics = StepMetrics(model, model.fluid, peak=None)
    ids = batch(0, 2)
    model(input_ids=ids)
    with torch.no_grad():
        model(input_ids=ids)
    assert metrics.collect()["fluid/tokens"] == ids.numel()
    metrics.close()


def test_training_that_begins_again_after_an_error(tmp_path: Path) -> None:
    """`auto_find_batch_size`: the pass that ran out of memory leaves nothing behind."""
    model, raised = tiny_model("qwen3_moe"), []

    def exhaust(grad: torch.Tensor) -> None:
        if not raised:
            raised.append(True)
            raise RuntimeError("CUDA out of memory.")

    args = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=2, per_device_train_batch_size=4, auto_find_batch_size=True,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": ids, "labels": ids} for ids in batch(0, 8)]
    trainer = Trainer(model, args, train_dataset=data, callbacks=[FluidCallback()])
    model.model.layers[1].mlp.experts.down_proj.register_hook(exhaust)
    trainer.train()
    assert raised and trainer.state.global_step == 2
    assert not model._forward_pre_hooks


class Interrupted(TrainerCallback):
    """Ctrl-C after the first step."""

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def test_a_training_that_raised_is_measured_no_more(tmp_path: Path) -> None:
    """By its own callback, once another one measures or the model is unpatched."""
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=1, per_device_train_batch_size=1, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    data, model = [{"input_ids": ids, "labels": ids} for ids in batch(0, 1)], tiny_model("qwen3_moe")
    kept = []
    for _ in range(2):
        kept.append(Trainer(model, args, train_dataset=data, callbacks=[FluidCallback(), Interrupted()]))
        with pytest.raises(KeyboardInterrupt):
            kept[-1].train()
        assert len(model._forward_pre_hooks) == 1
    trainer = Trainer(model, args, train_dataset=data, callbacks=[FluidCallback()])
    trainer.train()
    assert not model._forward_pre_hooks and trainer.state.log_history[0]["fluid/tokens"] == 12
    with pytest.raises(KeyboardInterrupt):
        kept[0].train()
    fluid_hf.unpatch_model(model)
    assert not model._forward_pre_hooks


def test_operations_go_by_the_experts_that_a_token_met() -> None:
    """Families name the number differently: what the layers were called with counts."""
    model = fluid_hf.patch_model(tiny_model("qwen3_moe"))
    expected = model_flops_per_token(model, model.fluid.layers, 0)
    model(input_ids=batch(0, 1))
    model.config.num_experts_per_tok = 1
    assert model_flops_per_token(model, model.fluid.layers, 0) == expected


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA A100-SXM4-80GB", 311.9), ("NVIDIA RTX A1000", None), ("NVIDIA A10G", None), ("NVIDIA H100 PCIe", 756.0)],
)
def test_peak_of_a_device(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert peak_tflops() == peak


def test_load_and_imbalance() -> None:
    ranks = [{"a": [1, 2]}, {"a": [3, 4]}, {"a": [10, 20]}, {"a": [30, 40]}]
    assert global_load(ranks, "a", ep_size=2) == [11, 22, 33, 44]
    assert imbalance([11, 22, 33, 44]) == pytest.approx(44 / 27.5)
    assert imbalance([0, 0]) == 0 and imbalance([]) == 0


def test_sampler_unites_flights_and_sums_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.001, 0.002, 0.004, 0.005, 0.006, 0.008, 0.009])
    monkeypatch.setattr("fluid_hf.overlap.sampler.time.perf_counter", lambda: next(clock))
    sampler = OverlapSampler(torch.device("cpu"))
    first, second = sampler.post([]), sampler.post([])  # at 1 and 2 ms
    sampler.begin_wait(first)  # 4
    sampler.end_wait(first)  # 5
    sampler.begin_wait(second)  # 6
    sampler.end_wait(second)  # 8
    sampler.post([])  # never waited for: not counted
    assert sampler.result() == pytest.approx((7.0, 3.0))


class Event:
    """What the sampler needs of a CUDA event, on a clock of its own."""

    clock = iter([0.0])
    made = 0

    def __init__(self, enable_timing: bool) -> None:
        type(self).made += 1

    def record(self) -> None:
        self.at = next(self.clock)

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


def test_sampler_on_a_gpu_takes_few_events_and_takes_them_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait ends where the exchange has arrived, or where it begins."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(SideStream, "alone", lambda self, device: contextlib.nullcontext())
    monkeypatch.setattr("fluid_hf.overlap.sampler.record", lambda event, device: event.record())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for again in range(2):
        # Begin; posted and arrived twice; waited for at 9 (until 12), and at 30, when it is there since 20.
        Event.clock = iter([0.0, 1.0, 12.0, 2.0, 20.0, 9.0, 30.0])
        if not again:
            sampler = OverlapSampler(torch.device("cuda", 0))
        else:
            sampler.restart()
        first, second = sampler.post([]), sampler.post([])
        for flight in (first, second):
            sampler.begin_wait(flight)
            sampler.end_wait(flight)
        assert sampler.result() == pytest.approx((19.0, 3.0))
        assert Event.made == 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sampler_reads_the_clock_of_a_gpu() -> None:
    sampler = OverlapSampler(torch.device("cuda"))
    for _ in range(2):
        flight = sampler.post([])
        torch.cuda._sleep(10_000_000)
        sampler.begin_wait(flight)
        sampler.end_wait(flight)
        in_flight, exposed = sampler.result()
        assert 0 <= in_flight < 1 and exposed == 0, "there before anybody waited"
        sampler.restart()


def test_loads_of_layers_with_other_numbers_of_experts_and_calls() -> None:
    """As a count of each call's pairs gives them, also when many calls were added up in between."""
    generator, layers, expected = torch.Generator().manual_seed(0), {}, {}
    for name, experts, calls in (("a", 4, 3), ("b", 4, 3), ("c", 4, 600), ("d", 6, 3), ("e", 4, 0)):
        stats = LayerStats()
        counts = torch.randint(0, 5, (calls, experts), generator=generator)
        for row in counts:
            stats.add_load([row.cumsum(0).int()], top_k=2)
        assert len(stats.ends) <= 256
        layers[name] = SimpleNamespace(context=SimpleNamespace(stats=stats), num_local_experts=experts)
        expected[name] = counts.sum(0).tolist()
    assert read_loads(layers) == expected  # type: ignore[arg-type]
    alike = {name: layers[name] for name in "ab"}
    assert read_loads(alike) == {name: expected[name] for name in "ab"}  # type: ignore[arg-type]
    for one, other in ("ac", "ad"):  # one of them called more often, or of other experts
        both = {name: layers[name] for name in (one, other)}
        assert read_loads(both) == {name: expected[name] for name in both}  # type: ignore[arg-type]
    assert read_loads({"e": layers["e"]}) == {"e": [0] * 4}  # type: ignore[dict-item]


@pytest.mark.parametrize("steps", [(0, 2), (3, 2), (1,), 5, "ab"])
def test_profiled_steps_are_checked(steps: Any) -> None:
    with pytest.raises(ConfigError, match="profile_steps"):
        FluidCallback(profile_steps=steps)


def profile_steps(profiled: ProfiledSteps, steps: range, folder: Path) -> None:
    for step in steps:
        profiled.begin_step(step, folder)
        with torch.profiler.record_function("fluid::net.0::forward attention"):
            torch.ones(8, 8) @ torch.ones(8, 8)
        profiled.end_step(step, folder)


def test_steps_beyond_the_training_are_written_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also of the training after it, and of one after a training that raised; without experts there is no picture."""
    profiled = ProfiledSteps((2, 50))
    for folder in (tmp_path / "one", tmp_path / "two"):
        profile_steps(profiled, range(1, 4), folder)
        assert not folder.exists()
        profiled.close(folder)
        assert "profile_steps (2, 50): training ended; the trace has steps 2 to 3" in caplog.text
        assert {path.name for path in folder.iterdir()} == {"trace.json.gz", "timeline.json"}
        caplog.clear()
    profile_steps(profiled, range(1, 4), tmp_path / "raised")
    profile_steps(profiled, range(1, 3), tmp_path / "again")
    profiled.close(tmp_path / "again")
    assert "the trace has steps 2 to 2" in caplog.text and not torch.autograd._profiler_enabled()


def test_the_callback_ends_its_trace_with_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=2, per_device_train_batch_size=1, save_strategy="no", report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": ids, "labels": ids} for ids in batch(0, 2)]
    callback = FluidCallback(profile_steps=(2, 50))
    Trainer(tiny_model("qwen3_moe"), args, train_dataset=data, callbacks=[callback]).train()
    assert "the trace has steps 2 to 2" in caplog.text
    assert (tmp_path / "fluid_profile" / "timeline.png").is_file()


@pytest.mark.parametrize(
    ("steps", "message"),
    [(range(3, 6), "had steps 3 to 5"), (range(1, 2), "had steps 1 to 1"), (range(1, 1), "had no step")],
)
def test_a_first_step_that_never_came_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: range, message: str
) -> None:
    profiled = ProfiledSteps((2, 4))
    profile_steps(profiled, steps, tmp_path / "folder")
    profiled.close(tmp_path / "folder")
    assert f"profile_steps (2, 4): nothing was traced, this training {message}" in caplog.text
    assert not (tmp_path / "folder").exists()
    caplog.clear()
    profile_steps(profiled, range(1, 5), tmp_path / "whole")
    profiled.close(tmp_path / "whole")
    assert "profile_steps" not in caplog.text


def test_a_report_that_fails_does_not_end_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    profiled = ProfiledSteps((1, 1))
    profiled.begin_step(1, tmp_path)
    profiled.end_step(1, tmp_path)  # no range of a patched model
    assert "TraceError: trace" in caplog.text
    (tmp_path / "file").touch()
    profile_steps(profiled, range(1, 2), tmp_path / "file")
    assert "FileExistsError" in caplog.text


def test_no_load_is_no_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    history = LoadHistory()
    history.add(1, {})
    history.add(2, {})
    assert history.write(tmp_path / "folder") == [] and not (tmp_path / "folder").exists()
    assert "no load of a layer with experts was read" in caplog.text


def test_cost_of_the_metrics_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"model": "tiny", "ep": 2, "layers": 2, "batch": 1, "sequence": 16, "repeats": 4, "logging-steps": 2}
    arguments = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    assert cli.main(["bench", "metrics", *arguments, "--json", str(tmp_path / "cost.json")]) == 0
    report = json.loads((tmp_path / "cost.json").read_text())
    assert report["link"] == "mirror" and report["ranks"] == 2
    assert ("no GPU: times say nothing" in capsys.readouterr().err) == (not torch.cuda.is_available())
    assert 0 < report["collect_ms"] and 0 < report["step_ms"]["plain"]
    costs = report["costs"]
    assert report["cost_of_a_step"] == pytest.approx(sum(costs.values())) and report["standard_error"] > 0
    assert costs["reading"] == pytest.approx(report["collect_ms"] / 2 / report["step_ms"]["plain"])
    assert report["sample_every"] == 20


def test_a_sample_is_not_replaced_before_it_is_logged() -> None:
    model = fluid_hf.patch_model(tiny_model("qwen3_moe"))
    model.fluid.groups = dataclasses.replace(model.fluid.groups, ep_size=2)  # one process alone samples nothing
    metrics = StepMetrics(model, model.fluid, peak=None)
    sampled = []
    for step in range(40):
        metrics.begin_step()
        sampled += [step] if metrics._sampler is not None else []
        metrics.end_step()
        if step == 24:
            metrics._unread = None  # as a log leaves it
    metrics.close()
    assert sampled == [1, 25]


def test_a_sampler_that_is_used_again_tells_of_the_new_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fluid_hf.patch_model(tiny_model("qwen3_moe"))
    model.fluid.groups = dataclasses.replace(model.fluid.groups, ep_size=2)  # one process alone samples nothing
    monkeypatch.setattr(model.fluid, "metrics", lambda tokens: {"fluid/bytes_sent": 0.0, "fluid/tokens": 0.0})
    metrics, now = StepMetrics(model, model.fluid, peak=None), 0.0
    monkeypatch.setattr(OverlapSampler, "_now", lambda self: now)
    samplers, exposed = [], []
    for step in range(62):
        metrics.begin_step()
        sampler = metrics._sampler
        if sampler is not None:
            samplers.append(sampler)
            flight = sampler.post([])
            sampler.begin_wait(flight)
            now += 3.0 + step
            sampler.end_wait(flight)
        metrics.end_step()
        exposed.append(metrics.collect().get("fluid/exposed_ms"))
    metrics.close()
    assert len(samplers) == 4 and len(set(map(id, samplers))) == 1
    assert exposed == [None] + [4.0] * 20 + [24.0] * 20 + [44.0] * 20 + [64.0]  # not of the first step
