"""Models with code of their own, whose experts are one module each: two ranks against one process, files, refusals."""

from __future__ import annotations

import ast
import inspect
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import RankPool, rank_pool
from families import batch, relative_error
from remote_code import modeling_tiny_moe as code
from remote_code.configuration_tiny_moe import TinyMoeConfig
from shared_windows import misplaced, record_shared
from torch import nn
from transformers import AutoModelForCausalLM, dynamic_module_utils

import fluid_hf
from fluid_hf import FluidConfig
from fluid_hf.checkpoint.gather import as_stored, gather_experts
from fluid_hf.models.code_reading import function_source
from fluid_hf.models.expert_loops import UnknownLoopError, replace_loops

pool2 = rank_pool(2)

STYLES = [style for style in code.BLOCKS if style != "capacity"]
SHARED = ("hit_loop", "pairs", "flat_pairs", "method")  # that have a shared expert
TOLERANCE = 1e-5


def build(style: str, **settings: Any) -> Any:
    """A small model, equal for equal arguments."""
    torch.manual_seed(0)
    model = code.TinyMoeForCausalLM(TinyMoeConfig(style=style, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


def run(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs in both modes, and the gradient of the embedded inputs."""
    with torch.no_grad():
        found = {"evaluated": model.eval()(input_ids=ids).logits}
    embedded: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    hook = model.get_input_embeddings().register_forward_hook(keep)  # type: ignore[operator]
    output = model.train()(input_ids=ids, labels=ids)
    hook.remove()
    output.loss.backward()
    assert embedded[0].grad is not None
    return {**found, "logits": output.logits.detach(), "loss": output.loss.detach(), "input": embedded[0].grad}


def gradients(model: Any, world: int) -> dict[str, torch.Tensor]:
    """Of a patched model, summed over the ranks, by the names of the unpatched one."""
    model.fluid.finish_batch()
    model.fluid.reduce_gradients(model)
    layers = model.fluid.layers
    found = {n: p.grad * world for n, p in model.named_parameters() if ".experts." not in n and "expert_list" not in n}
    for name, layer in layers.items():
        kept = [parameter.data for parameter in layer.split_parameters()]
        for parameter in layer.split_parameters():  # gather the gradients the way weights are gathered
            parameter.data = parameter.grad * world
        gathered = gather_experts(layer, model.fluid, to_all=True)
        found.update(as_stored(model, {f"{name}.{weight}": gradient for weight, gradient in gathered.items()}))
        for parameter, data in zip(layer.split_parameters(), kept, strict=True):
            parameter.data = data
    return found


def compare(rank: int, world: int, style: str) -> dict[str, float]:
    batches = [batch(other, 1 + other) for other in range(world)]
    plain, model = build(style), build(style)
    reference = [run(plain, ids) for ids in batches]
    fluid_hf.patch_model(model, FluidConfig(ep_size=world))
    with record_shared(model) as events:
        found = run(model, batches[rank])
    assert len(events) == 2 * (style in SHARED)
    for name, found_events in events.items() if world > 1 else ():
        assert misplaced(found_events, passes=2) == [], (name, found_events)
    errors = {name: relative_error(value, reference[rank][name]) for name, value in found.items()}
    wanted = {name: parameter.grad for name, parameter in plain.named_parameters()}
    own = gradients(model, world)
    assert own.keys() == wanted.keys(), own.keys() ^ wanted.keys()
    for name, gradient in own.items():
        expected = wanted[name]
        errors[name] = relative_error(gradient, torch.zeros_like(gradient) if expected is None else expected)
    fluid_hf.unpatch_model(model)
    assert not any("forward" in vars(module) or "moe" in vars(module) for module in model.modules())
    state = model.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all(torch.equal(state[name], weight) for name, weight in plain.state_dict().items())
    errors["unpatched"] = relative_error(run(model, batches[rank])["logits"], reference[rank]["logits"])
    return errors


@pytest.mark.parametrize("style", STYLES)
def test_two_ranks_equal_one_process(pool2: RankPool, style: str) -> None:
    for errors in pool2.run(compare, style):
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] <= TOLERANCE, f"{worst} is off by {errors[worst]:.2e}"


@pytest.mark.parametrize("style", STYLES)
def test_one_process(style: str) -> None:
    errors = compare(0, 1, style)
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= TOLERANCE, f"{worst} is off by {errors[worst]:.2e}"


def save(rank: int, world: int, folder: str) -> bool:
    """Save in every way; whether the model is as it was afterwards."""
    model = fluid_hf.patch_model(build("hit_loop"), FluidConfig(ep_size=world))
    model.save_pretrained(f"{folder}/own")
    fluid_hf.save_pretrained(model, f"{folder}/ours", max_shard_size="40KB")
    return not fluid_hf.unpatch_model(model).state_dict().keys() ^ build("hit_loop").state_dict().keys()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".json")}


def check_saved(folder: Path) -> None:
    plain = build("hit_loop")
    plain.save_pretrained(folder / "theirs")
    assert files(folder / "own") == files(folder / "theirs")
    assert len(list((folder / "ours").glob("*.safetensors"))) > 1
    for name in ("own", "ours"):
        state = code.TinyMoeForCausalLM.from_pretrained(folder / name).state_dict()
        assert "layers.1.mlp.experts.3.gate_up_proj.weight" in state
        assert all(torch.equal(state[key], weight) for key, weight in plain.state_dict().items())


def test_checkpoints_have_the_models_names(pool2: RankPool, tmp_path: Path) -> None:
    assert all(pool2.run(save, str(tmp_path)))
    check_saved(tmp_path)


def test_checkpoints_of_one_process(tmp_path: Path) -> None:
    assert save(0, 1, str(tmp_path))
    check_saved(tmp_path)


def write_repository(folder: Path, style: str) -> None:
    """A folder as repositories with code have it."""
    model = build(style)
    model.config.auto_map = {
        "AutoConfig": "configuration_tiny_moe.TinyMoeConfig",
        "AutoModelForCausalLM": "modeling_tiny_moe.TinyMoeForCausalLM",
    }
    model.save_pretrained(folder)
    for name in ("configuration_tiny_moe.py", "modeling_tiny_moe.py"):
        shutil.copy(Path(code.__file__).parent / name, folder)


def load(folder: str, modules: str) -> Any:
    """A model with code from the folder, which transformers copies to `modules` before it is imported."""
    if "transformers_modules" not in sys.modules:  # else it stays where it was imported from
        dynamic_module_utils.HF_MODULES_CACHE = modules
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def train_repository(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Losses of a few steps, patched and not, and the files that each writes."""
    curves = {}
    for patched in (False, True):
        model = load(folder, f"{folder}/modules{rank}")
        assert type(model).__module__.startswith("transformers_modules")
        if patched:
            fluid_hf.patch_model(model, FluidConfig(ep_size=world))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        curve = []
        for step in range(3):
            optimizer.zero_grad()
            losses = []
            for other in [rank] if patched else range(world):
                ids = batch(other, 2, step=step)
                loss = model.train()(input_ids=ids, labels=ids).loss
                loss.backward()
                losses.append(float(loss.detach()))
            for parameter in [] if patched else model.parameters():  # the auxiliary loss has a gradient of one
                if parameter.grad is not None:
                    parameter.grad /= world
            if patched:
                model.fluid.reduce_gradients(model)
                model.fluid.finish_batch()
            optimizer.step()
            curve.append(losses[0] if patched else losses[rank])
        curves[patched] = curve
        if patched or rank == 0:
            model.save_pretrained(f"{folder}/{'ours' if patched else 'theirs'}")
    return curves


def test_trust_remote_code(pool2: RankPool, tmp_path: Path) -> None:
    write_repository(tmp_path / "repository", "pairs")
    for curves in pool2.run(train_repository, str(tmp_path / "repository")):
        assert curves[True] == pytest.approx(curves[False], rel=1e-5)
    folder = tmp_path / "repository"
    assert sorted(path.name for path in (folder / "ours").iterdir()) == sorted(
        path.name for path in (folder / "theirs").iterdir()
    )
    states = [load(str(folder / name), str(folder / "modules")).state_dict() for name in ("ours", "theirs")]
    assert states[0].keys() == states[1].keys()
    assert max(relative_error(states[0][name], weight) for name, weight in states[1].items()) < TOLERANCE


def load_shares(rank: int, world: int, folder: str) -> list[Any]:
    """Experts held, and whether the model is that which transformers loads: patched, saved, unpatched."""
    plain = load(folder, f"{folder}/modules{rank}")
    ids = batch(rank, 2)
    own = {"trust_remote_code": True}
    found: list[Any] = []
    for options in (own, {"auto_class": type(plain)}):
        model = fluid_hf.from_pretrained(folder, FluidConfig(ep_size=world), **options)
        assert type(model) is type(plain)
        experts = sum(p.numel() for layer in model.fluid.layers.values() for p in layer.parameters())
        with torch.no_grad():
            error = relative_error(model(input_ids=ids).logits, plain.eval()(input_ids=ids).logits)
        model.save_pretrained(f"{folder}/shares")
        fluid_hf.unpatch_model(model)
        state = plain.state_dict()
        same = all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
        found.append((experts, error < TOLERANCE, same and len(model.state_dict()) == len(state)))
    return found


def test_loading_by_shares(pool2: RankPool, tmp_path: Path) -> None:
    folder = tmp_path / "shares_repository"
    write_repository(folder, "flat_pairs")
    half = 2 * (4 * 3 * 24 * 32) // 2  # two layers of four experts of three projections
    assert pool2.run(load_shares, str(folder)) == [[(half, True, True)] * 2] * 2
    saved = {path.name: path.read_bytes() for path in (folder / "shares").glob("*.safetensors")}
    assert saved == {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def train(rank: int, world: int, folder: str, stage: int, ep_size: int | None) -> tuple[list[Any], list[str]]:
    """Losses and gradient norms with DeepSpeed, and the names that are saved."""
    import deepspeed

    from fluid_hf.integrations.deepspeed import init_communication

    if not deepspeed.comm.is_initialized():  # as patching does it: nothing is compiled
        init_communication()
    model = build("pairs")
    if ep_size is not None:
        fluid_hf.patch_model(model, FluidConfig(ep_size=ep_size))
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "fluid": {"ep_size": ep_size} if ep_size else {},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    engine, *_ = deepspeed.initialize(model=model, config=settings, optimizer=optimizer, dist_init_required=False)
    curve = []
    for step in range(3):
        ids = batch(rank, 2, step=step)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        curve.append((float(loss.detach()), float(engine.get_global_grad_norm())))
    names = []
    if ep_size is not None:
        model.save_pretrained(f"{folder}/{stage}{ep_size}")
        names = list(code.TinyMoeForCausalLM.from_pretrained(f"{folder}/{stage}{ep_size}").state_dict())
    engine.destroy()
    return curve, names


@pytest.mark.parametrize(("stage", "ep_size"), [(1, 2), (3, 2), (3, 1)])
def test_deepspeed(pool2: RankPool, stage: int, ep_size: int, tmp_path: Path) -> None:
    expected = pool2.run(train, str(tmp_path), 1, None)
    for (ours, names), (theirs, _) in zip(pool2.run(train, str(tmp_path), stage, ep_size), expected, strict=True):
        for found, wanted in zip(ours, theirs, strict=True):
            assert found == pytest.approx(wanted, rel=1e-4)
        assert names == list(build("pairs").state_dict())


def test_an_unknown_loop_is_refused_until_a_forward_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("capacity")
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    with pytest.raises(fluid_hf.UnsupportedModelError, match=r"CapacityBlock.*method forward.*register_block"):
        fluid_hf.patch_model(model, FluidConfig(ep_size=1))
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        weights, index = torch.softmax(self.gate(flat), dim=-1).max(-1, keepdim=True)
        return self.experts(flat, index, weights).view(hidden_states.shape)

    monkeypatch.setattr(code.CapacityBlock, "_fluid_forward", None, raising=False)  # taken back after the test
    assert fluid_hf.register_block(code.CapacityBlock)(forward) is forward
    errors = compare(0, 1, "capacity")
    assert max(errors.values()) <= TOLERANCE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda block: setattr(block.experts[1].w1, "bias", nn.Parameter(torch.zeros(24))), "w1.bias"),
        (lambda block: setattr(block.experts[2], "w1", nn.Linear(32, 16, bias=False)), "2.w1.weight"),
        (lambda block: block.experts[1].w2.requires_grad_(False), "requires_grad"),
        (lambda block: block.experts[3].register_forward_hook(lambda *_: None), "hooks"),
        (lambda block: block.experts[3].w1.register_full_backward_hook(lambda *_: None), "hooks"),
        (lambda block: [setattr(e, "forward", lambda x: x) for e in block.experts], "forward"),
        (lambda block: setattr(block, "forward", lambda x: (x, x)), "replaced"),
        (lambda block: [e.w1.register_parameter("scale", nn.Parameter(torch.ones(1))) for e in block.experts], "scale"),
        (lambda block: setattr(block, "num_experts", 3), "range"),
    ],
)
def test_what_would_be_computed_differently_is_refused(change: Any, message: str) -> None:
    model = build("mask_loop")
    change(model.layers[1].mlp)
    with pytest.raises(fluid_hf.UnsupportedModelError, match=message):
        fluid_hf.patch_model(model, FluidConfig(ep_size=1))
    assert isinstance(model.layers[0].mlp.experts, nn.ModuleList)


# Each changes what the loop computes, and must not be taken for the sum over each token's experts.
PLANTED = [
    ("mask_loop", "permute(2, 1, 0)", "permute(2, 0, 1)"),
    ("mask_loop", "[top_x_list, idx_list, None]", "[idx_list, top_x_list, None]"),
    ("mask_loop", "if top_x.shape[0] == 0:", "if top_x.shape[0] < 4:"),
    ("mask_loop", "continue", "break"),
    ("mask_loop", "expert_layer(current_state) *", "expert_layer(current_state) +"),
    ("mask_loop", "expert_layer(current_state) *", "2 * expert_layer(current_state) *"),
    ("mask_loop", "range(self.num_experts)", "range(self.top_k)"),
    ("mask_loop", "index_add_(0, top_x,", "index_copy_(0, top_x,"),
    ("mask_loop", "    for expert_idx", "    selected_experts = selected_experts + 1\n    for expert_idx"),
    (
        "mask_loop",
        "        expert_layer =",
        "        hidden_states = hidden_states + 1\n        expert_layer =",
    ),
    ("mask_loop", "    return (", "    return (idx, "),
    ("mask_loop", "    return (", "    return (self.experts[0], "),
    ("hit_loop", ", 0).nonzero()", ", 1).nonzero()"),
    ("hit_loop", "torch.where(expert_mask[expert_idx].squeeze(0))", "torch.where(expert_mask[expert_idx - 1])"),
    ("pairs", "dim=0)\n        y =", "dim=1)\n        y ="),
    ("pairs", "hidden_states[flat_topk_idx == i]", "hidden_states[flat_topk_idx == i + 1]"),
    ("pairs", "* topk_weight.unsqueeze(-1)).sum(dim=1)", "* topk_weight.unsqueeze(-1)).sum(dim=0)"),
    ("pairs", "y.to(hidden_states.dtype)", "(y + hidden_states.mean())"),
    ("pairs", "topk_idx.view(-1)", "topk_idx.t().reshape(-1)"),
    ("equal_loop", "torch.where(selected == i)", "torch.where(selected != i)"),
    ("equal_loop", "token, nth =", "nth, token ="),
    ("equal_loop", "expert(inputs[token])", "expert(inputs[nth])"),
]


@pytest.mark.parametrize(("style", "old", "new"), PLANTED)
def test_loops_that_compute_something_else_are_not_replaced(style: str, old: str, new: str) -> None:
    block = build(style).layers[0].mlp
    function = function_source(type(block).forward)
    assert function is not None
    text = ast.unparse(function)
    attribute = "expert_list" if style == "equal_loop" else "experts"
    replace_loops(parsed(text), block, attribute)
    assert old in text
    with pytest.raises(UnknownLoopError):
        replace_loops(parsed(text.replace(old, new, 1)), block, attribute)


def parsed(text: str) -> ast.FunctionDef:
    """A function with the lines of its text."""
    node = ast.parse(text).body[0]
    assert isinstance(node, ast.FunctionDef)
    return node


def test_a_changed_method_of_evaluation_is_not_replaced() -> None:
    block = build("pairs").layers[0].mlp
    text = textwrap.dedent(inspect.getsource(inspect.unwrap(type(block).moe_infer)))
    for old, new in (
        ("num_tokens == 0", "num_tokens < 3"),
        ("argsort()", "argsort(descending=True)"),
        ("mul_", "add_"),
    ):
        with pytest.raises(UnknownLoopError):
            replace_loops(parsed(text.replace(old, new)), block, "experts")
    block.ep_rank = 1
    with pytest.raises(UnknownLoopError):
        replace_loops(parsed(text), block, "experts")
