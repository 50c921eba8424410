"""deepspeed.initialize and accelerate with an optimizer of the user's own, and models built under zero.Init."""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import ROOT, RankPool, rank_pool, run_script
from families import batch, relative_error, tiny_model
from torch.optim import lr_scheduler

import fluid_hf
from fluid_hf import FluidConfig, cli
from fluid_hf.bench.parity_train import float16_everywhere
from fluid_hf.integrations.optimizer_groups import split_groups

pool2 = rank_pool(2)

Curve = list[tuple[float, float]]


def groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Two groups, with and without weight decay, as the Trainer makes them."""
    decayed = [p for p in model.parameters() if len(getattr(p, "ds_shape", p.shape)) > 1]
    others = [p for p in model.parameters() if len(getattr(p, "ds_shape", p.shape)) <= 1]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def settings(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }


def train_step(engine: Any, rank: int, step: int) -> float:
    """One step of an engine; the sum of the ranks' losses before it."""
    ids = batch(rank, 1, step=step)
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    return float(total)


def train(engine: Any, rank: int) -> Curve:
    return [(train_step(engine, rank, step) / 2, float(engine.get_global_grad_norm() or 0.0)) for step in range(4)]


def run_own_optimizer(rank: int, world: int, stage: int, patched: bool, way: str) -> Curve:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # saves a minute of compilation
    if way == "zero.Init":
        with deepspeed.zero.Init(config_dict_or_path=settings(stage)):
            model = tiny_model("qwen2_moe")
        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            for parameter, source in zip(model.parameters(), tiny_model("qwen2_moe").parameters(), strict=True):
                if rank == 0:
                    parameter.data.copy_(source.data)
    else:
        model = tiny_model("qwen2_moe")
    if patched:
        fluid_hf.patch_model(model, FluidConfig(ep_size=world))
    parameters = groups(model)
    if way == "callable":
        options: dict[str, Any] = {"optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2), "model_parameters": parameters}
    else:
        options = {"optimizer": torch.optim.AdamW(parameters, lr=1e-2)}
    engine, optimizer, *_ = deepspeed.initialize(model=model, config=settings(stage), **options)
    curve = train(engine, rank)
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {0.1, 0.0}, decays
    engine.destroy()
    return curve


@pytest.fixture(scope="module")
def expected(pool2: RankPool) -> Curve:
    curve: Curve = pool2.run(run_own_optimizer, 1, False, "built")[0]
    return curve


def assert_near(found: Curve, expected: Curve) -> None:
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_own_optimizer(pool2: RankPool, expected: Curve, stage: int) -> None:
    for curve in pool2.run(run_own_optimizer, stage, True, "built"):
        assert_near(curve, expected)


def test_optimizer_made_by_a_callable(pool2: RankPool, expected: Curve) -> None:
    for curve in pool2.run(run_own_optimizer, 1, True, "callable"):
        assert_near(curve, expected)


def test_model_built_under_zero_init(pool2: RankPool, expected: Curve) -> None:
    for curve in pool2.run(run_own_optimizer, 3, True, "zero.Init"):
        assert_near(curve, expected)


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, [lambda step: 0.5**step, lambda step: 0.8**step]),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, [1e-2, 2e-2], total_steps=9),
    "warm-up, then cosine": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(optimizer, 5)],
        [2],
    ),
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, min_lr=[1e-4, 2e-4]),
}


def run_schedules(rank: int, world: int) -> None:
    """Learning rates of schedules that were built on the optimizer before its groups were split."""
    model = fluid_hf.patch_model(tiny_model("mixtral"), FluidConfig(ep_size=world))
    other = tiny_model("mixtral")
    for name, build in SCHEDULES.items():
        optimizer, reference = (torch.optim.AdamW(groups(found), lr=1e-2) for found in (model, other))
        schedule, expected = build(optimizer), build(reference)
        split_groups(optimizer)
        assert [len(optimizer.param_groups), len(reference.param_groups)] == [3, 2]
        for step in range(4):
            options = (1.0,) if name == "plateau" else ()
            for stepped, its in ((optimizer, schedule), (reference, expected)):
                stepped.step()
                its.step(*options)
            for group in optimizer.param_groups:
                theirs = reference.param_groups[0 if group["weight_decay"] else 1]
                assert group["lr"] == theirs["lr"], (name, step, group["lr"], theirs["lr"])
    fluid_hf.unpatch_model(model)


def test_schedules_built_before_the_groups_are_split(pool2: RankPool) -> None:
    pool2.run(run_schedules)


def given(way: str, config: dict[str, Any], folder: str) -> dict[str, Any]:
    """The ways in which `deepspeed.initialize` takes its settings."""
    if way == "config":
        return {"config": config}
    path = Path(folder) / "config.json"
    text = json.dumps(config)
    if way == "base64":
        return {"config": base64.urlsafe_b64encode(text.encode()).decode()}
    if way == "path":
        return {"config_params": str(path)}
    return {"args": argparse.Namespace(deepspeed_config=str(path))}


def run_frozen(rank: int, world: int, stage: int, patched: bool, way: str = "config", folder: str = "") -> Curve:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = tiny_model("mixtral")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".experts." not in name)
    if patched:
        fluid_hf.patch_model(model, FluidConfig(ep_size=world))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    options = given(way, settings(stage), folder)
    args = options.get("args")
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, **options)
    assert args is None or args.deepspeed_config, "a caller's own options must stay as they are"
    curve = train(engine, rank)
    engine.destroy()
    return curve


@pytest.mark.parametrize("way", ["args", "path", "base64"])
def test_settings_are_checked_wherever_they_are_given(pool2: RankPool, tmp_path: Path, way: str) -> None:
    file, where = tmp_path / "config.json", str(tmp_path)
    file.write_text(json.dumps(settings(3)).replace("{", "{  # as DeepSpeed reads it, with comments\n", 1))
    assert "use stage 2, or ep_size 1" in pool2.expect("ConfigError", run_frozen, 3, True, way, where)[0]
    if way == "base64":
        return
    file.write_text(json.dumps(settings(2)))
    for curve in pool2.run(run_frozen, 2, True, way, where):
        assert_near(curve, pool2.run(run_frozen, 2, False)[0])
    file.write_text("{")
    assert "cannot be read" in pool2.expect("ConfigError", run_frozen, 2, True, way, where)[0]


def test_frozen_experts(pool2: RankPool) -> None:
    expected = pool2.run(run_frozen, 1, False)[0]
    for stage in (1, 2):
        for curve in pool2.run(run_frozen, stage, True):
            assert_near(curve, expected)
    assert "use stage 2, or ep_size 1" in pool2.expect("ConfigError", run_frozen, 3, True)[0]


def run_save(rank: int, world: int, folder: str) -> None:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # saves a minute of compilation
    model = fluid_hf.patch_model(tiny_model("qwen3_moe"), FluidConfig(ep_size=world))
    optimizer = torch.optim.AdamW(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, config=settings(1), optimizer=optimizer)
    try:
        engine.save_checkpoint(folder, tag="a")
    finally:
        engine.destroy()


def test_every_rank_says_that_a_checkpoint_cannot_be_written(pool2: RankPool, tmp_path: Path) -> None:
    (tmp_path / "a.incomplete").touch()  # found before DeepSpeed's barrier, where the other rank would wait
    for message in pool2.expect("CheckpointError", run_save, str(tmp_path), timeout=60):
        assert f"checkpoint ({tmp_path / 'a'}) cannot be written: " in message and "File exists" in message


def run_overflow(rank: int, world: int, stage: int, scaling: dict[str, Any], where: str) -> list[tuple[float, ...]]:
    """Three steps on one batch, with an infinite gradient on the last rank in the second: loss, sum of weights,
    skipped steps and loss scale of each."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = fluid_hf.patch_model(tiny_model("qwen3_moe").half(), FluidConfig(ep_size=2))
    weights = list(next(iter(model.fluid.layers.values())).split_parameters())
    weight = weights[0] if where == "experts" else model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    bad = False
    weight.register_hook(lambda grad: grad * float("inf") if bad else grad)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = {**settings(stage), "fp16": {"enabled": True, **scaling}}
    found = []
    with float16_everywhere():
        engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
        for step in range(3):
            bad = step == 1 and rank == world - 1
            ids = batch(rank, 1)
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            shards = [getattr(p, "ds_tensor", p).double().abs().sum() for p in model.parameters()]
            scale = float(engine.optimizer.loss_scale)
            found.append((float(loss), float(torch.stack(shards).sum()), float(engine.skipped_steps), scale))
        engine.destroy()
    return found


@pytest.mark.parametrize("scaling", [{"loss_scale": 64}, {"initial_scale_power": 6, "hysteresis": 1}], ids=str)
@pytest.mark.parametrize(("stage", "where"), [(1, "experts"), (2, "experts"), (3, "experts"), (2, "attention")])
def test_an_overflow_on_one_rank_skips_the_step_on_all(
    pool2: RankPool, stage: int, where: str, scaling: dict[str, Any]
) -> None:
    for first, second, third in pool2.run(run_overflow, stage, scaling, where):
        assert [step[2] for step in (first, second, third)] == [0, 1, 1]
        assert second[1] == first[1] != third[1], "weights change in a step that is not skipped, and in no other"
        assert third[0] == second[0] < first[0]
        assert third[3] == second[3] == first[3] / (1 if "loss_scale" in scaling else 2)


def test_loss_scaling_that_deepspeed_leaves_out_is_refused(pool2: RankPool) -> None:
    for text in pool2.expect("ConfigError", run_overflow, 0, {"loss_scale": 64}, "experts"):
        assert "zero_optimization.stage (0) must be 1 or more when fp16.enabled (true)" in text


def run_accelerate(rank: int, world: int, patched: bool) -> list[float]:
    import deepspeed
    from accelerate import Accelerator, DeepSpeedPlugin

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    plugin = DeepSpeedPlugin(hf_ds_config={**settings(2), "gradient_accumulation_steps": 1})
    accelerator = Accelerator(deepspeed_plugin=plugin)
    assert accelerator.distributed_type == "DEEPSPEED"
    model = tiny_model("mixtral")
    if patched:
        fluid_hf.patch_model(model, FluidConfig(ep_size=world))
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
    data = torch.utils.data.DataLoader([{"input_ids": ids, "labels": ids} for ids in batch(0, 8)], batch_size=1)
    schedule = lr_scheduler.LambdaLR(optimizer, lambda step: 0.7**step)
    model, optimizer, data, schedule = accelerator.prepare(model, optimizer, data, schedule)
    losses = []
    for item in data:
        loss = model(**item).loss
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    state = accelerator.get_state_dict(model)
    names = set(tiny_model("mixtral").state_dict())
    expected = names if rank == 0 or not patched else set()
    assert set(state) == expected, set(state) ^ expected
    return losses


def test_accelerate_without_trainer(pool2: RankPool) -> None:
    plain = pool2.run(run_accelerate, False)
    pool2.restart()  # accelerate keeps process-wide state
    patched = pool2.run(run_accelerate, True)
    for ours, theirs in zip(patched, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4) and len(ours) >= 4


def run_ddp(rank: int, world: int) -> None:
    model = fluid_hf.patch_model(tiny_model("mixtral"), FluidConfig(ep_size=world))
    try:
        torch.nn.parallel.DistributedDataParallel(model)
    finally:
        fluid_hf.unpatch_model(model)
        torch.nn.parallel.DistributedDataParallel(model)  # the unpatched model is free to


def test_distributed_data_parallel_is_refused(pool2: RankPool) -> None:
    assert "use DeepSpeed" in pool2.expect("ConfigError", run_ddp)[0]


def run_fsdp(rank: int, world: int, wrapped: str) -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    model = fluid_hf.patch_model(tiny_model("mixtral"), FluidConfig(ep_size=world))
    inputs = {"input_ids": batch(rank, 2), "labels": batch(rank, 2)}
    wanted = model(**inputs).loss
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
    experts = {parameter for layer in model.fluid.layers.values() for parameter in layer.parameters()}
    if wrapped.startswith("FSDP1"):  # with the parameters as they are, and flattened
        policy, host = ModuleWrapPolicy({type(model.model.layers[0])}), torch.device("cpu")
        FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=wrapped == "FSDP1, parameters kept", device_id=host
        )(**inputs)
    for layer in model.model.layers if wrapped == "layers" else ():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=experts if wrapped == "all but experts" else None)
    assert relative_error(model(**inputs).loss, wanted) < 1e-6
    return "the same"


@pytest.mark.parametrize("wrapped", ["model", "layers", "FSDP1, parameters kept", "FSDP1"])
def test_fully_sharded_experts_are_refused(pool2: RankPool, wrapped: str) -> None:
    message = pool2.expect("ConfigError", run_fsdp, wrapped)[0]
    assert "must not be sharded by FSDP" in message and "transformers_ep" in message


def test_fully_sharded_around_experts(pool2: RankPool) -> None:
    assert pool2.run(run_fsdp, "all but experts") == ["the same"] * 2


def test_plain_loop_example(tmp_path: Path) -> None:
    script = ROOT / "examples" / "plain_loop.py"
    arguments = ("--steps", "11", "--output", str(tmp_path / "out"))
    printed = run_script(script, *arguments)
    losses = [float(line.split()[3].rstrip(",")) for line in printed.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0] / 2
    assert (tmp_path / "out" / "model.safetensors").is_file()


def check_layer_cells(cells: list[dict[str, Any]], variants: set[str]) -> None:
    for cell in cells:
        assert variants <= set(cell["errors"]) or cell["ep_size"] == 1
        for variant, error in cell["errors"].items():
            assert isinstance(error, float) and error <= 1e-5, (variant, error)
        for passes in cell["report"].values():
            for found in passes.values():
                parts = found["compute_ms"] + found["exposed_ms"] + found["idle_ms"]
                assert found["ms"] == pytest.approx(parts, abs=0.01) and sum(found["waits"].values()) > 0


def test_layer_benchmark_checks_every_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    options = ["--shapes", "tiny", "--ep", "1", "2", "4", "--tokens", "48", "--waves", "1", "3", "--layers", "1"]
    options += ["--skew", "0", "1.2", "--report", "--json", str(out)]
    run_script("fluid_hf.cli", "bench", "layer", *options, nproc=1)
    cells = json.loads(out.read_text())["cells"]
    assert [(cell["ep_size"], cell["skew"]) for cell in cells] == [(ep, skew) for ep in (1, 2, 4) for skew in (0, 1.2)]
    check_layer_cells(cells, {"AutoEP", "AutoEP fused", "AllToAllEP"})
    assert set(cells[-1]["report"]) == {"serial", f"overlap {cells[-1]['planned_waves']}"}
    assert cli.main(["bench", "table", "--json", str(out)]) == 0
    table, report = capsys.readouterr().out.strip().split("\n\n")
    names = [f"| tiny EP{ep}{skew}" for ep in (1, 2, 4) for skew in ("", ", Zipf 1.2")]
    assert [line.split(" |")[0] for line in table.splitlines()[2:]] == names
    assert len(report.splitlines()) == 2 + 2 * 2 * (1 + 2 + 2)


def run_layer_benchmark(rank: int, world: int, out: str) -> int:
    options = ["--link", "gloo", "--shapes", "tiny", "--tokens", "40", "--skew", "1", "--layers", "1", "--report"]
    return cli.main(["bench", "layer", *options, "--json", out])


def test_layer_benchmark_on_real_ranks(pool2: RankPool, tmp_path: Path) -> None:
    assert pool2.run(run_layer_benchmark, str(tmp_path / "bench.json")) == [0, 0]
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["link"] == "gloo" and len(report["cells"]) == 1
    check_layer_cells(report["cells"], {"serial", "AutoEP", "AutoEP fused", "AllToAllEP", "FluidEP"})
