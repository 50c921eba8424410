"""`fluid-hf bench layer`: AutoEP as its users have it and with its other setting, and the table of both."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import RankPool, rank_pool

from fluid_hf import cli
from fluid_hf.bench import links
from fluid_hf.bench.layer import LayerBench
from fluid_hf.bench.report import markdown_table
from fluid_hf.commands import bench_layer
from fluid_hf.errors import TraceError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "examples/benchmarks/results"
pool2 = rank_pool(2)


def run_settings(rank: int, world: int) -> dict[str, list[Any]]:
    from deepspeed.module_inject.auto_ep_config import parse_autoep_config

    from fluid_hf.bench.layer import LayerBench
    from fluid_hf.bench.model_variants import PEERS
    from fluid_hf.bench.shapes import SHAPES

    bench = LayerBench(SHAPES["tiny"], world, 8, torch.device("cpu"), dtype=torch.float32, layers=1)
    variants = bench.variants([1])
    layers: dict[str, Any] = {name: variants[name]()[1] for name in ("AutoEP", "AutoEP fused")}
    layers["bench model"] = PEERS["AutoEP"](bench.shape, bench.gate_up, bench.down)[1]
    found = {name: [x.experts.gate_up_impl, x.comm_backend, x.async_split_plan] for name, x in layers.items()}
    plain = parse_autoep_config({"enabled": True})
    return {**found, "defaults": [plain.gate_up_impl, plain.comm_backend, plain.async_split_plan]}


def test_autoep_has_its_defaults_and_in_a_variant_of_its_own_joins_gate_and_up(pool2: RankPool) -> None:
    for found in pool2.run(run_settings):
        assert found["AutoEP"] == found["bench model"] == found["defaults"]
        assert found["AutoEP fused"] == ["fused", *found["defaults"][1:]] != found["defaults"]


def cell(**variants: tuple[float, float]) -> dict[str, Any]:
    times = {name.replace("_", " "): {"forward": f, "both": b} for name, (f, b) in variants.items()}
    limits = {"limit": 1.0, "limit_both": 2.0}
    return {"shape": "tiny", "ep_size": 2, "planned_waves": 1, "limits": limits, "variants": times}


@pytest.mark.parametrize(
    ("peers", "shown", "ratio"),
    [
        ({"AutoEP": (6.0, 12.0), "AutoEP_fused": (5.0, 14.0)}, "5.0 / 12.0", "2.50x / 3.00x"),
        ({"AutoEP": (6.0, 12.0)}, "6.0 / 12.0", "3.00x / 3.00x"),  # all that older files have
        ({"AutoEP_fused": (5.0, 14.0)}, "5.0 / 14.0", "2.50x / 3.50x"),
    ],
)
def test_the_table_shows_the_faster_autoep_of_each_pass(
    peers: dict[str, tuple[float, float]], shown: str, ratio: str
) -> None:
    heads, _, line = markdown_table({"cells": [cell(overlap_1=(2.0, 4.0), **peers)]}).splitlines()
    columns = dict(zip(heads.split(" | "), line.split(" | "), strict=True))
    assert (columns["AutoEP"], columns["over AutoEP"]) == (shown, ratio)


def test_the_readme_has_the_table_of_its_results() -> None:
    report = json.loads((RESULTS / "2026-11-29_layer_h200_mirror.json").read_text(encoding="utf-8"))
    table = markdown_table(report).split("\n\n")[0].splitlines()
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(table) == 2 + len(report["cells"]) and not [line for line in table if line not in text.splitlines()]


def test_what_the_pages_say_of_these_results() -> None:
    """Sizes of the groups, times beside those of a day before, and how far below the limit a forward pass is."""
    found = [json.loads((RESULTS / f"2026-11-{day}_layer_h200_mirror.json").read_text()) for day in (28, 29)]
    before, now = ({(c["shape"], c["ep_size"], c["skew"]): c for c in report["cells"]} for report in found)
    peers = {"transformers": "transformers", "AllToAllEP": "AllToAllEP", "AutoEP fused": "AutoEP"}  # now, and then
    ratios = [
        times[name] / before[key]["variants"][peers[peer]][name]
        for key, its in now.items()
        for peer, times in its["variants"].items()
        if peer in peers and peers[peer] in before.get(key, {"variants": ()})["variants"]
        for name in ("forward", "both")
    ]
    readme, numbers = ((ROOT / name).read_text() for name in ("README.md", "examples/guides/numbers.md"))
    assert f"take {min(ratios):.2f} to {max(ratios):.2f} times as long now as there" in " ".join(numbers.split())
    models = [len({shape for shape, ep, _ in now if ep == size}) for size in (2, 8)]
    assert f"one MoE layer of {models[0]} models at EP 2, {models[1]} of them at EP 8" in readme
    alone = now["qwen1.5-moe-a2.7b", 1, 0.0]
    share = alone["variants"]["fluid_hf"]["forward"] / alone["limits"]["limit"]
    assert share < 1 and f"Qwen1.5-MoE's forward at EP1: {share:.2f} times" in numbers


def test_a_free_port_is_none_that_connections_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = int(given.read_text().split()[0]) if given.exists() else 32768
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", links.free_port()))
        port = taken.getsockname()[1]
        assert 1024 < port < first
        monkeypatch.setattr(links, "PORTS", range(port, port + 100))
        assert port < links.free_port() < port + 100
        monkeypatch.setattr(links.random.SystemRandom, "sample", lambda self, ports, count: [port])
        with pytest.raises(OSError, match="no free port"):
            links.free_port()


def test_nothing_is_timed_after_the_first_trace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What traces a GPU stays in the process, and can make later launches take the host longer."""
    done: list[str] = []

    def noted(name: str, function: Any) -> Any:
        return lambda *args, **kwargs: (done.append(name), function(*args, **kwargs))[1]

    monkeypatch.setattr(LayerBench, "time", noted("time", LayerBench.time))
    monkeypatch.setattr(bench_layer, "record", noted("trace", bench_layer.record))
    out = tmp_path / "layer.json"
    options = ["--shapes", "tiny", "--tokens", "16", "--ep", "1", "2", "--report", "--json", str(out)]
    assert cli.main(["bench", "layer", *options]) == 0
    cells = json.loads(out.read_text(encoding="utf-8"))["cells"]
    assert [sorted(cell["report"]) for cell in cells] == [["fluid_hf"], ["overlap 1", "serial"]]
    assert done == ["time"] * done.count("time") + ["trace"] * 6


def test_a_trace_that_says_nothing_costs_no_times(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(run: Any) -> Any:
        raise TraceError("trace must have a layer.")

    monkeypatch.setattr(bench_layer, "record", fail)
    out = tmp_path / "layer.json"
    options = ["--shapes", "tiny", "--tokens", "16", "--ep", "1", "--report", "--json", str(out)]
    assert cli.main(["bench", "layer", *options]) == 0
    (cell,) = json.loads(out.read_text(encoding="utf-8"))["cells"]
    assert "fluid_hf" in cell["variants"] and not cell["report"]
    assert "no report: trace must have a layer." in capsys.readouterr().out
