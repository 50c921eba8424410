"""Traces that lack a whole pass, work, or fields of their events: numbers and no picture, or a named error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fluid_hf import TraceError
from fluid_hf.profiling.breakdown import breakdown
from fluid_hf.profiling.session import write_report
from fluid_hf.profiling.timeline import layer_passes
from fluid_hf.profiling.trace import read_trace

FORWARD = ["forward dispatch", "forward experts", "forward combine"]


def host_trace(path: Path, names: list[str], *others: dict[str, Any]) -> Path:
    """Phases of a layer, 10 us each, and what else is given."""
    ranges = [
        {"ph": "X", "cat": "user_annotation", "name": f"fluid::net.0::{name}", "ts": 10 * place, "dur": 10, "tid": 1}
        for place, name in enumerate(names)
    ]
    path.write_text(json.dumps({"traceEvents": [*ranges, *others]}))
    return path


@pytest.mark.parametrize(
    ("names", "other", "message"),
    [
        (
            ["forward attention"],
            {"cat": "cpu_op", "name": "aten::mm", "tid": 1},
            "must have a layer with patched experts",
        ),
        (FORWARD[:1], {"cat": "cpu_op", "name": "aten::mm", "tid": 1}, r"layer \(net.0\) must have run a whole pass"),
        (FORWARD, {"cat": "kernel", "name": "gemm", "tid": 7}, r"layer \(net.0\) must have work in the trace"),
        (FORWARD, {"cat": "cpu_op", "name": "aten::mm"}, r"layer \(net.0\) must have work in the trace"),
        (FORWARD, {"cat": "cpu_op", "tid": 1}, r"layer \(net.0\) must have work in the trace"),
    ],
)
def test_trace_without_a_pass_has_numbers_and_no_picture(
    tmp_path: Path, names: list[str], other: dict[str, Any], message: str
) -> None:
    path = host_trace(tmp_path / "t.json", names, {"ph": "X", "ts": 5, "dur": 3, **other})
    with pytest.raises(TraceError, match=message):
        layer_passes(read_trace(path))
    summary, files = write_report(path, tmp_path / "report")
    assert [file.name for file in files] == ["report.json"]
    assert json.loads(files[0].read_text()) == summary
    with pytest.raises(TraceError):
        write_report(path, tmp_path / "report", layer="net.0")


def test_breakdown_without_work(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="trace must have work"):
        breakdown(read_trace(host_trace(tmp_path / "t.json", FORWARD)), {})


def test_pass_without_work_of_its_own_is_not_the_one_drawn(tmp_path: Path) -> None:
    """Two passes; the kernel of the first has lost its launch."""
    launch = {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 35, "dur": 1, "tid": 1}
    kernel = {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 36, "dur": 8, "tid": 7}
    path = host_trace(
        tmp_path / "t.json", FORWARD * 2, {**launch, "args": {"correlation": 1}}, {**kernel, "args": {"correlation": 1}}
    )
    (forward,) = layer_passes(read_trace(path))
    assert forward.duration == 8 and len(forward.compute) == 1
