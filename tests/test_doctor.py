"""`fluid-hf doctor` on several ranks: it says who does not agree, measures every pair, compares the split layer."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from distributed import RankPool, rank_pool

from fluid_hf import cli
from fluid_hf.commands import doctor_ranks
from fluid_hf.commands.doctor_checks import Finding, judge_layer
from fluid_hf.commands.doctor_ranks import PairResult, RankInfo, judge_agreement, judge_pairs, judge_ranks, merge

pool2 = rank_pool(2)


def examined(rank: int, world: int, out: str, changes: dict[str, Any]) -> tuple[int, str]:
    """Exit status and output of one rank; rank 1 describes itself with changes."""
    describe = doctor_ranks._describe

    def other() -> RankInfo:
        info = describe()
        return RankInfo(info.host, info.gpu, {**info.versions, **changes}, info.settings) if rank else info

    printed = io.StringIO()
    with mock.patch.object(doctor_ranks, "_describe", other), contextlib.redirect_stdout(printed):
        status = cli.main(["doctor", "--skip", "packages", "--json", out])
    return status, printed.getvalue()


def test_ranks_are_examined_together(pool2: RankPool, tmp_path: Path) -> None:
    (first, text), (second, silence) = pool2.run(examined, str(tmp_path / "doctor.json"), {})
    assert first == second == 0 and not silence and "2 on 1 node(s): 2" in text
    report = json.loads((tmp_path / "doctor.json").read_text())
    assert list(report) == ["settings", "devices", "memory", "ranks", "links", "layer"]
    assert "right on 2 ranks" in report["layer"][0]["value"]
    ((low, high, speed),) = report["links"][0]["data"]
    assert (low, high) == (0, 1) and speed > 0


def test_ranks_that_differ_are_named(pool2: RankPool, tmp_path: Path) -> None:
    (first, text), (second, _) = pool2.run(examined, str(tmp_path / "doctor.json"), {"torch": "2.0"})
    assert first == second == 1
    assert "2.0 on rank 1" in text and "fix: use the same environment" in text
    assert "links" not in json.loads((tmp_path / "doctor.json").read_text())


def names(findings: list[Finding], *levels: str) -> list[str]:
    return [finding.name for finding in findings if finding.level in (levels or ("error", "warning"))]


def test_places_of_ranks() -> None:
    a, b = (RankInfo(host, gpu) for host, gpu in (("a", "g0"), ("b", "g0")))
    assert names(judge_ranks([a, RankInfo("a", "g1"), b, RankInfo("b", "g1")])) == []
    assert names(judge_ranks([a, b, RankInfo("a", "g1")])) == ["order of ranks"]
    assert names(judge_ranks([a, RankInfo("a", "g1"), b])) == ["ranks per node"]
    assert names(judge_ranks([a, RankInfo("b", "")]), "error") == ["GPUs"]
    (shared,) = (finding for finding in judge_ranks([a, a]) if finding.level == "error")
    assert shared.value == "of ranks 0-1" and "on a as it has GPUs" in shared.fix
    several = RankInfo("a", "g0", {}, {"NCCL_MULTI_RANK_GPU_ENABLE": "1"})
    assert names(judge_ranks([several, several]), "error") == []


def test_settings_and_versions_that_differ() -> None:
    infos = [RankInfo("a", "", {"numpy": "1"}, {"NCCL_ALGO": "Ring"}), RankInfo("a", "", {"numpy": "2"})]
    numpy, algo = judge_agreement([*infos, infos[1]])
    assert numpy.level == "warning" and numpy.value == "1 on rank 0, 2 on ranks 1-2"
    assert algo.value == "Ring on rank 0, not set on ranks 1-2" and "set NCCL_ALGO alike" in algo.fix


def pairs(size: int, slow: dict[tuple[int, int], PairResult]) -> list[list[PairResult]]:
    """Every pair at 400 GB/s but some, as their lower rank found them."""
    others = [[peer for peer in range(size) if peer != rank] for rank in range(size)]
    return [
        [slow.get((rank, peer), PairResult(peer, 400.0)) for peer in found] for rank, found in enumerate(others)
    ]  # fmt: skip


def test_links_that_are_slow_or_broken() -> None:
    hosts = ["a"] * 4
    assert names(judge_pairs(pairs(4, {}), hosts, on_gpu=True)) == []
    found = judge_pairs(pairs(4, {(1, 3): PairResult(3, 12.0), (0, 2): PairResult(2, 150.0)}), hosts, on_gpu=True)
    assert found[0].data is not None and (1, 3, 12.0) in found[0].data and len(found[0].data) == 6
    problems = {finding.name: finding.problem for finding in found[1:]}
    assert problems["ranks 1 and 3"].startswith("slow link (below 20 GB/s)")
    assert problems["ranks 0 and 2"].startswith("less than half of the usual 400 GB/s")
    apart = judge_pairs(pairs(2, {(0, 1): PairResult(1, 12.0)}), ["a", "b"], on_gpu=True)
    assert [finding.name for finding in apart] == ["between nodes"]  # as fast as networks are
    wrong = PairResult(1, 400.0, right=False)
    (broken,) = judge_pairs(pairs(2, {(0, 1): wrong}), ["a"] * 2, on_gpu=True)
    assert broken.level == "error" and broken.value == "wrong bytes arrived"
    (silent,) = judge_pairs(pairs(2, {(0, 1): PairResult(1, error="PeerError: no")}), ["a"] * 2, on_gpu=True)
    assert silent.level == "error" and silent.value == "PeerError: no" and "NCCL_SOCKET_IFNAME" in silent.fix


def test_findings_of_all_ranks_are_told_once() -> None:
    common, own = Finding("ok", "torch", "2.13"), Finding("warning", "NCCL_P2P_DISABLE", "1")
    assert [f.name for f in merge([[common], [common, own], [common, own]])] == [
        "torch",
        "NCCL_P2P_DISABLE (ranks 1-2)",
    ]


@pytest.mark.parametrize(("worst", "error"), [(float("nan"), ""), (1.0, ""), (0.0, "PeerError: gone")])
def test_a_layer_that_is_wrong_is_an_error(worst: float, error: str) -> None:
    (finding,) = judge_layer(worst, error, ranks=2)
    assert finding.level == "error" and finding.fix
