"""Tokens per second of the callback, against a clock that stands still between the steps."""

from __future__ import annotations

import pytest
from families import batch, tiny_model

import fluid_hf
from fluid_hf.integrations.step_metrics import StepMetrics
from fluid_hf.metrics import model_flops_per_token


def test_evaluation_does_not_count_as_training_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("fluid_hf.integrations.step_metrics.time.perf_counter", lambda: clock[0])
    model = fluid_hf.patch_model(tiny_model("qwen3_moe"))
    metrics = StepMetrics(model, model.fluid, peak=2.0)
    ids = batch(0, 2)
    for step in range(2):
        metrics.begin_step()
        model.train()
        model(input_ids=ids)
        clock[0] += 4.0
        metrics.end_step()
        if step == 0:
            model.eval()
            model(input_ids=ids)  # evaluation: neither its tokens nor its time count
            clock[0] += 1000.0
            metrics.interrupt()
    found = metrics.collect()
    metrics.close()
    assert found["fluid/tokens"] == 2 * ids.numel()
    assert found["fluid/tokens_per_second"] == pytest.approx(2 * ids.numel() / 8.0)
    flops = model_flops_per_token(model, model.fluid.layers, ids.shape[1])
    assert found["fluid/model_tflops"] == pytest.approx(found["fluid/tokens_per_second"] * flops / 1e12)
    assert found["fluid/mfu"] == pytest.approx(found["fluid/model_tflops"] / 2.0)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(("logged_at", "seconds"), [((3,), [4.0]), ((1, 3), [90.0, 4.0]), ((2, 3), [4.0, 4.0])])
def test_the_first_step_counts_in_no_rate_of_others(
    logged_at: tuple[int, ...], seconds: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("fluid_hf.integrations.step_metrics.time.perf_counter", lambda: clock[0])
    model = fluid_hf.patch_model(tiny_model("qwen3_moe"))
    metrics, rates, ids = StepMetrics(model, model.fluid, peak=None), [], batch(0, 2)
    for step in (1, 2, 3):
        metrics.begin_step()
        model(input_ids=ids)
        clock[0] += 90.0 if step == 1 else 4.0  # kernels are compiled
        metrics.end_step()
        if step in logged_at:
            rates.append(metrics.collect()["fluid/tokens_per_second"])
    metrics.close()
    assert rates == [pytest.approx(ids.numel() / each) for each in seconds]


def test_what_lies_between_two_steps_counts_but_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also evaluation after an epoch's last step, before the epoch's log; and the loader, however often is logged."""
    clock = [100.0]
    monkeypatch.setattr("fluid_hf.integrations.step_metrics.time.perf_counter", lambda: clock[0])
    model = fluid_hf.patch_model(tiny_model("qwen3_moe"))
    for logged_at in ((1, 2, 3, 4), (1, 3, 4), (1, 4)):
        metrics, rates = StepMetrics(model, model.fluid, peak=None), []
        for step in (1, 2, 3, 4):
            clock[0] += 3.0  # the loader
            metrics.begin_step()
            model(input_ids=batch(0, 9 if step == 1 else 2))
            clock[0] += 5.0
            metrics.end_step()
            for _ in range(2):
                clock[0] += 1000.0
                metrics.interrupt()
            if step in logged_at:
                rates.append(metrics.collect()["fluid/tokens_per_second"])
                clock[0] += 1000.0
                metrics.interrupt()
        metrics.close()
        assert rates == [pytest.approx(9 * 12 / 5.0), *[pytest.approx(2 * 12 / 8.0)] * (len(logged_at) - 1)]


def test_a_long_first_step_counts_in_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do its tokens: `group_by_length` begins with the longest batch."""
    clock = [100.0]
    monkeypatch.setattr("fluid_hf.integrations.step_metrics.time.perf_counter", lambda: clock[0])
    model = fluid_hf.patch_model(tiny_model("qwen3_moe"))
    metrics = StepMetrics(model, model.fluid, peak=None)
    for rows in (9, 2, 2):
        metrics.begin_step()
        model(input_ids=batch(0, rows))
        clock[0] += 10.0 * rows
        metrics.end_step()
    found = metrics.collect()
    metrics.close()
    assert found["fluid/tokens"] == 13 * 12 and found["fluid/tokens_per_second"] == pytest.approx(1.2)


@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds", "first", "first embeddings"])
def test_tokens_are_counted_however_they_are_given(given: str) -> None:
    model = fluid_hf.patch_model(tiny_model("qwen3_moe")).train()
    metrics, ids = StepMetrics(model, model.fluid, peak=None), batch(0, 2)
    embedded = model.get_input_embeddings()(ids)
    args, kwargs = {
        "input_ids": ((), {"input_ids": ids, "inputs_embeds": None}),
        "inputs_embeds": ((), {"input_ids": None, "inputs_embeds": embedded}),
        "first": ((ids,), {"inputs_embeds": None}),
        "first embeddings": ((None,), {"inputs_embeds": embedded}),
    }[given]
    model(*args, **kwargs)
    assert metrics.collect()["fluid/tokens"] == ids.numel()
    metrics.close()
