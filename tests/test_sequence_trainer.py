"""Sequence parallelism through HF Trainer's ParallelismConfig, and with DeepSpeed engines, against one process."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import ParallelismConfig
from distributed import RankPool, rank_pool
from families import batch, tiny_model
from test_deepspeed import Curve, assert_near, settings
from test_trainer import assert_equal, curve, train

import fluid_hf
from fluid_hf import ConfigError, FluidConfig
from fluid_hf.integrations.accelerate import FilledBatches, check_loss, check_ranks, fill_batches, name_attention

pool4 = rank_pool(4)


EPOCHS = {"epochs": 3, "samples": 8}
STREAM = {"stream": True, "samples": 8, "steps": 6}
NOISE = {"neftune": 5.0, "steps": 2}
MIXTRAL = {"family": "mixtral", "steps": 3}  # its config has no size of a head
AUXILIARY = {"model": {"output_router_logits": True, "router_aux_loss_coef": 0.5}}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("one")
    runs: list[dict[str, Any]] = [
        {"name": "plain", "stage": 1, "positions": True, "predict": 5, "save_model": str(folder / "saved")},
        {"name": "odd", "stage": 1, "length": 11, "steps": 4, **AUXILIARY},
        {"name": "epochs", "stage": 1, "positions": True, **EPOCHS, "save_steps": 3},
        {"name": "accumulated", "stage": 1, "positions": True, **EPOCHS, "accumulation": 2},
        {"name": "noise", "stage": 1, "positions": True, **NOISE},
        {"name": "stream", "stage": 1, "positions": True, **STREAM},
        {"name": "mixtral", "stage": 1, "positions": True, **MIXTRAL},
    ]
    runs[3] |= {"resume": str(folder / "epochs" / "checkpoint-3")}
    return train(runs, folder, nproc=1)


def runs_of_epochs(base: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Three epochs, and the same resumed within one, also with other settings than those of the checkpoint."""
    whole = {**base, "name": "epochs", "stage": 1, "fluid": {"ep_size": 2}, **EPOCHS, "output": str(folder)}
    within = str(folder / "checkpoint-6")  # of the second epoch's four steps two are done
    # With two micro-batches a step, three steps reach into the second epoch.
    later = {"accumulation": 2, "resume": str(folder / "checkpoint-3")}
    return [
        {**whole, "save_steps": 3},
        {**whole, "name": "within an epoch", "resume": within},
        {**whole, "name": "accumulated", **later},
    ]


def check_epochs(found: dict[str, list[dict[str, Any]]], expected: dict[str, list[dict[str, Any]]]) -> None:
    for result in found["epochs"]:
        assert_equal(curve(result), curve(expected["epochs"][0]))
        assert len(curve(result)) == 3 * 4
    for result in found["within an epoch"]:
        assert_equal(curve(result)[6:], curve(expected["epochs"][0])[6:])
    for result in found["accumulated"]:
        assert_equal(curve(result)[3:], curve(expected["accumulated"][0])[3:])
        assert len(curve(result)) == 3 + 3


def test_trainer_at_every_stage(expected: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    """Whole Trainer runs: its loader, its loss, clipping at 1.0, evaluation on whole sequences."""
    base = {"positions": True, "parallelism_sp_size": 2, "json_optimizer": False}
    runs: list[dict[str, Any]] = [
        {**base, "name": f"{stage}", "stage": stage, "fluid": {"ep_size": 1 if stage == 2 else 2}} for stage in range(4)
    ]
    runs[2] |= {"checkpointing": True, "predict": 5, "save_model": str(tmp_path / "saved")}
    runs[3] |= {"attention_name": "sdpa"}
    # 11 tokens on 2 ranks, and no positions: both are made up for before the batch is cut.
    odd = {"stage": 3, "fluid": {"ep_size": 2}, "length": 11, "steps": 4, "positions": False}
    runs.append({**base, "name": "odd", **odd, **AUXILIARY})
    runs[1] |= {"save_steps": 5, "output": str(tmp_path / "run")}
    runs.append({**runs[1], "name": "resumed", "resume": str(tmp_path / "run" / "checkpoint-5")})
    runs.append({**base, "name": "differ", "stage": 1, "fluid": {"ep_size": 1, "sp_size": 1}})
    runs.append({**base, "name": "alone", "stage": 1, "fluid": {"sp_size": 2}, "parallelism_sp_size": 0})
    runs += runs_of_epochs(base, tmp_path / "epochs")
    runs.append({**base, "name": "noise", "stage": 1, "fluid": {"ep_size": 1}, **NOISE})
    runs.append({**base, "name": "stream", "stage": 1, "fluid": {"ep_size": 2}, **STREAM})
    runs.append({**base, "name": "mixtral", "stage": 1, "fluid": {"ep_size": 2}, **MIXTRAL})
    runs[-1] |= {"save_model": str(tmp_path / "mixtral")}
    runs.append({**base, "name": "smooth", "stage": 1, "fluid": {"ep_size": 1}, "label_smoothing": 0.1})
    launched = {"parallelism_sp_size": 0, "launcher_sp_size": 2, "fluid": {"ep_size": 2}}
    runs.append({**base, "name": "launched", "stage": 1, **launched})
    found = train(runs, tmp_path)
    for name in ("0", "1", "2", "3", "launched"):
        for result in found[name]:
            assert_equal(curve(result), curve(expected["plain"][0]))
            assert len(curve(result)) == 10
    for result in found["resumed"]:
        assert_equal(curve(result)[5:], curve(expected["plain"][0])[5:])
    for result in found["odd"]:
        assert_equal(curve(result), curve(expected["odd"][0]))
        assert len(curve(result)) == 4
    assert found["2"][0]["eval_loss"] == pytest.approx(expected["plain"][0]["eval_loss"], rel=1e-4)
    assert len(found["2"][0]["predicted"]) == 1 + 5 * 4
    assert found["2"][0]["predicted"][1:] == pytest.approx(expected["plain"][0]["predicted"][1:], rel=1e-3, abs=1e-4)
    check_epochs(found, expected)
    for result in found["noise"]:  # each rank's piece is shorter than the sequence
        assert result["noise"] == pytest.approx(expected["noise"][0]["noise"]) and len(result["noise"]) == 2
    for name in ("stream", "mixtral"):
        for result in found[name]:
            assert_equal(curve(result), curve(expected[name][0]))
    saved = json.loads((tmp_path / "mixtral" / "config.json").read_text(encoding="utf-8"))
    assert saved["head_dim"] is None
    for name in ("differ", "alone", "smooth"):
        assert [result["error"] for result in found[name]] == ["ConfigError"] * 2, found[name]
    assert "label_smoothing_factor (0.1) must be 0 with sp_size (2) over 1" in found["smooth"][0]["message"]
    assert "sp_size (1) of the fluid settings must equal sp_size (2)" in found["differ"][0]["message"]


def test_as_many_groups_as_parallelism_config_says() -> None:
    """Else accelerate computes another batch size than DeepSpeed."""
    check_ranks(None, 4)
    check_ranks(ParallelismConfig(sp_size=2, dp_shard_size=2), 4)
    check_ranks(ParallelismConfig(sp_size=2, dp_replicate_size=2), 4)
    with pytest.raises(ConfigError, match=r"dp_shard_size \(1\).* must be 2 with sp_size \(2\) on 4 ranks"):
        check_ranks(ParallelismConfig(sp_size=2), 4)


def test_attention_is_named_for_the_accelerator_alone() -> None:
    """The user's own object may serve a second Trainer, whose model has another attention."""
    given = ParallelismConfig(sp_size=2, sp_backend="deepspeed")
    accelerator = SimpleNamespace(state=SimpleNamespace(parallelism_config=given))
    models = [tiny_model("qwen3_moe") for _ in range(2)]
    for model, name in zip(models, ("sdpa", "flash_attention_2"), strict=True):
        model.config._attn_implementation_internal = name
        for config in (given, accelerator.state.parallelism_config):  # of the arguments, or of `accelerate launch`
            name_attention(config, accelerator, model)
            named = accelerator.state.parallelism_config
            assert named.sp_handler.sp_attn_implementation == name and named.sp_size == 2
    assert given.sp_handler.sp_attn_implementation is None
    own = copy.deepcopy(given)
    own.sp_handler.sp_attn_implementation = "sdpa"
    accelerator.state.parallelism_config = own
    name_attention(own, accelerator, models[1])
    assert accelerator.state.parallelism_config is own and own.sp_handler.sp_attn_implementation == "sdpa"
    for config, built in ((None, accelerator), (given, None), (ParallelismConfig(), accelerator)):
        name_attention(config, built, models[0])
    assert accelerator.state.parallelism_config is own


def test_several_groups_on_cpus_are_refused_by_name() -> None:
    """torch's gloo cannot scatter the gradient of the Trainer's loss in a group without rank 0."""
    arguments = {"label_smoothing_factor": 0.0}
    cpu, cuda = (SimpleNamespace(device=torch.device(name), **arguments) for name in ("cpu", "cuda"))
    for sp_size, world in ((1, 4), (4, 4)):
        check_loss(sp_size, world, cpu)
    check_loss(2, 4, cuda)
    with pytest.raises(ConfigError, match=r"sp_size \(2\) must be 4, the number of ranks, or 1 on CPUs"):
        check_loss(2, 4, cpu)


def test_a_loss_function_that_the_trainer_would_not_call_is_refused_by_name() -> None:
    """transformers computes the loss of sequences that ranks share by itself, and leaves it out without a word."""
    args = SimpleNamespace(device=torch.device("cuda"), label_smoothing_factor=0.0)

    def own_loss(*given: Any) -> None: ...

    check_loss(1, 4, args, own_loss)
    with pytest.raises(ConfigError, match=r"compute_loss_func \(own_loss\) must be None with sp_size \(2\) over 1"):
        check_loss(2, 4, args, own_loss)


def test_collators_for_flash_attention() -> None:
    """TRL's packing adds tensors that do not run along the sequence; positions say the same."""
    ids = torch.arange(1, 6)[None]
    lengths = torch.tensor([0, 3, 5], dtype=torch.int32)
    packed = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 3, "max_length_k": 3}
    packed |= {"seq_idx": torch.tensor([[0, 0, 0, 1, 1]])}
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    batches = FilledBatches([], sp_size=2, pad_token_id=0)
    filled = batches.fill({"input_ids": ids, "labels": ids, "position_ids": positions, **packed})
    assert {name: value.tolist() for name, value in filled.items()} == {
        "input_ids": [[1, 2, 3, 4, 5, 0]],
        "labels": [[1, 2, 3, 4, 5, -100]],
        "position_ids": [[0, 1, 2, 0, 1, 2]],
    }
    with pytest.raises(ConfigError, match="position_ids must be given beside cu_seq_lens_q"):
        batches.fill({"input_ids": ids, "labels": ids, **packed})


def run_cut(rank: int, world: int, shapes: list[list[tuple[int, int]]]) -> list[dict[str, Any]]:
    """This rank's pieces of what each rank's loader gives, batches of these shapes."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPDataLoaderAdapter

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # saves a minute of compilation
    deepspeed.init_distributed("gloo")
    batches = [{"input_ids": torch.full(shape, 10 * rank + step)} for step, shape in enumerate(shapes[rank], 1)]
    given = [{**one, "labels": one["input_ids"].clone()} for one in batches]
    adapter = UlyssesSPDataLoaderAdapter(given, rank, torch.distributed.group.WORLD, world, torch.device("cpu"))
    fill_batches(adapter, world, SimpleNamespace())
    return [{name: value.tolist() for name, value in piece.items()} for piece in adapter]


def test_ranks_bring_batches_of_other_lengths(pool4: RankPool) -> None:
    """As collators that pad to the longest make them; DeepSpeed's adapter gathers them, which gloo does not."""
    lengths = [[3, 2], [5, 1], [9, 4], [1, 3]]
    pieces = pool4.run(run_cut, [[(2, length) for length in own] for own in lengths], timeout=60)
    for step, multiple in enumerate((12, 4)):
        for owner in range(4):
            found = [own[4 * step + owner] for own in pieces]
            ids = [sum((piece["input_ids"][row] for piece in found), []) for row in range(2)]
            length = lengths[owner][step]
            assert ids == [[10 * owner + step + 1] * length + [0] * (multiple - length)] * 2
            assert sum((piece["position_ids"][0] for piece in found), []) == list(range(multiple))
            labels = sum((piece["shift_labels"][0] for piece in found), [])
            assert sum(label != -100 for label in labels) == length - 1


def test_batches_without_labels_are_refused_by_name() -> None:
    """As of trainers that make them from pairs, such as TRL's for DPO."""
    ids = torch.arange(1, 6)[None]
    batches = FilledBatches([{"input_ids": ids, "completion_mask": ids}], sp_size=2, pad_token_id=0)
    with pytest.raises(ConfigError, match=r"labels must be in .* sp_size \(2\) over 1: they have input_ids, compl"):
        next(iter(batches))


@pytest.mark.parametrize(("last", "said"), [([(1, 4)], "2 rows, 2 rows, 2 rows, 1 rows"), ([], "no more batches")])
def test_ranks_bring_equally_many_rows(pool4: RankPool, last: list[tuple[int, int]], said: str) -> None:
    shapes = [[(2, 4), (2, 4)] for _ in range(3)] + [[(2, 4), *last]]
    for message in pool4.expect("RankMismatchError", run_cut, shapes, timeout=60):
        assert said in message and "even_batches" in message


def run_engine(rank: int, world: int, stage: int, sp_size: int, ep_size: int) -> Curve:
    """Losses and gradient norms of 4 clipped steps; groups of `sp_size` ranks share a batch."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # saves a minute of compilation
    model = fluid_hf.patch_model(tiny_model("qwen3_moe"), FluidConfig(ep_size=ep_size, sp_size=sp_size, waves=2))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    # The batch size counts sequences: sp_size ranks share each.
    config = {**settings(stage), "train_batch_size": world // sp_size}
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    curve = []
    for step in range(4):
        ids = batch(rank // sp_size, 1, step=step)
        shard = model.fluid.shard_batch({"input_ids": ids, "labels": ids})
        loss = model.fluid.sequence_loss(engine(**shard).logits, shard["shift_labels"])
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        curve.append((float(total) / world, float(engine.get_global_grad_norm() or 0.0)))
    model.fluid.finish_batch()
    engine.destroy()
    return curve


def one_process(groups: int) -> Curve:
    model = tiny_model("qwen3_moe")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    curve = []
    for step in range(4):
        batches = [batch(group, 1, step=step) for group in range(groups)]
        loss = torch.stack([model(input_ids=ids, labels=ids).loss for ids in batches]).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings(0)["gradient_clipping"])
        optimizer.step()
        curve.append((float(loss), float(norm)))
    return curve


@pytest.mark.parametrize(
    ("stage", "sp_size", "ep_size"), [(0, 2, 2), (1, 2, 2), (2, 2, 2), (3, 2, 2), (2, 2, 4), (3, 4, 2)]
)
def test_engine_at_every_stage(pool4: RankPool, stage: int, sp_size: int, ep_size: int) -> None:
    expected = one_process(4 // sp_size)
    for found in pool4.run(run_engine, stage, sp_size, ep_size):
        assert_near(found, expected)
