"""`fluid-hf bench model` on two gloo ranks: all variants agree with the plain model, all modes are timed and drawn."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import RankPool, rank_pool

from fluid_hf import cli
from fluid_hf.bench import model_report
from fluid_hf.bench.links import world_sizes
from fluid_hf.bench.model import ModelBench, ModelSlice, start_engine
from fluid_hf.bench.same_routing import RecordedRouting, SameRouting
from fluid_hf.bench.stages import Stages
from fluid_hf.commands.arguments import engine_settings
from fluid_hf.errors import ConfigError, TraceError

pool2 = rank_pool(2)
IN_TURNS = {"row per expert", "serial", "fluid_hf", "fluid_hf, parts unfused", "fluid_hf waves 2"}
OURS = {*IN_TURNS, "fluid_hf wgrad cross_layer"}


def run_bench(rank: int, world: int, options: list[str]) -> tuple[int, str]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        return cli.main(["bench", "model", *options]), printed.getvalue()


def test_all_variants_on_two_ranks(pool2: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model.json"
    options = ["--models", "tiny", "--link", "gloo", "--sequence", "16", "--batch", "1", "--repeats", "2"]
    options += ["--sp", "1", "2", "--waves", "2", "--wgrad", "cross_layer"]
    options += ["--modes", "inference", "forward", "backward", "step"]
    options += ["--trace", str(tmp_path / "pictures"), "--json", str(out)]
    (status, printed), (other_status, other_printed) = pool2.run(run_bench, options)
    assert status == other_status == 0 and other_printed == ""
    for stage in ("build and patch", "fluid_hf: first pass and comparison", "AutoEP: step"):
        assert f"{stage} ..." in printed
    assert "fluid_hf: step, again (2 of 2) ..." in printed and "AutoEP: step, again" not in printed
    timed, _, traced = printed.partition("timelines of")  # what traces a GPU can slow what is launched after it
    assert ": trace ..." in traced and ": trace ..." not in timed
    assert not any(f": {mode} ..." in traced for mode in ("inference", "forward", "backward", "step"))
    cells = json.loads(out.read_text())["cells"]
    assert [cell["sp"] for cell in cells] == [1, 2]
    for cell in cells:
        shared = cell["sp"] > 1
        assert set(cell["variants"]) == {*(IN_TURNS if shared else OURS), "AutoEP", "AllToAllEP"}
        assert len(cell["skipped"]) == shared and all("cross_layer" in why for why in cell["skipped"])
        for name, error in cell["errors"].items():
            assert error <= 1e-5, (name, error)
        for name, times in cell["variants"].items():
            assert set(times) == {"inference", "forward", "backward"} | ({"step"} if name != "AllToAllEP" else set())
            assert all(time["median"] > 0 for time in times.values())
            assert {len(time["turns"]) for time in times.values()} == {2 if name in IN_TURNS else 1}
        assert cell["waves"]["fluid_hf waves 2"] == 2 and cell["waves"]["serial"] == 0
        assert all(len(cell["timeline"][name]["passes"]) == 2 for name in ("serial", "fluid_hf"))
    assert cli.main(["bench", "table", "--json", str(out), "--pictures", str(tmp_path / "again")]) == 0
    table, report = capsys.readouterr().out.strip().split("\n\n")
    assert len(table.splitlines()) == 2 + len(cells) and len(report.splitlines()) == 2 + 2 * len(cells)
    for folder in ("pictures", "again"):
        assert {path.name for path in (tmp_path / folder).glob("*.png")} == {"tiny_2x1.png", "tiny_2x1_sp2.png"}


def test_a_second_model_routes_as_the_first_with_weights_of_its_own() -> None:
    bench = ModelBench(ModelSlice("tiny", 2, 2, 16), torch.device("cpu"), torch.float32)
    first, second = bench.build(), bench.build()
    with torch.no_grad():
        for layer in second.layers:  # type: ignore[union-attr]
            layer.mlp.gate.weight.add_(torch.randn_like(layer.mlp.gate.weight))
        with RecordedRouting() as routing:
            first(**bench.inputs)
        with RecordedRouting() as free:
            own = second(**bench.inputs).last_hidden_state
        with SameRouting(routing.chosen), RecordedRouting() as bound:
            led = second(**bench.inputs).last_hidden_state
    assert [index.shape[0] for index in routing.chosen] == [32, 32]
    assert all(map(torch.equal, routing.chosen, bound.chosen)) and not torch.equal(own, led)
    assert not any(map(torch.equal, routing.chosen, free.chosen))
    bench.make_reference(bench.build())
    assert bench.error(bench.build()) == 0
    assert bench.error(second.train()) > 1e-3, "routers that give other weights are told"


def test_the_traced_pass_is_of_median_length_on_as_many_runs_of_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    def run() -> None:
        runs.append(len(runs))

    def recorded(run: Any) -> tuple[int, dict[str, float]]:
        run()
        run()
        if len(runs) == 4:  # a trace without a layer
            raise TraceError("trace must have a layer.")
        return len(runs), {}

    assert model_report.trace_pass(run, is_first=False) is None
    others, runs = len(runs), []
    monkeypatch.setattr(model_report, "record", recorded)
    monkeypatch.setattr(model_report, "layer_passes", lambda trace: [])
    monkeypatch.setattr(model_report, "summarize", lambda trace: {})
    lengths = {2: 9.0, 4: 1.0, 6: 5.0}
    monkeypatch.setattr(model_report, "breakdown", lambda trace, kernels: {"ms": lengths[trace]})
    found = model_report.trace_pass(run, is_first=True)
    assert found is not None and found["breakdown"]["ms"] == 9.0 and len(runs) == others == 6


def test_stages_are_named_before_they_end(capsys: pytest.CaptureFixture[str]) -> None:
    stages = Stages(torch.device("cpu"), budget=-1.0)
    with stages.stage("first pass") as found:
        assert capsys.readouterr().out.endswith("first pass ...")
        found.append("differs 0")
    assert re.search(r"differs 0  \[\d+\.\d s\]\n$", capsys.readouterr().out)
    assert not stages.time_left() and Stages(torch.device("cpu"), budget=60.0).time_left()
    with pytest.raises(KeyError), stages.stage("second pass"):
        raise KeyError("x")
    assert "KeyError  [" in capsys.readouterr().out


def test_mirror_link_takes_no_training_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "model", "--models", "tiny", "--link", "mirror", "--modes", "step"]) == 1
    assert "link (mirror) must have no step" in capsys.readouterr().err


def test_real_ranks_are_all_in_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert world_sizes("nccl", None) == [4] and world_sizes("gloo", [1, 4]) == [1, 4]
    assert world_sizes("mirror", [8]) == [8] and world_sizes("mirror", None) == [2]
    with pytest.raises(ConfigError, match=r"ep \(2\) must be 1 or the number of ranks \(4\) on nccl"):
        world_sizes("nccl", [2])


def test_steps_take_settings_of_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("deepspeed.initialize", lambda **given: seen.append(given["config"]) or ["engine"])
    bench = ModelBench(ModelSlice("tiny", 1, 1, 8), torch.device("cpu"), torch.float32)
    given = {"zero_optimization": {"overlap_comm": True}, "gradient_clipping": 0.5}
    assert start_engine(bench.build(), bench, given) == "engine"
    assert seen[0]["zero_optimization"] == {"stage": 1, "overlap_comm": True} and seen[0]["gradient_clipping"] == 0.5
    start_engine(bench.build(), bench)
    assert seen[1]["zero_optimization"] == {"stage": 1} and seen[1]["gradient_clipping"] == 1.0


def test_settings_of_deepspeed_are_a_users_json_without_what_the_benchmark_decides(tmp_path: Path) -> None:
    users = {
        "fluid": {"ep_size": 2},
        "optimizer": {"type": "AdamW"},
        "train_batch_size": "auto",
        "bf16": {"a": "auto", "b": 1},
    }
    users["zero_optimization"] = {"stage": 2}
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(users))
    expected = {"bf16": {"b": 1}, "zero_optimization": {"stage": 2}}
    assert engine_settings(str(path)) == engine_settings(json.dumps(users)) == expected
    for text, reason in (
        ("[1]", "No such file"),
        ("{", "must be JSON"),
        ('{"zero_optimization": {"stage": 3}}', "1 or 2"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=reason):
            engine_settings(text)
