"""Traces become numbers and pictures: arithmetic of intervals, a GPU's trace made by hand, a real one of CPU ranks."""

from __future__ import annotations

import builtins
import dataclasses
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import RankPool, rank_pool
from families import batch, tiny_model
from hypothesis import given
from hypothesis import strategies as st

import fluid_hf
from fluid_hf import ConfigError, FluidConfig, MissingPackageError, TraceError, cli
from fluid_hf.bench.mirror import init_mirror
from fluid_hf.commands import profile
from fluid_hf.overlap.intervals import clip, intersect, length, subtract, union
from fluid_hf.profiling import picture
from fluid_hf.profiling.breakdown import breakdown, breakdown_text
from fluid_hf.profiling.layer_run import TRACED, LayerRun
from fluid_hf.profiling.picture import draw_expert_load, draw_timeline
from fluid_hf.profiling.session import StepTrace, write_report
from fluid_hf.profiling.timeline import PassTimeline, Work, exposed, layer_names, layer_passes, summarize
from fluid_hf.profiling.trace import read_trace
from fluid_hf.ranges import span

pool2 = rank_pool(2)
INTERVALS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=6)


def points(intervals: list[tuple[float, float]]) -> set[int]:
    return {point for start, end in intervals for point in range(int(start), int(end))}


@given(INTERVALS, INTERVALS)
def test_interval_arithmetic_is_that_of_sets(first: list[Any], second: list[Any]) -> None:
    a, b = points(first), points(second)
    assert points(union(first)) == a and length(first) == len(a)
    assert points(intersect(first, second)) == a & b
    assert points(subtract(first, second)) == a - b
    assert points(clip(first, 3, 9)) == a & set(range(3, 9))


def test_no_range_is_made_while_nothing_is_traced() -> None:
    assert span("post", 1, 2) is span("wait", 3)
    with torch.profiler.profile() as profiler:
        with span("post", 1, 2):
            pass
    assert "fluid::post 1 2" in [event.name for event in profiler.events()]


def gpu_trace(path: Path) -> Path:
    """One layer on a GPU. Microseconds: two messages of 30 each way; the second of each is half exposed.

    forward   compute  plan 0-10, own 10-40, wave 0 55-75     link  dispatch 10-40, 40-55 exposed; combine 75-85 exposed
    backward  compute  dgrad own 110-130, wgrad 130-150       link  output grad 100-130; input grad 130-160
    """
    events: list[dict[str, Any]] = []

    def add(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: Any) -> None:
        events.append({"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args})

    def work(name: str, launched: float, start: float, end: float, cat: str = "kernel", tid: int = 1) -> None:
        correlation = len(events) + 1000
        add("cuda_runtime", "cudaLaunchKernel", launched, 0.1, tid, correlation=correlation)
        add(cat, name, start, end - start, 7, correlation=correlation)

    for phase, start, end, tid in (
        ("forward dispatch", 0, 5, 1),
        ("forward experts", 5, 12, 1),
        ("forward combine", 12, 14, 1),
        ("backward combine", 90, 92, 2),
        ("backward experts", 92, 96, 2),
        ("wgrad down", 96, 97, 2),
        ("backward dispatch", 97, 99, 2),
    ):
        add("user_annotation", f"fluid::net.0::{phase}", start, end - start, tid)
        add("gpu_user_annotation", f"fluid::net.0::{phase}", start + 50, end - start, 7)
    for name, start, end, tid in (
        ("post aa 1 4000", 2, 4, 1),
        ("event wait dispatch 0", 7, 7, 1),
        ("post aa 2 5000", 9, 10, 1),
        ("event post combine 0", 10.5, 10.5, 1),
        ("post aa 3 6000", 90.5, 91, 2),
        ("event dgrad own", 93, 93, 2),
        ("post aa 4 7000", 94, 95, 2),
    ):
        add("user_annotation", f"fluid::{name}", start, end - start, tid)
    work("sort", 1, 0, 10)
    work("ncclDevKernel_SendRecv", 3, 10, 55)
    work("gemm", 6, 10, 40)
    work("gemm", 8, 55, 75)
    work("Memcpy DtoH (Device -> Pinned)", 9.5, 75, 85, "gpu_memcpy")
    work("Memcpy PtoP (Device -> Device)", 90.7, 100, 130, "gpu_memcpy", tid=2)
    work("gemm", 92.5, 110, 130, tid=2)
    work("ncclDevKernel_SendRecv", 94.5, 130, 160, tid=2)
    work("gemm", 96.5, 130, 150, tid=2)
    work("sum", 98, 160, 165, tid=2)
    work("ncclDevKernel_AllReduce", 150, 170, 180, tid=2)
    path.write_text(json.dumps({"traceEvents": events}))
    return path


def test_gpu_trace(tmp_path: Path) -> None:
    trace = read_trace(gpu_trace(tmp_path / "t.json"))
    assert trace.on_gpu and layer_names(trace) == ["net.0"]
    assert exposed(trace) == [(40, 55), (75, 85), (100, 110), (150, 160)]
    forward, backward = layer_passes(trace)
    assert [(w.label, w.start, w.end) for w in forward.compute] == [
        ("plan, pack, sum", 0, 10),
        ("own tokens", 10, 40),
        ("wave 0", 55, 75),
    ]
    assert [(w.label, w.start, w.end) for w in forward.communication] == [("dispatch 0", 10, 55), ("combine 0", 75, 85)]
    assert forward.exposed == [(40, 55), (75, 85)]
    assert [w.label for w in backward.compute] == ["own tokens", "wgrad down", "plan, pack, sum"]
    assert [w.label for w in backward.communication] == ["output grad 0", "input grad 0"]
    summary = summarize(trace)
    assert summary["overlap_ratio"] == pytest.approx(1 - 45 / 115, abs=1e-4)
    assert summary["exposed_ms_per_layer"] == pytest.approx(0.045)
    assert summary["bytes_sent"] == 22000
    assert summary["wgrad_in_windows"] == 1.0
    assert summary["other_communication_ms"] == pytest.approx(0.01)
    assert summary["layers"]["net.0"]["forward"]["ms"] == pytest.approx(0.085)


def test_breakdown_of_a_gpu_trace(tmp_path: Path) -> None:
    """180 us: 105 of computing, 70 of them beside messages; 55 of messages alone; 85-100 and 165-170 nothing."""
    found = breakdown(read_trace(gpu_trace(tmp_path / "t.json")), {"gemm": 90.0, "sort": 10.0}, calls=2)
    times = {"ms": 180, "compute_ms": 105, "link_ms": 125, "beside_ms": 70, "exposed_ms": 55, "idle_ms": 20}
    assert {name: found[name] for name in times} == {name: pytest.approx(us / 2e3) for name, us in times.items()}
    waits = {"dispatch 0": 15, "host: own tokens": 15, "output grad 0": 10, "input grad 0": 10, "combine 0": 10}
    assert found["waits"] == {
        n: pytest.approx(us / 2e3) for n, us in (waits | {"collective": 10, "host: end": 5}).items()
    }
    assert found["gaps"][0] == {"at_ms": 0.04, "ms": 0.015, "waited_for": "dispatch 0"}, "of the run, not per call"
    assert found["compute"]["own tokens"] == pytest.approx(0.025)
    assert found["kernels"] == {"gemm": 0.045, "sort": 0.005}
    assert breakdown_text(found).startswith("0.09 ms = compute 0.05 (beside messages 0.04) + messages alone 0.03")


def test_pictures_from_a_trace_made_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = gpu_trace(tmp_path / "before.json")
    trace = tmp_path / "after.json.gz"
    trace.write_bytes(gzip.compress(before.read_bytes()))
    arguments = ["profile", "--from", str(trace), "--out", str(tmp_path / "one" / "picture")]
    assert cli.main([*arguments, "--before", str(before), "--title", "net", "--json", "-"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["before"] == summary["after"] == json.loads((tmp_path / "one/picture.json").read_text())["after"]
    assert (tmp_path / "one/picture.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "one/picture.svg").read_text()
    for text in ("forward, before", "backward, after", "dispatch 0", "communication, exposed", "prefers-color-scheme"):
        assert text in svg, text
    assert "#dc2626" in svg
    assert cli.main([*arguments, "--layer", "net.9"]) == 1
    assert "TraceError: layer (net.9) must be one of those in the trace: net.0" in capsys.readouterr().err


def test_picture_compares_durations(tmp_path: Path) -> None:
    forward, backward = layer_passes(read_trace(gpu_trace(tmp_path / "t.json")))
    faster = dataclasses.replace(forward, duration=0.6 * forward.duration)
    _, svg = draw_timeline([("a", forward), ("b", faster), ("c", backward)], tmp_path / "picture")
    text = svg.read_text()
    assert text.count("(40% less)") == 1 and "more)" not in text


def test_messages_in_flight_together_share_the_lane() -> None:
    works = [
        Work(0.0, 4.0, "dispatch 0"),
        Work(1.0, 5.0, "dispatch 1"),
        Work(4.5, 6.0, "counts"),
        Work(6.0, 9.0, "combine 0"),
    ]
    assert [picture._overlapping(works, work) for work in works] == [(0, 2), (1, 2), (0, 2), (0, 1)]


@pytest.mark.parametrize("offset", [0.0, 0.3, 0.6, 0.9])
def test_a_gap_narrower_than_a_pixel_is_no_line(tmp_path: Path, offset: float) -> None:
    from matplotlib.image import imread

    starts = [1e3 * step + 7.0 * offset for step in range(1, 9)]  # a pixel is 6.7 us wide
    gaps = [(start, start + 0.3) for start in starts] + [(9e3, 9.5e3)]
    timeline = PassTimeline("layer", False, 1e4, [], [Work(0.0, 1e4, "dispatch 0")], gaps)
    png, svg = draw_timeline([("a", timeline)], tmp_path / "picture")
    pixels = imread(png)
    lanes = pixels[: len(pixels) // 2, :, :3]  # without the legend
    red = [int(picture.EXPOSED[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    columns = (abs(lanes - red).max(axis=2) < 0.1).any(axis=0).nonzero()[0]
    assert 60 < len(columns) < 90 and columns[-1] - columns[0] < 90, columns  # the wide one alone
    assert f'path[style*="{picture.EXPOSED}"] {{ shape-rendering: auto }}' in svg.read_text()


class MirrorRun(LayerRun):
    """On one process that plays all ranks, also without a GPU."""

    link = "mirror link"

    def run(self) -> dict[bool, Path]:
        init_mirror(self.ep_size)
        try:
            self._trace(torch.device("cpu"))
        finally:
            torch.distributed.destroy_process_group()
        return {overlap: self.trace_path(overlap) for overlap in self.overlaps}


def test_legend_of_all_kinds_fits() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    labels = [*picture.KINDS, "wave 0", "wgrad up"]
    works = [Work(0.0, 1.0, label) for label in labels]
    figure = picture._matplotlib().Figure(figsize=(11.5, 6), dpi=150)
    picture._legend(figure, [("", PassTimeline("layer", False, 1.0, works, [], []))])
    extent = figure.legends[0].get_window_extent(FigureCanvasAgg(figure).get_renderer())
    assert len(figure.legends[0].get_texts()) == len(picture.KINDS) + 2
    assert extent.x0 >= 0 and extent.x1 <= figure.bbox.x1, extent


def test_layer_is_traced_on_a_mirror_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profile, "LayerRun", MirrorRun)
    out = str(tmp_path / "layer")
    assert cli.main(["profile", "--shape", "tiny", "--tokens", "16", "--waves", "2", "--out", out]) == 0
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"layer.png", "layer.svg", "layer.json", "layer_overlapped.json.gz"}
    told = capsys.readouterr().out
    assert "layer_overlapped.json.gz" in told and told.count(f" {2 * TRACED} passes: communication") == 2
    for name, summary in json.loads((tmp_path / "layer.json").read_text()).items():
        assert summary["layers"]["tiny"]["forward"]["calls"] == summary["layers"]["tiny"]["backward"]["calls"] == TRACED
        assert (summary["wgrad_in_windows"] > 0.5) == (name == "overlapped")
    assert "mirror link" in (tmp_path / "layer.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--before", "a.json"], "--before and --layer must come with --from"),
        (["--ep", "1"], r"--ep \(1\) must be at least 2"),
        (["--ep", "3"], r"--ep \(3\) must be at least 2 and divide the experts of small \("),
    ],
)
def test_profile_refuses_what_it_cannot_run(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        profile.run(cli.build_parser().parse_args(["profile", *arguments]))


def test_profile_asks_for_matplotlib_first_and_gives_numbers_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(profile, "LayerRun", None)  # nothing may run
    out = tmp_path / "picture"
    assert cli.main(["profile", "--shape", "tiny", "--out", str(out)]) == 1
    assert "MissingPackageError: pictures need matplotlib" in capsys.readouterr().err
    arguments = ["profile", "--from", str(gpu_trace(tmp_path / "t.json")), "--out", str(out), "--json", "-"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads(out.with_suffix(".json").read_text())
    assert printed.err.startswith("no picture: pictures need matplotlib") and not list(tmp_path.glob("*.svg"))


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    for text in ("nothing", "{}", "[]", '{"traceEvents": 3}'):
        (tmp_path / "t.json").write_text(text)
        with pytest.raises(TraceError, match="must be a Chrome trace"):
            read_trace(tmp_path / "t.json")
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "missing.json")
    (tmp_path / "t.json").write_text('{"traceEvents": []}')
    with pytest.raises(TraceError, match="must hold ranges that start with 'fluid::', has none"):
        read_trace(tmp_path / "t.json")


def test_numbers_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    _, files = write_report(gpu_trace(tmp_path / "t.json"), tmp_path / "report")
    assert [file.name for file in files] == ["report.json"]
    with pytest.raises(MissingPackageError, match="pip install"):
        draw_expert_load([1], [[1.0, 1.0]], tmp_path / "load")


def trace_step(rank: int, world: int, folder: str, waves: int) -> int:
    model = fluid_hf.patch_model(tiny_model("qwen2_moe"), FluidConfig(ep_size=world, waves=waves))
    ids = batch(rank, 2)
    sent = 0
    for step in range(2):
        trace = StepTrace(Path(folder) / f"{rank}.json")
        if step == 1:
            sent = model.fluid.exchange.bytes_sent
            trace.start()
        model(input_ids=ids, labels=ids).loss.backward()
        model.fluid.finish_batch()
        if step == 1:
            trace.stop()
    fluid_hf.unpatch_model(model)
    return model_bytes(sent, trace)


def model_bytes(before: int, trace: StepTrace) -> int:
    return before if trace.path.is_file() else 0


def test_trace_of_cpu_ranks(pool2: RankPool, tmp_path: Path) -> None:
    sent = pool2.run(trace_step, str(tmp_path), 2)  # bytes of the first step: the second sends the same rows
    for rank in range(2):
        trace = read_trace(tmp_path / f"{rank}.json")
        summary = summarize(trace)
        assert not trace.on_gpu and summary["bytes_sent"] == pytest.approx(sent[rank], rel=0.02)
        assert len(summary["layers"]) == 2 and summary["exposed_ms"] > 0
        assert 0 < summary["overlap_ratio"] < 1
        assert summary["wgrad_in_windows"] > 0.9
        for layer in layer_names(trace):
            forward, backward = layer_passes(trace, layer)
            assert {w.label for w in forward.communication} == {
                "counts",
                "dispatch 0",
                "dispatch 1",
                "combine 0",
                "combine 1",
            }
            assert {w.label for w in backward.communication} == {
                "output grad 0",
                "output grad 1",
                "input grad 0",
                "input grad 1",
            }
            assert {"own tokens", "wave 0", "wave 1"} <= {w.label for w in forward.compute}
            assert {"own tokens", "wave 0", "wave 1", "wgrad down"} <= {w.label for w in backward.compute}
            assert forward.duration > 0 and backward.duration > 0


def trace_long_sequence(rank: int, world: int, folder: str) -> None:
    model = fluid_hf.patch_model(tiny_model("qwen3_moe"), FluidConfig(ep_size=world, sp_size=world))
    trace = StepTrace(Path(folder) / f"sp{rank}.json")
    trace.start()
    piece = model.fluid.shard_batch({"input_ids": batch(0, 2), "labels": batch(0, 2)})
    labels = piece.pop("shift_labels")
    model.fluid.sequence_loss(model(**piece).logits, labels).backward()
    model.fluid.finish_batch()
    trace.stop()
    fluid_hf.unpatch_model(model)


def test_attention_exchanges_are_in_the_trace(pool2: RankPool, tmp_path: Path) -> None:
    pool2.run(trace_long_sequence, str(tmp_path))
    trace = read_trace(tmp_path / "sp0.json")
    summary = summarize(trace)
    assert 0 < summary["attention"]["exposed_ms"] <= summary["attention"]["communication_ms"]
    assert {"heads", "head gradients", "dispatch 0"} <= {work.label for work in trace.communication}
    assert len(summary["layers"]) == 2  # attention is no layer of its own
    assert layer_passes(trace)
