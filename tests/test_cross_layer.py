"""Weight gradients of attention and the router in the windows of the MoE layer before: same gradients, right order."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import moe_families
import pytest
import torch
from distributed import RankPool, rank_pool
from families import FAMILIES, batch, relative_error, tiny_model

import fluid_hf
from fluid_hf import FluidConfig
from fluid_hf.errors import ConfigError, WgradPendingError
from fluid_hf.overlap.deferred_linear import DeferredWeight, WindowWeights
from fluid_hf.overlap.wgrad import WgradScheduler

pool2 = rank_pool(2)

TOLERANCE = 1e-5
LAYERS = 3
EXPERTS = 3 * LAYERS  # weights of the experts: gate, up, down
PLACED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate")
INSIDE = EXPERTS + (LAYERS - 1) * len(PLACED)

Result = tuple[dict[str, float], tuple[int, int], list[str]]


def plain(family: str) -> Any:
    biased = {"qkv_bias": True} if family == "qwen2_moe" else {}
    return tiny_model(family, num_hidden_layers=LAYERS, **biased)


class Log(logging.Handler):
    """Keeps what was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def logged() -> Iterator[list[str]]:
    log = Log()
    logging.getLogger("fluid_hf").addHandler(log)
    yield log.messages
    logging.getLogger("fluid_hf").removeHandler(log)


def prepare(model: Any, way: str) -> None:
    """Change a model before it is patched."""
    if way == "frozen":
        model.model.layers[1].self_attn.q_proj.weight.requires_grad_(False)
    elif way == "tied":
        model.model.layers[2].self_attn.k_proj.weight = model.model.layers[1].self_attn.k_proj.weight
    elif way == "shared":
        model.model.layers[2].self_attn.v_proj = model.model.layers[1].self_attn.v_proj
    elif way == "subclassed":
        layer = model.model.layers[1].self_attn.o_proj
        layer.__class__ = type("OtherLinear", (torch.nn.Linear,), {})
    elif way in ("reentrant", "non_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": way == "reentrant"})


def run_parity(rank: int, world: int, family: str, way: str = "", **settings: Any) -> Result:
    """Errors after two micro-batches, weight gradients (inside, outside) windows in each, and what was logged."""
    expected, model = plain(family).train(), plain(family).train()
    prepare(expected, way)
    prepare(model, way)
    with logged() as messages:
        fluid_hf.patch_model(model, FluidConfig(ep_size=world, wgrad="cross_layer", **settings))
        windows = [layer.context.windows for layer in model.fluid.layers.values()]
        assert windows.pop() is None  # no layer comes after the last one
        weights = [weight for window in windows for weight in window.weights]
        if way == "bounded":
            for weight in weights:
                weight.max_held_bytes = 0
        for step in range(2):
            batches = [batch(other, 1 + other, step=step) for other in range(world)]
            joint, tokens = torch.cat(batches), sum(ids.shape[0] * (ids.shape[1] - 1) for ids in batches)
            reference = expected(input_ids=joint, labels=joint, num_items_in_batch=tokens)
            reference.loss.backward()
            output = model(input_ids=batches[rank], labels=batches[rank], num_items_in_batch=tokens)
            output.loss.backward()
            assert model.fluid.scheduler.held_bytes == 0 and not any(weight.offered for weight in weights)
            stats = model.fluid.finish_batch()
    start = sum(ids.shape[0] for ids in batches[:rank])
    errors = {"logits": relative_error(output.logits, reference.logits[start : start + output.logits.shape[0]])}
    model.fluid.reduce_gradients(model)
    gradients = {name: parameter.grad for name, parameter in expected.named_parameters()}
    for name, parameter in model.named_parameters():
        if ".experts." not in name and parameter.requires_grad:
            errors[name] = relative_error(parameter.grad * world, gradients[name])
    before = [hasattr(module, "forward") and "forward" in vars(module) for module in model.modules()]
    fluid_hf.unpatch_model(model)
    assert any(before) and not any("forward" in vars(module) for module in model.modules())
    return errors, (stats.inside, stats.outside), messages


def check(results: list[Result], stats: tuple[int, int] = (INSIDE, 0), logs: tuple[str, ...] = ()) -> None:
    for rank, (errors, counted, messages) in enumerate(results):
        name = max(errors, key=lambda key: errors[key])
        assert errors[name] <= TOLERANCE, f"rank {rank}: {name} is off by {errors[name]:.2e}"
        assert counted == stats
        assert len(messages) == len(logs) and all(a in b for a, b in zip(logs, messages, strict=True)), messages


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulated_gradients(pool2: RankPool, family: str) -> None:
    check(pool2.run(run_parity, family))


def test_ways_of_exchange(pool2: RankPool) -> None:
    for settings in ({"waves": 3}, {"overlap": False}, {"recompute": True}):
        check(pool2.run(run_parity, "qwen3_moe", **settings))


@pytest.mark.parametrize(
    ("way", "less"),
    # Weights that are left alone, and how many fewer gradients there are for it in the windows.
    [("frozen", 1), ("tied", 2), ("shared", 2), ("subclassed", 1), ("bounded", 0)],
)
def test_weights_that_are_left_alone(pool2: RankPool, way: str, less: int) -> None:
    if way == "bounded":  # each gradient at once; that of layer L before the window of layer L-1 opens
        check(pool2.run(run_parity, "qwen3_moe", way), (EXPERTS, INSIDE - EXPERTS))
    else:
        check(pool2.run(run_parity, "qwen3_moe", way), (INSIDE - less, 0))


@pytest.mark.parametrize("way", ["reentrant", "non_reentrant"])
def test_activation_checkpointing_falls_back(pool2: RankPool, way: str) -> None:
    check(pool2.run(run_parity, "qwen2_moe", way), (EXPERTS, 0), ("works as 'layer' here: activation checkpointing",))


def run_order(rank: int, world: int, waves: int) -> list[tuple[str, str]]:
    model = fluid_hf.patch_model(plain("qwen3_moe"), FluidConfig(ep_size=world, wgrad="cross_layer", waves=waves))
    ids = batch(rank, 2)
    loss = model(input_ids=ids, labels=ids).loss
    with model.fluid.record_events() as events:
        loss.backward()
    model.fluid.finish_batch()
    placed = model.fluid.cross_layer.placed
    fluid_hf.unpatch_model(model)
    assert placed == {
        f"model.layers.{layer}.mlp.experts": [f"model.layers.{layer + 1}.{name}" for name in PLACED]
        for layer in range(LAYERS - 1)
    }
    return events


@pytest.mark.parametrize("waves", [1, 2])
def test_order_of_events(pool2: RankPool, waves: int) -> None:
    """Both windows of the layer before are used, and the last layer's own window holds its experts only."""
    for events in pool2.run(run_order, waves):
        for layer in range(LAYERS):
            own = [event for name, event in events if name == f"model.layers.{layer}.mlp.experts"]
            placed = {event.removeprefix("wgrad ") for event in own if event.startswith("wgrad model")}
            following = {f"model.layers.{layer + 1}.{name}" for name in PLACED} if layer < LAYERS - 1 else set()
            assert placed == following
            first_return, last_return = own.index("post return 0"), own.index(f"post return {waves - 1}")
            spots = [own.index(f"wgrad {name}") for name in placed]
            early = [spot for spot in spots if own.index("post output grad") < spot < own.index("wait output grad 0")]
            late = [spot for spot in spots if last_return < spot < own.index("wait return 0")]
            assert first_return <= last_return and len(early) + len(late) == len(spots)
            assert not following or (early and late)
        # A layer is over, its own returns awaited, before the layer before computes for it.
        names = [name for name, _ in events]
        assert names == sorted(names, reverse=True)


def run_registered_late(rank: int, world: int) -> dict[str, list[str]]:
    model = moe_families.tiny_model("granitemoehybrid")
    fluid_hf.patch_model(model, FluidConfig(ep_size=world, wgrad="cross_layer"))
    placed: dict[str, list[str]] = model.fluid.cross_layer.placed
    names = [name for name, _ in model.named_modules()]
    assert names.index("model.layers.1.block_sparse_moe") < names.index("model.layers.1.self_attn")
    fluid_hf.unpatch_model(model)
    return placed


def test_attention_that_is_registered_after_the_experts(pool2: RankPool) -> None:
    names = [f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"]
    for placed in pool2.run(run_registered_late):
        assert list(placed) == ["model.layers.0.block_sparse_moe.experts"]
        assert sorted(*placed.values()) == sorted(["model.layers.1.block_sparse_moe.router", *names])


def run_without_gradients(rank: int, world: int, family: str) -> bool:
    """Generation and evaluation, between training steps and after them."""
    prompt, expected = batch(rank, 1, length=5 + rank), plain(family)
    model = fluid_hf.patch_model(plain(family), FluidConfig(ep_size=world, wgrad="cross_layer"))
    same = []
    for _ in range(2):
        generated = model.generate(prompt, max_new_tokens=4, do_sample=False)
        same.append(torch.equal(generated, expected.generate(prompt, max_new_tokens=4, do_sample=False)))
        with torch.no_grad():
            logits = model.eval()(input_ids=prompt).logits
            same.append(relative_error(logits, expected(input_ids=prompt).logits) <= TOLERANCE)
        assert model.fluid.finish_batch().peak_bytes == 0
        model.train()(input_ids=prompt, labels=prompt).loss.backward()
        assert model.fluid.finish_batch().inside == INSIDE
    fluid_hf.unpatch_model(model)
    return all(same)


def test_generate_and_evaluate(pool2: RankPool) -> None:
    assert pool2.run(run_without_gradients, "qwen3_moe") == [True, True]


def run_adapters(rank: int, world: int, first: bool) -> tuple[dict[str, float], int]:
    """LoRA on q and v, wrapped before or after patching: error of each trained gradient."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ids, gradients = batch(0, 2), []
    for patched in (False, True):
        model = plain("mixtral")
        if patched and not first:
            fluid_hf.patch_model(model, FluidConfig(ep_size=world, wgrad="cross_layer"))
        torch.manual_seed(5)
        model = get_peft_model(model, lora)
        model.get_parameter("base_model.model.model.layers.1.self_attn.o_proj.weight").requires_grad_()
        if patched and first:
            fluid_hf.patch_model(model, FluidConfig(ep_size=world, wgrad="cross_layer"))
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    inside = model.fluid.finish_batch().inside
    fluid_hf.unpatch_model(model if first else model.base_model.model)
    return {name: relative_error(gradients[1][name], grad) for name, grad in gradients[0].items()}, inside


@pytest.mark.parametrize("first", [True, False])
def test_adapters(pool2: RankPool, first: bool) -> None:
    for errors, inside in pool2.run(run_adapters, first):
        assert len(errors) == LAYERS * 2 * 2 + 1 and max(errors.values()) <= TOLERANCE
        assert inside == 1  # of o, which has no adapter and is trained


def make_weight(dtype: torch.dtype = torch.float64) -> tuple[torch.nn.Linear, DeferredWeight]:
    torch.manual_seed(3)
    linear = torch.nn.Linear(6, 4).to(dtype)
    return linear, DeferredWeight("linear", linear, WgradScheduler("cross_layer"))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (0, 6), (2, 0, 6)])
def test_deferred_linear_is_linear(shape: tuple[int, ...], autocast: bool) -> None:
    linear, deferred = make_weight(torch.float32)
    x, events, results = torch.randn(shape), [], []
    for way in ("deferred", "plain"):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", enabled=autocast):
            deferred.offer("layer", lambda: True, events.append)
            run = deferred.linear if way == "deferred" else torch.nn.functional.linear
            y = run(leaf, linear.weight, linear.bias)
        assert y is not None and y.dtype == (torch.bfloat16 if autocast else torch.float32)
        y.float().square().sum().backward()
        results.append((y.detach(), leaf.grad, linear.weight.grad, linear.bias.grad))
        linear.zero_grad()
    torch.testing.assert_close(*results)
    assert events == ["wgrad linear"] and deferred.scheduler.finish_batch().inside == 1


def test_compilers_leave_it_alone() -> None:
    """Also once sizes vary, where torch's compiler would trace the backward pass with sizes that are not known."""
    linear, deferred = make_weight()
    compiled = torch.compile(deferred.linear, backend="eager", dynamic=True)
    for tokens in (2, 3):
        deferred.offer("layer", lambda: True, lambda event: None)
        compiled(torch.ones(tokens, 6, dtype=torch.float64), linear.weight, linear.bias).sum().backward()
        assert deferred.scheduler.finish_batch().inside == 1
    torch.testing.assert_close(linear.weight.grad, torch.full_like(linear.weight, 5.0))


def test_when_a_linear_is_left_alone() -> None:
    linear, deferred = make_weight()
    x = torch.ones(2, 6, dtype=torch.float64)
    arguments = (linear.weight, linear.bias)

    def offer() -> DeferredWeight:
        deferred.offer("layer", lambda: True, lambda event: None)
        return deferred

    assert deferred.linear(x, *arguments) is None  # nothing was offered
    assert offer().linear(x, *arguments) is not None and deferred.linear(x, *arguments) is None  # only once
    with torch.no_grad():
        assert offer().linear(x, *arguments) is None and not deferred.offered
    assert offer().linear(x, linear.weight * 1, linear.bias) is None
    assert offer().linear(x[0], *arguments) is None
    with torch.autograd.graph.save_on_cpu():
        assert offer().linear(x, *arguments) is None
    offer().withdraw()
    assert deferred.linear(x, *arguments) is None
    deferred.scheduler.disable()
    assert offer().linear(x, *arguments) is None
    deferred.scheduler.enable()
    linear.requires_grad_(False)
    assert offer().linear(x, *arguments) is None


def test_partial_and_double_backward() -> None:
    linear, deferred = make_weight()
    x = torch.ones(2, 6, dtype=torch.float64, requires_grad=True)
    deferred.offer("layer", lambda: True, lambda event: None)
    y = deferred.linear(x, linear.weight, linear.bias)
    assert y is not None
    for _ in range(2):  # each pass leaves its own work and computes it
        linear.zero_grad()
        y.sum().backward(retain_graph=True)
        torch.testing.assert_close(linear.weight.grad, torch.full_like(linear.weight, 2.0))
    assert deferred.scheduler.finish_batch().inside == 2
    (grad,) = torch.autograd.grad(y.square().sum(), [x], create_graph=True)
    with pytest.raises(WgradPendingError, match=r"pending \(1\)"):
        deferred.scheduler.finish_batch()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_windows_are_filled_by_predicted_work() -> None:
    weights = []
    for size in (1, 2, 3, 4):
        module = torch.nn.Linear(10, size)
        weights.append(DeferredWeight(str(size), module, WgradScheduler("cross_layer")))
    windows, offered = WindowWeights(weights), []
    for own, experts, early in ((0.0, 1e6, "1234"), (1e6, 0.0, ""), (20.0, 40.0, "24"), (0.0, 0.0, "14")):
        windows.arrange(own, experts)
        offered = []
        for window in (0, 1):
            windows.withdraw()
            windows.offer(window, "layer", lambda: True, lambda event: None)
            offered.append("".join(weight.name for weight in weights if weight.offered))
        assert sorted("".join(offered)) == list("1234")
        assert offered[0] == early, (own, experts)


Curve = list[tuple[float, float]]


def run_engine(rank: int, world: int, stage: int, patched: bool, accumulate: int = 1) -> tuple[Curve, int, list[str]]:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # saves a minute of compilation
    model, curve, inside = plain("qwen2_moe"), [], 0
    with logged() as messages:
        if patched:
            fluid_hf.patch_model(model, FluidConfig(ep_size=world, wgrad="cross_layer"))
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": accumulate,
                "gradient_clipping": 0.5,
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "overlap_comm": True},
                "zero_allow_untested_optimizer": True,
            },
        )
        for step in range(4):
            ids = batch(rank, 1, step=step)
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            inside = model.fluid.finish_batch().inside if patched else 0
            engine.step()
            total = loss.detach().clone()
            torch.distributed.all_reduce(total)
            curve.append((float(total) / world, float(engine.get_global_grad_norm() or 0.0)))
    engine.destroy()
    return curve, inside, messages


def test_zero_stages(pool2: RankPool) -> None:
    plain = {accumulate: pool2.run(run_engine, 1, False, accumulate)[0][0] for accumulate in (1, 2)}
    # Stage 3 last: DeepSpeed then replaces `torch.nn.functional.linear` for the whole process.
    for stage, accumulate in ((0, 1), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1)):
        for curve, inside, messages in pool2.run(run_engine, stage, True, accumulate):
            assert [pytest.approx(point, rel=1e-4) for point in plain[accumulate]] == curve
            assert inside == (EXPERTS if stage == 3 else INSIDE)
            assert ["ZeRO 3" in message for message in messages] == [True] * (stage == 3)


def test_one_process_has_no_windows() -> None:
    with logged() as messages:
        model = fluid_hf.patch_model(plain("mixtral"), FluidConfig(wgrad="cross_layer"))
    assert model.fluid.cross_layer is None and len(messages) == 1 and "ep_size (1)" in messages[0]
    fluid_hf.unpatch_model(model)


def test_sequence_parallel_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"wgrad \('cross_layer'\) needs sp_size \(2\) to be 1"):
        FluidConfig(sp_size=2, wgrad="cross_layer")
