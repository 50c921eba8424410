"""What users do around forward and backward, on patched models: as on the unpatched one, or a named error."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from distributed import RankPool, rank_pool
from families import batch, relative_error, tiny_model
from test_equivalence import TOLERANCE
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune

import fluid_hf
from fluid_hf import ConfigError, FluidConfig, GradientError, UnsupportedModelError
from fluid_hf.checkpoint.gather import gather_experts

pool2 = rank_pool(2)
Outputs = dict[str, torch.Tensor]


def loss_of(model: Any, rank: int, step: int = 0, rows: int = 2, length: int = 9) -> torch.Tensor:
    ids = batch(rank, rows, length=length, step=step)
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def two_forwards(model: Any, rank: int) -> Outputs:
    first, second = loss_of(model, rank), loss_of(model, rank, 1)
    (first + 2 * second).backward()
    third, fourth = loss_of(model, rank, 2), loss_of(model, rank, 3)
    fourth.backward()
    third.backward()
    return {"first": first, "fourth": fourth}


def twice_through_one_graph(model: Any, rank: int) -> Outputs:
    loss = loss_of(model, rank)
    loss.backward(retain_graph=True)
    loss.backward()
    return {"loss": loss}


def evaluation_between(model: Any, rank: int) -> Outputs:
    """Between steps and between a forward and its backward; without gradients in other ways; with a generation."""
    loss_of(model, rank).backward()
    model.eval()
    with torch.no_grad():
        quiet = loss_of(model, rank, 1, rows=1)
    tokens = model.generate(batch(rank, 1, length=4), max_new_tokens=3, do_sample=False)
    model.train()
    loss = loss_of(model, rank, 2)
    with torch.inference_mode():
        inferred = loss_of(model, rank, 3, length=5)
    model.eval()
    loss.backward()
    return {"quiet": quiet, "tokens": tokens.double(), "inferred": inferred.clone()}


def checkpointing_flips(model: Any, rank: int) -> Outputs:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for step, training in enumerate((True, False, True)):
        model.train(training)
        loss_of(model, rank, step).backward()
    model.gradient_checkpointing_disable()
    loss_of(model, rank, 4).backward()
    return {}


def batches_shrink(model: Any, rank: int) -> Outputs:
    for step, rows in enumerate((3, 3, 1 + rank)):
        loss_of(model, rank, step, rows, 5 + step + 2 * rank).backward()
    return {}


def freezing_and_thawing(model: Any, rank: int) -> Outputs:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" not in name)
    loss_of(model, rank).backward()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.mlp.experts" in name)
    loss_of(model, rank, 1).backward()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    loss_of(model, rank, 2).backward()
    model.model.layers[0].requires_grad_(False)  # an optimizer steps by the gradients that they have all the same
    model.lm_head.requires_grad_(False)
    return {}


def computed_dense_weights(model: Any, rank: int) -> Outputs:
    """Computed anew each time that they are asked for, once a forward pass: spectral norm's iteration goes on."""
    one, two = model.model.layers
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for linear in (one.self_attn.q_proj, two.self_attn.o_proj, two.self_attn.v_proj):
            parametrizations.spectral_norm(linear)
    parametrizations.weight_norm(two.mlp.gate)
    prune.l1_unstructured(two.self_attn.k_proj, "weight", 0.3)
    first = loss_of(model, rank)
    first.backward()
    second = loss_of(model, rank, 1)
    second.backward()
    return {"first": first, "second": second}


def gradients_of_inputs(model: Any, rank: int) -> Outputs:
    embedded = model.get_input_embeddings()(batch(rank, 2)).detach().requires_grad_()
    if hasattr(model, "fluid"):
        model.fluid.scheduler.disable()
    (grad,) = torch.autograd.grad(model(inputs_embeds=embedded).logits.square().mean(), embedded)
    if hasattr(model, "fluid"):
        model.fluid.scheduler.enable()
    loss_of(model, rank).backward()
    return {"grad": grad}


def double_gradient(parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad *= 2


def hooks(model: Any, rank: int) -> Outputs:
    experts, other = (layer.mlp.experts for layer in model.model.layers)
    handles = [parameter.register_hook(lambda grad: grad * 3) for parameter in experts.parameters()]
    handles += [p.register_post_accumulate_grad_hook(double_gradient) for p in other.parameters()]
    handles.append(experts.register_forward_hook(lambda module, args, output: output * 2))
    handles.append(other.register_forward_pre_hook(lambda module, args: (args[0] / 2, *args[1:])))
    handles.append(
        other.register_full_backward_hook(lambda module, grads, _: tuple(g if g is None else 2 * g for g in grads))
    )
    loss_of(model, rank).backward()
    for handle in handles:
        handle.remove()
    return {}


def saved_tensors_elsewhere(model: Any, rank: int) -> Outputs:
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(model, rank)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    return {}


def other_weights(model: Any, rank: int) -> Outputs:
    """Values that change between steps, a type that changes and comes back, parameters that are computed."""
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    loss_of(model.bfloat16(), rank)
    model.float().load_state_dict(kept)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    loss_of(model, rank).backward()
    model.load_state_dict(kept)
    computed = {name: parameter * 0.7 for name, parameter in model.named_parameters()}
    ids = batch(rank, 2)
    functional_call(model, computed, kwargs={"input_ids": ids, "labels": ids}).loss.backward()
    return {}


def experts_alone(model: Any, rank: int) -> Outputs:
    """Strides, expanded weights, an expert twice in a token's list, no tokens."""
    experts, generator = model.model.layers[0].mlp.experts, torch.Generator().manual_seed(rank)
    hidden = torch.randn(32, 6, generator=generator).t().requires_grad_()
    index = torch.tensor([[0, 3, 1, 2, 2, 0], [1, 0, 2, 3, 2, 0]]).t()
    outputs = [experts(hidden, index, torch.rand(2, 6, generator=generator).t())]
    outputs.append(experts(hidden, index, torch.full((1, 1), 0.3).expand(6, 2)))
    outputs.append(experts(hidden[: 3 * rank], index[: 3 * rank], torch.ones(3 * rank, 2)))
    torch.cat(outputs).square().sum().backward()
    return {"outputs": torch.cat(outputs), "grad": hidden.grad}


WAYS: list[Callable[[Any, int], Outputs]] = [
    two_forwards,
    twice_through_one_graph,
    evaluation_between,
    checkpointing_flips,
    batches_shrink,
    freezing_and_thawing,
    computed_dense_weights,
    gradients_of_inputs,
    hooks,
    saved_tensors_elsewhere,
    other_weights,
    experts_alone,
]
SETTINGS: list[dict[str, Any]] = [{}, {"wgrad": "cross_layer", "waves": 2}, {"overlap": False, "recompute": True}]


def run_way(rank: int, world: int, number: int, settings: dict[str, Any]) -> dict[str, float]:
    """Relative errors of outputs and gradients; the plain model does on every rank's batch what the ranks do."""
    way = WAYS[number]
    expected: list[Outputs] = []
    grads: dict[str, Any] = {}
    for other in range(world):
        plain = tiny_model("qwen3_moe").train()
        expected.append(way(plain, other))
        for name, parameter in plain.named_parameters():
            grads[name] = grads.get(name, 0) + (0 if parameter.grad is None else parameter.grad)
    model: Any = fluid_hf.patch_model(tiny_model("qwen3_moe").train(), FluidConfig(ep_size=world, **settings))
    errors = {name: relative_error(value, expected[rank][name]) for name, value in way(model, rank).items()}
    model.fluid.finish_batch()
    model.fluid.reduce_gradients(model)
    inside = tuple(model.fluid.layers) if world > 1 else ()
    found = {n: p.grad for n, p in model.named_parameters() if not (inside and n.startswith(inside))}
    for name, layer in model.fluid.layers.items() if inside else ():
        for parameter in layer.parameters():
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found |= {f"{name}.{weight}": grad for weight, grad in gather_experts(layer, model.fluid, to_all=True).items()}
    for name, grad in found.items():
        assert grad is not None or not isinstance(grads[name], torch.Tensor), name
        if isinstance(grads[name], torch.Tensor) and float(grads[name].norm()) > 1e-8:
            errors[name] = relative_error(grad * world, grads[name])
    assert len(errors) >= 3
    fluid_hf.unpatch_model(model)
    return errors


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_as_the_unpatched_model(pool2: RankPool, way: Callable[[Any, int], Outputs], settings: dict[str, Any]) -> None:
    number = WAYS.index(way)
    alone = [run_way(0, 1, number, settings)] if settings == {} else []
    for errors in alone + pool2.run(run_way, number, settings):
        name = max(errors, key=lambda key: errors[key])
        assert errors[name] <= TOLERANCE, f"{name} is off by {errors[name]:.2e}"


def run_hooks_in_attention(rank: int, world: int) -> float:
    """Hooks on projections and norms of layers whose code is known; weights that are computed, once a forward pass."""
    losses, gradients = [], []
    ids = batch(0, 2, length=8)
    for patched in (False, True):
        model: Any = tiny_model("qwen3_moe").train()
        if patched:
            fluid_hf.patch_model(model, FluidConfig(ep_size=1, sp_size=world))
        first, second = (layer.self_attn for layer in model.model.layers)
        double: Callable[..., Any] = lambda module, grads, _: tuple(2 * grad for grad in grads)  # noqa: E731
        first.q_proj.register_full_backward_hook(double)
        second.k_norm.register_full_backward_hook(double)
        second.q_norm.register_forward_hook(lambda module, args, output: 2 * output)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            parametrizations.spectral_norm(first.o_proj)
        for computed in (False, True):
            weights = {name: weight * 0.8 for name, weight in model.named_parameters()} if computed else {}
            if patched:
                piece = model.fluid.shard_batch({"input_ids": ids, "labels": ids})
                labels = piece.pop("shift_labels")
                logits = functional_call(model, weights, kwargs=piece).logits
                loss = model.fluid.sequence_loss(logits, labels)
            else:
                loss = functional_call(model, weights, kwargs={"input_ids": ids, "labels": ids}).loss
            loss.backward()
            losses.append(loss)
        if patched:
            model.fluid.reduce_gradients(model)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    fluid_hf.unpatch_model(model)
    expected, found = torch.stack(losses).detach().view(2, 2)
    return max(relative_error(found, expected), relative_error(gradients[1], gradients[0]))


def test_hooks_in_attention(pool2: RankPool) -> None:
    assert max(pool2.run(run_hooks_in_attention)) <= TOLERANCE


def run_refusals(rank: int, world: int) -> None:
    """Each is refused before it does harm, and the next step is right."""
    model: Any = fluid_hf.patch_model(tiny_model("qwen3_moe"), FluidConfig(ep_size=world))
    with pytest.raises(GradientError, match=r"create_graph \(True\) must be False .* layer model.layers.1.mlp.experts"):
        loss_of(model, rank).backward(create_graph=True)
    loss = loss_of(model, rank)
    with torch.no_grad():
        next(model.model.layers[1].mlp.experts.parameters()).add_(0)
    with pytest.raises(GradientError, match=r"layers.1.mlp.experts \(changed in place 1 times since forward\) must"):
        loss.backward()
    ids = batch(rank, 2)
    with pytest.raises(GradientError, match=r"must be called outside torch.func transforms"):
        torch.func.grad(lambda x: model(inputs_embeds=x).logits.sum())(model.get_input_embeddings()(ids).detach())
    for copied in (copy.deepcopy, lambda model: torch.save(model, io.BytesIO())):
        for part in (model, model.model.layers[0]) if world > 1 else (model,):
            with pytest.raises(UnsupportedModelError, match="cannot be copied or pickled"):
                copied(part)
    model.zero_grad()
    loss_of(model, rank).backward()
    model.fluid.finish_batch()
    fluid_hf.unpatch_model(model)
    torch.testing.assert_close(copy.deepcopy(model).state_dict(), tiny_model("qwen3_moe").state_dict())


def test_refused(pool2: RankPool) -> None:
    run_refusals(0, 1)
    pool2.run(run_refusals)


def run_computed_experts(rank: int, world: int, frozen: bool, how: str) -> None:
    """Weights of experts that are computed: with all experts here as unpatched; of a share they would be others."""
    losses = []
    for patched in (False, True):
        model: Any = tiny_model("qwen3_moe")
        model.model.layers[0].mlp.experts.requires_grad_(not frozen)  # DeepSpeed's module holds those in training
        if patched:
            fluid_hf.patch_model(model, FluidConfig(ep_size=world))
        experts = model.model.layers[0].mlp.experts
        place, _, weight = next(iter(experts.named_parameters()))[0].rpartition(".")
        if how == "pruned":
            prune.l1_unstructured(experts.get_submodule(place), weight, 0.3)
        else:
            parametrize.register_parametrization(experts.get_submodule(place), weight, torch.nn.Softsign())
        if patched and world > 1:
            with pytest.raises(ConfigError, match=r"model.layers.0.mlp.experts must be a parameter while ep_size"):
                loss_of(model, rank)
            return
        (loss_of(model, rank) + loss_of(model, rank, 1)).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        losses.append(loss_of(model, rank, 2))
    assert relative_error(losses[1], losses[0]) <= TOLERANCE


@pytest.mark.parametrize("how", ["pruned", "parametrized"])
@pytest.mark.parametrize("frozen", [False, True])
def test_computed_experts(pool2: RankPool, frozen: bool, how: str) -> None:
    run_computed_experts(0, 1, frozen, how)
    pool2.run(run_computed_experts, frozen, how)


def run_shared(rank: int, world: int, what: str) -> None:
    model: Any = tiny_model("qwen3_moe")
    first, second = (layer.mlp for layer in model.model.layers)
    if what == "module":
        second.experts = first.experts
    else:
        second.experts.down_proj = first.experts.down_proj
    fluid_hf.patch_model(model, FluidConfig(ep_size=world))


@pytest.mark.parametrize("what", ["module", "weight"])
def test_experts_of_two_layers_are_not_split(pool2: RankPool, what: str) -> None:
    for text in pool2.expect("UnsupportedModelError", run_shared, what):
        assert "experts of model.layers.0.mlp.experts must not be those of another layer too" in text


def run_unpatch_after_pruning(rank: int, world: int, family: str, settings: dict[str, Any]) -> float:
    """Decoder layers are taken out and change places while the model is patched: the difference of its outputs then."""
    model, expected = (tiny_model(family, num_hidden_layers=4) for _ in range(2))
    fluid_hf.patch_model(model, FluidConfig(**settings))
    outputs = []
    for pruned in (model, expected):
        first, _, third, last = pruned.model.layers
        pruned.model.layers = torch.nn.ModuleList([last, third, first])
        pruned.config.num_hidden_layers = 3
    fluid_hf.unpatch_model(model)
    for pruned in (model, expected):
        outputs.append(pruned(batch(rank, 2), use_cache=False).logits)
    assert [*model.state_dict()] == [*expected.state_dict()]
    assert not any("forward" in vars(module) for module in model.modules())
    return relative_error(*outputs)


@pytest.mark.parametrize("settings", [{"ep_size": 2, "wgrad": "cross_layer"}, {"ep_size": 1, "sp_size": 2}], ids=str)
def test_unpatch_without_some_layers(pool2: RankPool, settings: dict[str, Any]) -> None:
    assert max(pool2.run(run_unpatch_after_pruning, "qwen2_moe", settings)) <= TOLERANCE
