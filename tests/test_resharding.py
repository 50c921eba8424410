"""Training goes on at another layout: DeepSpeed checkpoints, universal ones, AutoEP's, and plain Hugging Face files."""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import families
import moe_families
import pytest
import torch
from distributed import RankError, RankPool, fresh_ranks, rank_pool
from families import FAMILIES, batch, tiny_model
from safetensors.torch import load_file

import fluid_hf
from fluid_hf import FluidConfig
from fluid_hf.integrations.optimizer_groups import fit_schedules
from fluid_hf.integrations.universal import convert_universal

pool1 = rank_pool(1)
pool2 = rank_pool(2)
pool4 = rank_pool(4)

ROWS = 4  # of the global batch, the same for every number of ranks


def start_engine(model: Any, stage: int, world: int, **checkpoint: Any) -> Any:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # saves a minute of compilation
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) > 1]
    others = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    settings = {
        "train_micro_batch_size_per_gpu": ROWS // world,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "checkpoint": checkpoint,
    }
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=settings)[0]


def train(engine: Any, rank: int, world: int, steps: range) -> list[float]:
    losses, share = [], ROWS // world
    for step in steps:
        ids = batch(0, ROWS, step=step)[rank * share : (rank + 1) * share]
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        losses.append(float(total) / world)
    return losses


def run_and_save(
    rank: int, world: int, folder: str, stage: int, ep_size: int, family: str, frozen: bool = False
) -> list[float]:
    """Losses of steps 5 to 8, after a checkpoint and the plain files of step 4."""
    build = tiny_model if family in FAMILIES else moe_families.tiny_model
    model = fluid_hf.patch_model(build(family), FluidConfig(ep_size=ep_size))
    model.get_input_embeddings().requires_grad_(not frozen)
    engine = start_engine(model, stage, world)
    train(engine, rank, world, range(4))
    engine.save_checkpoint(folder)
    model.save_pretrained(f"{folder}/plain")
    losses = train(engine, rank, world, range(4, 8))
    engine.destroy()
    return losses


def run_resume(
    rank: int, world: int, folder: str, stage: int, ep_size: int, family: str, universal: bool = True
) -> list[float]:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    model = fluid_hf.patch_model(tiny_model(family, seed=9), FluidConfig(ep_size=ep_size))
    engine = start_engine(model, stage, world, load_universal=universal)
    engine.load_checkpoint(folder)
    losses = train(engine, rank, world, range(4, 8))
    engine.save_checkpoint(f"{folder}/again-{world}-{ep_size}")
    engine.destroy()
    return losses


def to_universal(folder: Path, tag: str = "global_step4") -> None:
    from deepspeed.checkpoint import ds_to_universal

    options = Namespace(
        input_folder=str(folder / tag),
        output_folder=str(folder / f"{tag}_universal"),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    ds_to_universal.main(options)


def assert_near(found: list[float], expected: list[float]) -> None:
    assert found == pytest.approx(expected, rel=1e-5) and len(found) == 4


@pytest.mark.parametrize(("stage", "family"), [(1, "qwen3_moe"), (2, "qwen2_moe"), (3, "mixtral")])
def test_resume_at_other_layouts(
    pool1: RankPool, pool2: RankPool, pool4: RankPool, tmp_path: Path, stage: int, family: str
) -> None:
    folder = str(tmp_path)
    expected = pool2.run(run_and_save, folder, stage, 2, family)[0]
    same = pool2.run(run_resume, folder, stage, 2, family, universal=False)[0]
    assert same == expected, "the same layout goes on bit-equal"
    assert (
        "python -m deepspeed.checkpoint.ds_to_universal"
        in (pool2.expect("CheckpointError", run_resume, folder, stage, 1, family, universal=False)[0])
    )
    assert (
        "world_size (4) must equal the world_size (2)"
        in (pool4.expect("CheckpointError", run_resume, folder, stage, 2, family, universal=False)[0])
    )
    to_universal(tmp_path)
    for pool, ep_sizes in ((pool2, (2, 1)), (pool4, (4,)), (pool1, (1,))):
        for ep_size in ep_sizes:
            assert_near(pool.run(run_resume, folder, stage, ep_size, family)[0], expected)


class Wrapper(torch.optim.Optimizer):
    """As accelerate's around an engine's optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups


def run_scheduled(rank: int, world: int, folder: str, ep_size: int, given: bool, steps: range) -> list[list[float]]:
    """Learning rates of all groups after each step; from the second time on, resumed from the universal checkpoint.

    Args:
        given: the engine gets a maker of the schedule, as the Trainer gives it with an optimizer in the JSON; else, as
            the Trainer does, it is built on what wraps the engine's optimizer, and its state is a file of its own.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    model = fluid_hf.patch_model(tiny_model("qwen3_moe"), FluidConfig(ep_size=ep_size))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "lr": 1e-2}, {"params": others, "lr": 1e-2}])

    def make(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    settings = {
        "train_micro_batch_size_per_gpu": ROWS // world,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": steps.start > 0},
    }
    maker = make if given else None
    engine = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=maker, config=settings)[0]
    own = None if given else make(Wrapper(engine.optimizer))
    if steps.start:
        engine.load_checkpoint(folder)
        if own is not None:
            own.load_state_dict(torch.load(f"{folder}/schedule.pt", weights_only=True))
    rates = []
    for step in steps:
        train(engine, rank, world, range(step, step + 1))
        if own is not None:
            own.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
    if not steps.start:
        engine.save_checkpoint(folder)
        if own is not None and rank == 0:
            torch.save(own.state_dict(), f"{folder}/schedule.pt")
    schedule = own if own is not None else engine.lr_scheduler
    assert type(schedule) is torch.optim.lr_scheduler.LambdaLR and len(schedule.base_lrs) == len(rates[0])
    engine.destroy()
    return rates


@pytest.mark.parametrize("given", [True, False], ids=["engine's schedule", "own schedule"])
@pytest.mark.parametrize("ep_sizes", [(2, 1), (1, 2)], ids=str)
def test_schedule_resumes_with_other_groups(
    pool2: RankPool, tmp_path: Path, ep_sizes: tuple[int, int], given: bool
) -> None:
    """Split experts have optimizer groups of their own, and a schedule holds a learning rate for each group."""
    before = pool2.run(run_scheduled, str(tmp_path), ep_sizes[0], given, range(4))[0]
    to_universal(tmp_path)
    after = pool2.run(run_scheduled, str(tmp_path), ep_sizes[1], given, range(4, 6))[0]
    assert len(before[0]) != len(after[0]), "the case at hand"
    for step, rates in enumerate(before + after):
        assert rates == pytest.approx([1e-2 / (2 + step)] * len(rates)), step


def test_schedule_with_several_rates_keeps_its_own() -> None:
    def schedule_of(*rates: float) -> torch.optim.lr_scheduler.LambdaLR:
        groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates]
        return torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(groups), [lambda step: 1 / (1 + step)] * len(rates))

    saved, schedule = schedule_of(3.0, 4.0), schedule_of(1.0, 2.0, 2.0)
    saved.step()
    fit_schedules(schedule.optimizer)
    schedule.load_state_dict(saved.state_dict())
    assert schedule.base_lrs == schedule.get_last_lr() == [1.0, 2.0, 2.0] and schedule.last_epoch == 1
    assert type(schedule) is torch.optim.lr_scheduler.LambdaLR


@pytest.mark.parametrize("stage", [1, 3])
def test_resume_from_unsplit_experts(pool2: RankPool, tmp_path: Path, stage: int) -> None:
    expected = pool2.run(run_and_save, str(tmp_path), stage, 1, "qwen3_moe")[0]
    to_universal(tmp_path)
    assert_near(pool2.run(run_resume, str(tmp_path), stage, 2, "qwen3_moe")[0], expected)


def test_resume_from_autoep(pool2: RankPool, tmp_path: Path) -> None:
    """AutoEP replaces the block: its experts are one level higher, its router and shared expert have other names."""
    expected = pool2.run(run_and_save, str(tmp_path), 1, 2, "qwen2_moe")[0]
    to_universal(tmp_path)
    zero = tmp_path / "global_step4_universal" / "zero"
    for path in list(zero.iterdir()):
        name = path.name.replace(".mlp.experts.experts.", ".mlp.experts.").replace(".mlp.gate.", ".mlp.router.gate.")
        name = name.replace(".shared_expert.", ".shared_experts.").replace(
            ".shared_expert_gate.", ".shared_experts_gate."
        )
        path.rename(zero / name)
    assert (zero / "model.layers.0.mlp.experts.w1").is_dir()
    for ep_size in (2, 1):
        assert_near(pool2.run(run_resume, str(tmp_path), 1, ep_size, "qwen2_moe")[0], expected)


def run_die_while_saving(rank: int, world: int, folder: str) -> None:
    """Both ranks are killed in the middle of saving over the checkpoint of step 4."""
    model = fluid_hf.patch_model(tiny_model("mixtral", seed=9), FluidConfig(ep_size=2))
    engine = start_engine(model, 1, world)
    engine.load_checkpoint(folder)
    train(engine, rank, world, range(4, 5))
    save, written = engine.checkpoint_engine.save, 0

    def die(*args: Any, **kwargs: Any) -> Any:
        nonlocal written
        written += 1
        if written == 2:
            os._exit(9)
        return save(*args, **kwargs)

    engine.checkpoint_engine.save = die
    engine.save_checkpoint(folder, tag="global_step4")


def test_killed_while_saving(pool2: RankPool, tmp_path: Path) -> None:
    folder = str(tmp_path)
    expected = pool2.run(run_and_save, folder, 1, 2, "mixtral")[0]
    assert (tmp_path / "latest").read_text() == "global_step4" and not list(tmp_path.glob("*.incomplete"))
    with pytest.raises(RankError):
        pool2.run(run_die_while_saving, folder)
    assert list(tmp_path.glob("*.incomplete")), "not killed while it saved"
    assert pool2.run(run_resume, folder, 1, 2, "mixtral", universal=False)[0] == expected


def run_die_between_renames(rank: int, world: int, folder: str) -> None:
    """Both ranks are killed when the old checkpoint has given up its name and the new one has not taken it."""
    model = fluid_hf.patch_model(tiny_model("mixtral", seed=9), FluidConfig(ep_size=2))
    engine = start_engine(model, 1, world)
    engine.load_checkpoint(folder)
    rename = os.rename

    def die(source: Any, target: Any) -> None:
        rename(source, target)
        if str(target).endswith(".replaced"):
            os._exit(9)

    os.rename = die
    engine.save_checkpoint(folder, tag="global_step4")


def test_killed_between_renames(pool2: RankPool, tmp_path: Path) -> None:
    folder = str(tmp_path)
    expected = pool2.run(run_and_save, folder, 1, 2, "mixtral")[0]
    with pytest.raises(RankError):
        pool2.run(run_die_between_renames, folder)
    assert (tmp_path / "global_step4.replaced").is_dir() and not (tmp_path / "global_step4").exists()
    assert pool2.run(run_resume, folder, 1, 2, "mixtral", universal=False)[0] == expected
    assert not list(tmp_path.glob("*.replaced"))


def test_universal_checkpoint_with_a_hole(pool2: RankPool, tmp_path: Path) -> None:
    pool2.run(run_and_save, str(tmp_path), 1, 2, "mixtral")
    message = pool2.expect("CheckpointError", run_resume, str(tmp_path), 1, 2, "mixtral")[0]
    assert "latest_universal" in message and "or resume without load_universal" in message
    to_universal(tmp_path)
    shutil.rmtree(tmp_path / "global_step4_universal" / "zero" / "model.norm.weight")
    message = pool2.expect("CheckpointError", run_resume, str(tmp_path), 1, 2, "mixtral")[0]
    assert "tensor (model.norm.weight)" in message and "global_step4_universal" in message
    planted = tmp_path / "global_step4_universal" / "zero" / "lm_head.weight" / "fp32.pt"
    torch.save({"param": os.getcwd}, planted)
    assert "names posix.getcwd" in pool2.expect("CheckpointError", run_resume, str(tmp_path), 1, 2, "mixtral")[0]
    shutil.copy(planted, next((tmp_path / "global_step4").glob("*rank_1*optim_states.pt")))
    found = pool2.expect("CheckpointError", run_resume, str(tmp_path), 1, 2, "mixtral", universal=False)
    assert any("names posix.getcwd" in message for message in found)
    (tmp_path / "latest").write_text("../elsewhere")
    found = pool2.expect("CheckpointError", run_resume, str(tmp_path), 1, 2, "mixtral", universal=False)
    assert all("tag (../elsewhere)" in message for message in found)


def test_a_universal_checkpoint_made_again_is_converted_again(tmp_path: Path) -> None:
    source = tmp_path / "a_universal" / "zero"
    parts = {"w1": (4, 3, 2), "w3": (4, 3, 2), "w2": (4, 2, 3)}
    shapes = {"m.experts.gate_up_proj": (4, 6, 2), "m.experts.down_proj": (4, 2, 3)}

    def convert(value: float, groups: list[dict[str, Any]]) -> tuple[float, int]:
        for name, shape in parts.items() if value else ():
            folder = source / f"m.experts.experts.{name}"
            folder.mkdir(parents=True, exist_ok=True)
            torch.save({"param": torch.full(shape, value), "cat_dim": 0}, folder / "fp32.pt")
            torch.save({"param_groups": [{"lr": value}]}, source / "optimizer_state.pt")
        made = tmp_path / convert_universal(tmp_path, "a_universal", shapes, groups, ep_size=1) / "zero"
        state = torch.load(made / "optimizer_state.pt")
        values = {float(v) for name in shapes for v in torch.load(made / name / "fp32.pt")["param"].unique()}
        assert values == {state["param_groups"][0]["lr"]}
        return values.pop(), len(state["param_groups"])

    assert convert(1.0, [{}]) == (1.0, 1)
    converted = tmp_path / "a_universal_ep1"
    first = converted.stat().st_ino
    assert convert(0.0, [{}]) == (1.0, 1) and converted.stat().st_ino == first  # the same source: as it is
    assert convert(2.0, [{}]) == (2.0, 1)
    assert convert(0.0, [{}, {"moe": True, "name": "experts"}]) == (2.0, 2)
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".incomplete")] == []


def run_round_trip(rank: int, world: int, folder: str, ep_size: int, stages: tuple[int, ...]) -> dict[str, float]:
    """Load by shares, train a step, save; the weights in the files are those of the model, bit for bit."""
    losses = {}
    for stage in stages:
        for family in FAMILIES:
            model = fluid_hf.from_pretrained(f"{folder}/{family}", FluidConfig(ep_size=ep_size))
            engine = start_engine(model, stage, world)
            train(engine, rank, world, range(1))
            out = f"{folder}/{family}-{world}-{ep_size}-{stage}"
            model.save_pretrained(out)
            model.eval()
            with torch.no_grad():
                ids = batch(0, 2)
                losses[out] = float(model(input_ids=ids, labels=ids).loss)
            again = fluid_hf.from_pretrained(out, FluidConfig(ep_size=ep_size))
            with model.fluid.backend.full(model.parameters()):
                held, found = dict(model.named_parameters()), dict(again.named_parameters())
                assert held.keys() == found.keys() and all(torch.equal(held[name], found[name]) for name in held)
            engine.destroy()
    return losses


def test_round_trips(pool2: RankPool, pool4: RankPool, tmp_path: Path) -> None:
    for family in FAMILIES:
        tiny_model(family).save_pretrained(tmp_path / family)
    folder, losses = str(tmp_path), {}
    for pool, ep_size, stages in ((pool2, 2, (1, 2, 3)), (pool2, 1, (1, 3)), (pool4, 4, (2, 3)), (pool4, 2, (1,))):
        losses.update(pool.run(run_round_trip, folder, ep_size, stages)[0])
    assert len(losses) == 8 * len(FAMILIES)
    with fresh_ranks(1) as process:
        (found,) = process.run(families.reloaded_losses, list(losses), batch(0, 2))
    assert found == pytest.approx(losses, rel=1e-6)
    first = load_file(f"{folder}/mixtral-2-2-1/model.safetensors")
    assert not torch.equal(first["lm_head.weight"], load_file(tmp_path / "mixtral/model.safetensors")["lm_head.weight"])
