"""Options of DeepSpeed's JSON that reach split experts: the unpatched model's training, or an error by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import RankPool, rank_pool
from families import batch, relative_error, tiny_model
from test_deepspeed import Curve, assert_near, groups, settings, train, train_step

import fluid_hf
from fluid_hf import FluidConfig

pool2 = rank_pool(2)


def run_zero_options(
    rank: int, world: int, stage: int, patched: bool, options: dict[str, Any], held: str = ""
) -> Curve:
    """A few steps with options of `zero_optimization`, and an optimizer of the parameters with `held` in their name."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # saves a minute of compilation
    model = tiny_model("mixtral")
    if patched:
        fluid_hf.patch_model(model, FluidConfig(ep_size=world))
    config = {**settings(stage), "zero_force_ds_cpu_optimizer": False}
    config["zero_optimization"] = {**config["zero_optimization"], **options}
    optimizer = torch.optim.AdamW([p for name, p in model.named_parameters() if held in name], lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    curve = train(engine, rank)
    engine.destroy()
    return curve


def test_gradients_that_are_not_copied_together(pool2: RankPool) -> None:
    options: dict[str, Any] = {"contiguous_gradients": False}
    for stage in (1, 2):
        for text in pool2.expect("ConfigError", run_zero_options, stage, True, options):
            assert f"contiguous_gradients (false) must be true at stage {stage} when ep_size (2) is over 1" in text
        for text in pool2.expect("ConfigError", run_zero_options, stage, True, {"reduce_scatter": False}):
            assert f"reduce_scatter (false) must be true at stage {stage} when ep_size (2) is over 1" in text
    offloaded = {**options, "offload_optimizer": {"device": "cpu"}}  # DeepSpeed copies them together all the same
    for stage, served in ((1, offloaded), (2, offloaded), (3, options)):
        expected = pool2.run(run_zero_options, stage, False, options)[0]
        for curve in pool2.run(run_zero_options, stage, True, served):
            assert_near(curve, expected)


def test_an_optimizer_without_the_experts(pool2: RankPool) -> None:
    for stage in (1, 2):
        for text in pool2.expect("ConfigError", run_zero_options, stage, True, {}, "self_attn"):
            assert f"optimizer (AdamW) at zero_optimization.stage ({stage}) must hold the experts" in text
    for stage in (0, 3):
        expected = pool2.run(run_zero_options, stage, False, {}, "self_attn")[0]
        for curve in pool2.run(run_zero_options, stage, True, {}, "self_attn"):
            assert [loss for loss, _ in curve] == pytest.approx([loss for loss, _ in expected], rel=1e-4)


def test_gradients_reduced_beside_the_backward_pass(pool2: RankPool) -> None:
    """Also in buckets that a parameter fills, so that the first one leaves while weight gradients are yet to come."""
    options: dict[str, Any] = {"overlap_comm": True, "reduce_bucket_size": 500}
    for stage in (1, 2, 3):
        expected = pool2.run(run_zero_options, stage, False, {})[0]
        for curve in pool2.run(run_zero_options, stage, True, options):
            assert_near(curve, expected)


def run_json_optimizer(rank: int, world: int, stage: int, patched: bool, way: str) -> Curve:
    """AdamW of the JSON for parameters that the caller names, as accelerate's DummyOptim passes them on."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # saves a minute of compilation
    model = tiny_model("mixtral")
    before = list(model.parameters())
    if patched:
        fluid_hf.patch_model(model, FluidConfig(ep_size=world))
    named = dict(model.named_parameters())
    kinds: dict[str, Any] = {
        "groups": groups(model),
        "iterators": [{**group, "params": iter(group["params"])} for group in groups(model)],
        "attention": [p for name, p in named.items() if "self_attn" in name],
        "before": before,
    }
    adam = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    config = {**settings(stage), "optimizer": adam}
    engine, optimizer, *_ = deepspeed.initialize(model=model, config=config, model_parameters=kinds[way])
    curve = train(engine, rank)
    if way == "groups":
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}
    engine.destroy()
    return curve


def test_parameters_of_the_optimizer_in_the_json(pool2: RankPool) -> None:
    """Groups without a name of their own, of which DeepSpeed knows no way to make groups of experts."""
    expected = pool2.run(run_json_optimizer, 1, False, "groups")[0]
    for stage, way in ((0, "groups"), (1, "groups"), (2, "iterators"), (3, "groups")):
        for curve in pool2.run(run_json_optimizer, stage, True, way):
            assert_near(curve, expected)
    for stage in (1, 2):
        for text in pool2.expect("ConfigError", run_json_optimizer, stage, True, "attention"):
            assert f"model_parameters at zero_optimization.stage ({stage}) must hold the experts" in text


def test_parameters_collected_before_patching(pool2: RankPool) -> None:
    """At stage 0 and 3 the experts that the model no longer has would be trained, and its own not."""
    for stage in (0, 2, 3):
        for text in pool2.expect("ConfigError", run_json_optimizer, stage, True, "before"):
            assert "parameters that are not the model's; call patch_model before they are collected" in text


def run_json(rank: int, world: int, stage: int, patched: bool, block: dict[str, Any]) -> Curve:
    """A few steps with more fields in the JSON."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # saves a minute of compilation
    model = tiny_model("mixtral")
    if patched:
        fluid_hf.patch_model(model, FluidConfig(ep_size=world))
    engine, *_ = deepspeed.initialize(model=model, config={**settings(stage), **block})
    curve = train(engine, rank)
    engine.destroy()
    return curve


def test_settings_are_read_as_deepspeed_reads_them(pool2: RankPool) -> None:
    """A stage in quotes is a stage: gradients of different experts were summed."""
    for stage, no in (("1", False), ("2", "false"), (1.0, 0)):
        block: dict[str, Any] = {"zero_optimization": {"stage": stage, "contiguous_gradients": no}}
        block["optimizer"] = {"type": "AdamW", "params": {"torch_adam": True}}
        for text in pool2.expect("ConfigError", run_json, 1, True, block):
            assert f"contiguous_gradients (false) must be true at stage {int(float(stage))} when" in text


def test_adagrad_needs_stage_0(pool2: RankPool) -> None:
    """DeepSpeed makes it anew with one group, and ended in an IndexError in the first step."""
    block = {"optimizer": {"type": "Adagrad", "params": {"lr": 1e-2}}}
    expected = pool2.run(run_json, 1, False, block)[0]
    for curve in pool2.run(run_json, 0, True, block):
        assert [loss for loss, _ in curve] == pytest.approx([loss for loss, _ in expected], rel=1e-4)
    for stage in (1, 2, 3):
        for text in pool2.expect("ConfigError", run_json, stage, True, block):
            assert f"optimizer.type (Adagrad) must be another one at zero_optimization.stage ({stage})" in text


ZERO_PLUS_PLUS = [
    ({"zero_hpz_partition_size": 2}, "(2) must be 1"),
    ({"zero_quantized_gradients": True}, "(true) must"),
]


@pytest.mark.parametrize(("option", "shown"), ZERO_PLUS_PLUS)
def test_zero_plus_plus_is_refused_by_name(pool2: RankPool, option: dict[str, Any], shown: str) -> None:
    for text in pool2.expect("ConfigError", run_zero_options, 3, True, option):
        assert f"zero_optimization.{next(iter(option))} {shown}" in text


def run_states(rank: int, world: int, stage: int, patched: bool) -> dict[str, float]:
    """The square of Adam's averages that the parameters know after each of two steps, over all ranks' experts."""
    import deepspeed
    from deepspeed.utils import safe_get_full_optimizer_state

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # saves a minute of compilation
    model = tiny_model("mixtral")
    if patched:
        fluid_hf.patch_model(model, FluidConfig(ep_size=world))
    adam = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    engine, *_ = deepspeed.initialize(model=model, config={**settings(stage), "optimizer": adam})
    found: dict[str, float] = {}
    for step in range(2):
        ids = batch(rank, 1, step=step)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        squares = torch.zeros(2, dtype=torch.float64)
        for name, parameter in model.named_parameters():
            average = safe_get_full_optimizer_state(parameter, "exp_avg")
            squares[int("experts" in name)] += average.double().square().sum()
        if patched:
            torch.distributed.all_reduce(squares[1:])
        found |= {f"dense {step}": float(squares[0]), f"experts {step}": float(squares[1])}
    engine.destroy()
    return found


def test_parameters_know_their_states(pool2: RankPool) -> None:
    """DeepSpeed looks for them once, after the step of the first group: the experts' were not found."""
    expected = pool2.run(run_states, 1, False)[0]
    for stage in (1, 2):
        for found in pool2.run(run_states, stage, True):
            assert found == pytest.approx(expected, rel=1e-4)


def run_two_engines(rank: int, world: int, stage: int, patched: bool) -> Curve:
    """Two engines of one model, one after the other, as of two Trainers."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # saves a minute of compilation
    model = tiny_model("qwen2_moe")
    if patched:
        fluid_hf.patch_model(model, FluidConfig(ep_size=world))
    curve, engines = [], []
    for _ in range(2):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine, *_ = deepspeed.initialize(
            model=model, config={**settings(stage), "zero_force_ds_cpu_optimizer": False}, optimizer=optimizer
        )
        curve += train(engine, rank)
        engines.append(engine)
    for engine in engines:
        engine.destroy()
    return curve


def test_a_second_engine_of_the_same_model(pool2: RankPool) -> None:
    """At ZeRO 3 hooks that the first one left on layers gathered whole fired beside the second one's."""
    for stage in (1, 3):
        expected = pool2.run(run_two_engines, stage, False)[0]
        for curve in pool2.run(run_two_engines, stage, True):
            for steps in (slice(0, 4), slice(4, 8)):
                assert_near(curve[steps], expected[steps])


def run_autocast(rank: int, world: int, patched: bool) -> list[tuple[float, float, float]]:
    """Three steps of stage 0 under float16 autocast, with an infinite gradient in the experts of the last rank in the
    second: loss of all ranks, sum of the dense weights and loss scale after each.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # saves a minute of compilation
    model = tiny_model("mixtral")
    if patched:
        fluid_hf.patch_model(model, FluidConfig(ep_size=world))
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    bad = False
    experts[-1].register_hook(lambda grad: grad * float("inf") if bad else grad)
    dense = [p for name, p in model.named_parameters() if ".experts." not in name]
    config = {**settings(0), "torch_autocast": {"enabled": True, "dtype": "float16"}}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    found = []
    for step in range(3):
        bad = step == 1 and rank == world - 1
        total = train_step(engine, rank, step)
        weights = float(torch.stack([p.detach().double().abs().sum() for p in dense]).sum())
        found.append((total, weights, float(engine.torch_autocast_z0_gradscaler.get_scale())))
    engine.destroy()
    return found


def test_an_overflow_under_autocast_skips_the_step_on_all(pool2: RankPool) -> None:
    """At stage 0 PyTorch's GradScaler looks at one rank's gradients: dense weights and loss scales differed."""
    expected = pool2.run(run_autocast, False)[0]
    first, other = pool2.run(run_autocast, True)
    assert first == other
    assert [step[2] for step in first] == [step[2] for step in expected] and first[0][2] == 2 * first[1][2]
    assert first[0][1] == first[1][1] != first[2][1], "weights change in a step that is not skipped, and in no other"
    for ours, theirs in zip(first, expected, strict=True):
        assert ours[:2] == pytest.approx(theirs[:2], rel=1e-4)


def run_mesh(rank: int, world: int, sp_size: int, way: str) -> float:
    """The worst weight after two steps with a mesh of one data-parallel rank: argument, in the JSON, or left over."""
    import deepspeed
    from deepspeed.utils import groups as deepspeed_groups

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # saves a minute of compilation
    reference, model = tiny_model("mixtral"), tiny_model("mixtral")
    fluid_hf.patch_model(model, FluidConfig(ep_size=world, sp_size=sp_size))
    optimizers = [torch.optim.AdamW(part.parameters(), lr=1e-2, eps=1e-4) for part in (reference, model)]
    sizes = {"data_parallel_size": 1, "sequence_parallel_size": 2} if way == "JSON" else {}
    config = {**settings(1), "gradient_clipping": 0, "zero_force_ds_cpu_optimizer": False, **sizes}
    mesh = (1, 2) if way == "argument" else None
    if way == "left":
        deepspeed_groups.mesh_device = torch.distributed.init_device_mesh(
            "cpu", (1, 2), mesh_dim_names=("data_parallel", "sequence_parallel")
        )
    try:
        engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizers[1], mesh_param=mesh)
    finally:
        deepspeed_groups.mesh_device = None
    for step in range(2):
        ids = batch(0, 1, step=step)
        reference(input_ids=ids, labels=ids).loss.backward()
        piece = model.fluid.shard_batch({"input_ids": ids, "labels": ids})
        labels = piece.pop("shift_labels")
        engine.backward(model.fluid.sequence_loss(engine(**piece).logits, labels))
        optimizers[0].step()
        optimizers[0].zero_grad()
        engine.step()
    engine.destroy()
    expected = dict(reference.named_parameters())
    return max(relative_error(p, expected[name]) for name, p in fluid_hf.unpatch_model(model).named_parameters())


def test_meshes_of_ranks_that_share_sequences(pool2: RankPool) -> None:
    """Of such a mesh DeepSpeed averages gradients over the first dimension only: ranks drifted apart."""
    for way in ("argument", "JSON"):
        assert max(pool2.run(run_mesh, 2, way)) < 1e-5
        for text in pool2.expect("ConfigError", run_mesh, 1, way):
            assert "(1, 2) of deepspeed.initialize must be (2, 1) for a model patched with sp_size (1)" in text
    for text in pool2.expect("ConfigError", run_mesh, 2, "left"):
        assert "(1 data-parallel ranks) must have all 2" in text
