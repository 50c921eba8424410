"""Every named error is documented, exported, and reachable by what its documentation says."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import batch, tiny_model
from torch import nn

import fluid_hf
from fluid_hf import FluidConfig, RankMismatchError, cli
from fluid_hf.comm.faults import peer_error
from fluid_hf.commands.errors import error_classes, explain, page
from fluid_hf.control import ControlGroup, check_equal
from fluid_hf.profiling.picture import draw_expert_load
from fluid_hf.profiling.trace import read_trace

PAGE = Path(__file__).resolve().parent.parent / "examples" / "guides" / "errors.md"


def patched() -> Any:
    return fluid_hf.patch_model(tiny_model("qwen3_moe"))


def differing_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ControlGroup, "gather", lambda self, value, what: [value, (None, {"waves": 2})])
    ControlGroup().agree(None, {"waves": 1}, "patch_model")


def test_differing_ranks_are_told_what_differs() -> None:
    layers = {f"layers.{number}.experts": "8 experts" for number in range(8)}
    check_equal([{"timeout_seconds": 600, **layers}, {"timeout_seconds": 600.0, **layers}], "patch_model")
    with pytest.raises(RankMismatchError) as caught:
        check_equal([{"waves": 1, **layers}, {"waves": 1, "layers.0.experts": "8 experts"}], "patch_model")
    assert str(caught.value) == (
        "layers.1.experts (rank 0: 8 experts; rank 1: not there) must be equal on all ranks that call patch_model, "
        "and so must layers.2.experts, layers.3.experts, layers.4.experts and 3 more; pass the same settings and model "
        "everywhere."
    )


def missing_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def late(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("timed out")

    monkeypatch.setattr(torch.distributed, "all_gather_object", late)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    control = ControlGroup.__new__(ControlGroup)
    ControlGroup.__init__(control)
    control._group = object()  # type: ignore[assignment]
    control.gather(1, "save_pretrained")


def silent_peer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    raise peer_error([0, 1], [1], "forward dispatch, round 0, of layer experts", 4.0, "timed out")


def bad_router(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layer = fluid_hf.ExpertParallelExperts(num_experts=4, hidden_size=8, intermediate_size=8)
    layer(torch.randn(1, 8), torch.tensor([[0, 4]]), torch.ones(1, 2))


def changed_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = patched()
    ids = batch(0, 2)
    loss = model(input_ids=ids, labels=ids).loss
    with torch.no_grad():
        next(model.fluid.layers["model.layers.1.mlp.experts"].parameters()).mul_(2)
    loss.backward()


def unreached_gradient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = patched()
    ids = batch(0, 2)
    loss = model(input_ids=ids, labels=ids).loss
    torch.autograd.grad(loss, [model.get_input_embeddings().weight])  # asks for no expert's gradient
    model.fluid.finish_batch()


def no_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    draw_expert_load([1], [[1.0]], tmp_path / "load")


def unwritable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fluid_hf.save_pretrained(patched(), str(tmp_path / "file" / "model"))


WAYS: dict[str, Callable[[pytest.MonkeyPatch, Path], Any]] = {
    "AlreadyPatchedError": lambda m, p: fluid_hf.patch_model(patched(), FluidConfig(ep_size=1, recompute=True)),
    "CheckpointError": unwritable,
    "CollectiveError": missing_rank,
    "ConfigError": lambda m, p: FluidConfig(waves=0),
    "GradientError": changed_weights,
    "MissingPackageError": no_matplotlib,
    "NotPatchedError": lambda m, p: fluid_hf.unpatch_model(nn.Linear(2, 2)),
    "PeerError": silent_peer,
    "RankMismatchError": differing_ranks,
    "RoutingError": bad_router,
    "TraceError": lambda m, p: read_trace(p / "missing.json"),
    "UnsupportedModelError": lambda m, p: fluid_hf.patch_model(nn.Linear(2, 2)),
    "WgradPendingError": unreached_gradient,
}


@pytest.mark.parametrize("name", sorted(error_classes()))
def test_every_error_is_documented_exported_and_reachable(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cause, remedy = explain(name)
    assert len(cause) > 20 and len(remedy) > 20, f"{name} needs a docstring with its cause and `Remedy: ...`"
    assert name in fluid_hf.__all__
    with pytest.raises(error_classes()[name]) as caught:
        WAYS[name](monkeypatch, tmp_path)
    assert type(caught.value).__name__ == name and len(str(caught.value)) > 20


def test_page_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `fluid-hf errors > examples/guides/errors.md`"
    assert cli.main(["errors"]) == 0
    assert capsys.readouterr().out == page()
    assert cli.main(["errors", "TraceError", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["TraceError"]


@pytest.mark.parametrize("given", [None, "model", nn.Linear, object()], ids=["None", "path", "class", "object"])
def test_what_is_no_model_is_named(given: Any, tmp_path: Path) -> None:
    with pytest.raises(
        fluid_hf.UnsupportedModelError, match="is no transformers model .*; patch a model that was built"
    ):
        fluid_hf.patch_model(given)
    for call in (fluid_hf.unpatch_model, lambda model: fluid_hf.save_pretrained(model, tmp_path)):
        with pytest.raises(fluid_hf.NotPatchedError, match="is not patched"):
            call(given)


def test_block_to_register_must_be_a_class() -> None:
    with pytest.raises(fluid_hf.ConfigError, match=r"block \(Linear.*must be a class .*register_block\(type"):
        fluid_hf.register_block(nn.Linear(2, 2))  # type: ignore[arg-type]
