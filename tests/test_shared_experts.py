"""Shared experts run in the communication window, and only blocks whose code is known are touched."""

from __future__ import annotations

import ast
from typing import Any

import moe_families
import pytest
import torch
from distributed import RankPool, rank_pool
from families import batch, relative_error, tiny_model
from shared_windows import misplaced, record_shared
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

import fluid_hf
from fluid_hf import FluidConfig
from fluid_hf.checkpoint.gather import gather_experts
from fluid_hf.models.fused_parts import is_fused
from fluid_hf.models.in_place import OwnCalls
from fluid_hf.models.put_off import put_off, run_experts, take
from fluid_hf.models.shared_calls import TAKE, SharedCalls
from fluid_hf.models.shared_experts import canonical_text, find_form

pool2 = rank_pool(2)
TOLERANCE = 1e-5


def record_qwen2(rank: int, world: int, **settings: Any) -> dict[str, Any]:
    model = fluid_hf.patch_model(tiny_model("qwen2_moe"), FluidConfig(ep_size=world, **settings))
    name = list(model.fluid.layers)[-1].removesuffix(".experts")
    block = model.get_submodule(name)
    overlapped = list(model.fluid.bound_blocks)
    with model.fluid.record_events() as events:
        block.shared_expert.register_forward_hook(lambda *_: events.append((f"{name}.experts", "shared forward")))
        block.shared_expert.down_proj.weight.register_post_accumulate_grad_hook(
            lambda _: events.append((f"{name}.experts", "shared backward"))
        )
        ids = batch(rank, 2)
        model(input_ids=ids, labels=ids).loss.backward()
    model.fluid.finish_batch()
    fluid_hf.unpatch_model(model)
    assert "forward" not in vars(block)
    return {"events": [event for layer, event in events if layer == f"{name}.experts"], "overlapped": overlapped}


@pytest.mark.parametrize("waves", [1, 3])
def test_shared_expert_runs_while_rows_travel(pool2: RankPool, waves: int) -> None:
    for found in pool2.run(record_qwen2, waves=waves):
        at = found["events"].index
        assert at(f"post combine {waves - 1}") < at("shared forward") < at("wait combine 0")
        assert at("post output grad") < at("shared backward") < at("wait output grad 0")
        assert len(found["overlapped"]) == 2


def test_without_communication_the_block_keeps_its_forward() -> None:
    model = fluid_hf.patch_model(tiny_model("qwen2_moe"), FluidConfig(ep_size=1))
    assert model.fluid.bound_blocks == {}
    assert not any("forward" in vars(module) and not is_fused(module) for module in model.modules())


class Renamed(Qwen2MoeSparseMoeBlock):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Other names, the same calls."""
        b, s, h = x.shape
        flat = x.view(-1, h)
        shared = self.shared_expert(flat)
        _, w, i = self.gate(flat)
        y = self.experts(flat, i, w)
        shared = F.sigmoid(self.shared_expert_gate(flat)) * shared  # noqa: F821
        y = y + shared
        y = y.reshape(b, s, h)
        return y


class Changed(Qwen2MoeSparseMoeBlock):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch_size, sequence_length, hidden_dim = hidden_states.shape
        hidden_states_reshaped = hidden_states.view(-1, hidden_dim)
        shared_expert_output = self.shared_expert(hidden_states_reshaped)
        _, routing_weights, selected_experts = self.gate(hidden_states_reshaped)
        expert_output = self.experts(hidden_states_reshaped, selected_experts, routing_weights)
        shared_expert_output = torch.tanh(self.shared_expert_gate(hidden_states_reshaped)) * shared_expert_output
        expert_output = expert_output + shared_expert_output
        expert_output = expert_output.reshape(batch_size, sequence_length, hidden_dim)
        return expert_output


def test_blocks_are_known_by_their_code() -> None:
    form = find_form(Qwen2MoeSparseMoeBlock)
    assert form is not None and find_form(Renamed) is form
    assert find_form(Changed) is None
    assert find_form(MixtralSparseMoeBlock) is None  # no shared expert
    assert find_form(nn.Linear) is None


def test_a_decorated_forward_is_another_function() -> None:
    assert canonical_text("def forward(self, x):\n    return x") is not None
    assert canonical_text("@wrap\ndef forward(self, x):\n    return x") is None


def train_checkpointed(rank: int, world: int, folder: str, reentrant: bool) -> dict[str, float]:
    """Errors of one pass whose layers are computed again in backward, and whether the shared experts ran in place."""
    # In float64, so that a sensitive model does not amplify roundings.
    plain, model = (moe_families.tiny_model(folder).double().train() for _ in range(2))
    for each in (plain, model):
        each.gradient_checkpointing_enable({"use_reentrant": reentrant})
        each.enable_input_require_grads()
    fluid_hf.patch_model(model, FluidConfig(ep_size=world))
    expected = [plain(input_ids=batch(other, 2))[0] for other in range(world)]
    torch.autograd.backward([each.square().mean() for each in expected])
    with record_shared(model) as events:
        logits = model(input_ids=batch(rank, 2))[0]
        logits.square().mean().backward()
    model.fluid.finish_batch()
    model.fluid.reduce_gradients(model)
    assert events and all(misplaced(found, passes=2) == [] for found in events.values()), events
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    errors = {"logits": relative_error(logits, expected[rank])}
    for name, parameter in model.named_parameters():
        if name in wanted and parameter.shape == wanted[name].shape:
            errors[name] = relative_error(parameter.grad * world, wanted[name])
    fluid_hf.unpatch_model(model)
    assert not any("forward" in vars(module) for module in model.modules())
    return errors


@pytest.mark.parametrize(
    ("folder", "reentrant"),
    [("granitemoeshared", True), ("granitemoeshared", False), ("gemma4", False)]
    # Two kinds of experts, which both take the shared expert along.
    + [("ernie4_5_vl_moe", True), ("ernie4_5_vl_moe", False)],
)
def test_layers_that_call_the_shared_expert_are_still_checkpointed(
    pool2: RankPool, folder: str, reentrant: bool
) -> None:
    for errors in pool2.run(train_checkpointed, folder, reentrant):
        assert any("mlp.down_proj" in name or "shared_" in name for name in errors)
        assert max(errors.values()) <= TOLERANCE, errors


def images(rank: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hidden states, and which of them are an image's: none at all on rank 0."""
    generator = torch.Generator().manual_seed(rank)
    hidden = torch.randn(2, 5, 32, generator=generator)
    return hidden, (torch.rand(2, 5, generator=generator) < 0.4).int() if rank else None


def run_images(rank: int, world: int) -> dict[str, float]:
    plain, model = (moe_families.tiny_model("ernie4_5_vl_moe").train() for _ in range(2))
    fluid_hf.patch_model(model, FluidConfig(ep_size=world))
    name = list(model.fluid.layers)[0].removesuffix(".text_moe.experts")
    block, expected = model.get_submodule(name), plain.get_submodule(name)
    outputs = {}
    for other in range(world):
        hidden, is_image = images(other)
        outputs[other] = (hidden.requires_grad_(), *expected(hidden, is_image))
        (outputs[other][1].square().sum() + outputs[other][2].sum()).backward()
    hidden, is_image = images(rank)
    with record_shared(model) as events:
        output, logits = block(hidden.requires_grad_(), is_image)
        (output.square().sum() + logits.sum()).backward()
    model.fluid.finish_batch()
    model.fluid.reduce_gradients(model)
    assert misplaced(events[f"{name}.text_moe.experts"]) == [], events
    errors = {"output": relative_error(output, outputs[rank][1]), "logits": relative_error(logits, outputs[rank][2])}
    errors["input"] = relative_error(hidden.grad, outputs[rank][0].grad)
    for child, parameter in block.named_parameters():
        if parameter.requires_grad and ".experts." not in child:
            errors[child] = relative_error(parameter.grad * world, expected.get_parameter(child).grad)
    for kind in ("text_moe", "vision_moe"):
        layer = block.get_submodule(f"{kind}.experts")
        for parameter in layer.split_parameters():  # gather the gradients the way weights are gathered
            parameter.data = parameter.grad * world
        for weight, gradient in gather_experts(layer, model.fluid, to_all=True).items():
            wanted = expected.get_submodule(f"{kind}.experts").get_parameter(weight).grad
            errors[f"{kind}.{weight}"] = relative_error(gradient, wanted)
    fluid_hf.unpatch_model(model)
    assert not any("forward" in vars(module) for module in model.modules())
    return errors


def test_text_and_image_experts_with_one_shared_expert(pool2: RankPool) -> None:
    for errors in pool2.run(run_images):
        assert len(errors) > 8
        assert max(errors.values()) <= TOLERANCE, errors


BEFORE = """
def forward(self, x):
    shape = x.shape
    shared = self.shared(x)
    flat = x.view(-1, shape[-1])
    weights, index = self.route(flat)
    total = self.experts(flat, index, weights)
    total = total.view(shape) + shared
    return total
"""
AFTER = """
def forward(self, x):
    identity, shape = x, x.shape
    x = x.view(-1, shape[-1])
    weights, index = self.route(x)
    if self.training:
        total = self.experts(x, index, weights).to(x.dtype)
    else:
        total = self.infer(x, index, weights)
    total *= self.scale
    total = total.view(*shape)
    if self.with_shared:
        total = total + self.shared(identity)
    return total
"""


class Sequence:
    """A block that notes its calls."""

    def __init__(self, **settings: Any) -> None:
        self.training, self.with_shared, self.scale, self.notes = True, True, 0.5, []
        vars(self).update(settings)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.sum(-1, keepdim=True), torch.zeros(len(x), 1, dtype=torch.int64)

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        self.notes.append("shared")
        return 3 * x

    def experts(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, between: Any = None) -> Any:
        self.notes.append("dispatch")
        found = between() if between is not None else None
        self.notes.append("combine")
        return (weights * x, found) if between is not None else weights * x

    def infer(self, *arguments: torch.Tensor, _fluid_run: Any = None) -> torch.Tensor:
        return run_experts(self.experts, *arguments, _fluid_run)


def rewritten(text: str) -> tuple[bool, Any, Any]:
    """Whether the shared expert was put off, and the function before and after."""
    function = ast.parse(text).body[0]
    assert isinstance(function, ast.FunctionDef)
    own = OwnCalls(lambda name: name != "spoil", lambda name: name in ("experts", "infer", "route"))
    moved = SharedCalls("experts", frozenset({"infer"}), frozenset({"shared"}), own).rewrite(function)
    names = {"torch": torch, "_fluid_put_off": put_off, "_fluid_run_experts": run_experts, "_fluid_take": take}
    both = []
    for source in (text, ast.unparse(ast.fix_missing_locations(ast.Module([function], [])))):
        scope: dict[str, Any] = {}
        exec(source, names, scope)
        both.append(scope["forward"])
    return moved, both[0], both[1]


CHAIN = """
def forward(self, x):
    shape = x.shape
    residual = x
    x = x + 1
    x = self.shared(x)
    if self.with_shared:
        first = 2 * x
        flat = residual.view(-1, shape[-1])
        weights, index = self.route(flat)
        second = self.experts(flat, index, weights)
        x = first * x + second.view(shape)
    return x + 1
"""
IN_WINDOW = ["dispatch", "shared", "combine"]


@pytest.mark.parametrize("text", [BEFORE, AFTER, AFTER.replace("total = total +", "total +="), CHAIN])
@pytest.mark.parametrize("settings", [{}, {"training": False}, {"with_shared": False}])
def test_a_shared_expert_is_put_off(text: str, settings: dict[str, bool]) -> None:
    moved, original, made = rewritten(text)
    assert moved
    plain, block = Sequence(**settings), Sequence(**settings)
    inputs = [torch.ones(2, 3, 4).requires_grad_() for _ in range(2)]
    outputs = [original(plain, inputs[0]), made(block, inputs[1])]
    assert torch.equal(*outputs)
    torch.autograd.backward([output.square().sum() for output in outputs])
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    without = {BEFORE: IN_WINDOW, CHAIN: ["shared"]}.get(text, ["dispatch", "combine"])
    assert block.notes == (IN_WINDOW if block.with_shared else without)


# Each would make the shared expert see other values, or its result something else: it must stay where it is.
STAYS = [
    (BEFORE, "    weights, index", "    flat += 1\n    weights, index"),
    (BEFORE, "    weights, index", "    flat.mul_(2)\n    weights, index"),
    (BEFORE, "    weights, index", "    flat[0] = 0\n    weights, index"),
    (BEFORE, "    weights, index", "    torch.relu_(flat)\n    weights, index"),
    (BEFORE, "    weights, index", "    torch.add(flat, 1, out=flat)\n    weights, index"),
    (BEFORE, "    weights, index", "    other = (flat,)[0]\n    other += 1\n    weights, index"),
    (BEFORE, "    weights, index", "    rows = []\n    rows.append(flat)\n    rows[0] += 1\n    weights, index"),
    (BEFORE, "    weights, index", "    rows = [flat] + [shape]\n    rows[0] += 1\n    weights, index"),
    (BEFORE, "    weights, index", "    self.spoil(flat)\n    weights, index"),
    (BEFORE, "    weights, index", "    spoil(flat)\n    weights, index"),
    (BEFORE, "    weights, index", "    for row in flat:\n        row += 1\n    weights, index"),
    (BEFORE, "    weights, index", "    with open(x) as file:\n        file.zero_()\n    weights, index"),
    (BEFORE, "self.route(flat)", "self.route(flat + shared)"),
    (BEFORE, "self.experts(flat, index, weights)", "self.experts(flat, index, weights) + shared"),
    (BEFORE, "    weights, index", "    shared = 2 * flat\n    flat = flat + shared\n    weights, index"),
    (BEFORE, "    weights, index", "    double = 2 * shared * shape[0]\n    shape = x.shape\n    weights, index"),
    (BEFORE, "    weights, index", "    double = self.spoil(shared)\n    weights, index"),
    (BEFORE, "    weights, index", "    double = flat.add_(shared)\n    weights, index"),
    (BEFORE, "    weights, index", "    shared += 1\n    weights, index"),
    (BEFORE, "    shared = self.shared(x)", "    shared = self.shared(x) if shape else 0"),
    (BEFORE, "    shared = self.shared(x)", "    shared = self.shared(x.mul_(2))"),
    (BEFORE, "    shared = self.shared(x)", "    x = shared = self.shared(x)"),
    (BEFORE, "    shared = self.shared(x)", "    shared = self.shared(x) * self.last\n    self.last = 2"),
    (BEFORE, "    total = self.experts", "    with self.lock:\n        total = self.experts"),
    (BEFORE, "    total = self.experts", "    for _ in range(2):\n        total = self.experts"),
    (BEFORE, "self.experts(flat, index, weights)", "self.experts(*flat, index, weights)"),
    (AFTER, "    total = total.view", "    identity = identity + 1\n    total = total.view"),
    (AFTER, "    total = total.view", "    identity += 1\n    total = total.view"),
    (AFTER, "    total = total.view", "    x.zero_()\n    total = total.view"),
    (AFTER, "    total = total.view", "    self.spoil(x)\n    total = total.view"),
    (AFTER, "    if self.with_shared:", "    if self.with_shared:\n        identity.neg_()"),
    (AFTER, "    if self.with_shared:", "    if total.sum() > 0:"),
    (AFTER, "    if self.with_shared:", "    if self.training:"),
    (AFTER, "self.shared(identity)", "self.shared(total)"),
    (AFTER, "self.shared(identity)", "self.shared(torch.randn(3))"),
    (AFTER, "self.shared(identity)", "[self.shared(row) for row in identity]"),
]


@pytest.mark.parametrize(("text", "old", "new"), STAYS)
def test_what_would_change_its_result_keeps_a_shared_expert_in_place(text: str, old: str, new: str) -> None:
    assert old in text
    moved, _, made = rewritten(text.replace(old, new, 1))
    assert not moved
    assert TAKE not in made.__code__.co_names


def test_a_call_that_nobody_made_in_a_window_is_made_where_its_result_is_wanted() -> None:
    run = put_off(lambda x: 2 * x, 4)
    assert take(run) == 8
    assert run_experts(lambda *_: 1, 0, 0, 0, run) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_experts_without_gradients_leave_the_shared_expert_its_own(mode: Any) -> None:
    """As methods of evaluation do it: decorated, called with gradients on."""
    block, weight = Sequence(), torch.ones(3, requires_grad=True)
    run = put_off(lambda x: weight * x, torch.ones(2, 3))
    with mode():
        routed = run_experts(block.experts, torch.ones(2, 3), torch.zeros(2, 1), torch.ones(2, 1), run)
    (routed + take(run)).sum().backward()
    assert torch.equal(weight.grad, torch.full((3,), 2.0))


class Spoiling(Changed):
    """Adds to its input between its shared expert and its experts."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        shape = hidden_states.shape
        hidden_states = hidden_states.reshape(-1, shape[-1])
        shared = self.shared_expert(hidden_states)
        hidden_states += 1
        _, weights, index = self.gate(hidden_states)
        routed = self.experts(hidden_states, index, weights)
        return (routed + shared).view(shape)


def run_unknown(rank: int, world: int, name: str) -> tuple[int, float]:
    """A block that no form is known for: how many were bound, and the error of the worst output or gradient."""
    plain, model = (tiny_model("qwen2_moe") for _ in range(2))
    for each in (plain, model):
        for layer in each.model.layers:
            layer.mlp.__class__ = {"changed": Changed, "spoiling": Spoiling}[name]
    fluid_hf.patch_model(model, FluidConfig(ep_size=world))
    bound = len(model.fluid.bound_blocks)
    with torch.set_grad_enabled(name == "changed"), record_shared(model) as events:  # in place: no gradients
        loss = model(input_ids=batch(rank, 2), labels=batch(rank, 2)).loss
        expected = [plain(input_ids=batch(other, 2), labels=batch(other, 2)).loss for other in range(world)]
        errors = [relative_error(loss, expected[rank])]
        if name == "changed":
            sum(expected).backward()
            loss.backward()
            model.fluid.reduce_gradients(model)
    model.fluid.finish_batch()
    assert [misplaced(found) == [] for found in events.values()] == [bound > 0] * 2, events
    for parameter in ("gate.weight", "shared_expert.down_proj.weight", "shared_expert_gate.weight"):
        pair = [each.get_parameter(f"model.layers.0.mlp.{parameter}").grad for each in (model, plain)]
        errors += [relative_error(pair[0] * world, pair[1])] if name == "changed" else []
    fluid_hf.unpatch_model(model)
    assert not any("forward" in vars(module) for module in model.modules())
    return bound, max(errors)


@pytest.mark.parametrize(("name", "bound"), [("changed", 2), ("spoiling", 0)])
def test_blocks_without_a_form_are_read(pool2: RankPool, name: str, bound: int) -> None:
    for found, error in pool2.run(run_unknown, name):
        assert found == bound
        assert error <= TOLERANCE
