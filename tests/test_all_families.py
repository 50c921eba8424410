"""Every model folder of transformers with experts: two ranks against one process, or a reason why not."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import Any

import moe_families
import pytest
import torch
import transformers
from distributed import ROOT, RankPool, rank_pool
from families import relative_error
from packaging.version import Version
from shared_windows import misplaced, record_shared
from transformers import PreTrainedModel

import fluid_hf
from fluid_hf import FluidConfig
from fluid_hf.checkpoint.gather import as_stored, gather_experts
from fluid_hf.commands import models
from fluid_hf.models.attention import find_attention
from fluid_hf.moe.layer import ExpertParallelLayer
from fluid_hf.patching import _attention_description

pool2 = rank_pool(2)

FOLDERS = moe_families.folders()
RECENT = Version(transformers.__version__) >= Version("5.23")
TOLERANCE = 1e-5
# In float64, so that a sensitive model does not amplify roundings; these have float32 in their code.
FLOAT32 = ("inkling", "inkling2")
# Shared experts are in a part of the model that is not built here: the talker, whose block is Qwen2-MoE's.
OTHER_PART = ("qwen3_omni_moe",)


def ids_of(rank: int) -> torch.Tensor:
    """Batches of different sizes."""
    return torch.randint(3, 90, (1 + rank, 12), generator=torch.Generator().manual_seed(rank))


def run(model: torch.nn.Module, ids: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and gradient of the embedded inputs, for a loss that is another weighted sum for each batch."""
    embedded: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    hook = model.get_input_embeddings().register_forward_hook(keep)
    output = model(input_ids=ids)[0]
    hook.remove()
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(index), dtype=output.dtype)
    (output * direction).sum().backward()
    assert embedded[0].grad is not None
    return output.detach(), embedded[0].grad


def build(folder: str) -> PreTrainedModel:
    """The tiny model of a folder."""
    model = moe_families.tiny_model(folder)
    return model if folder in FLOAT32 else model.double()


def check_family(rank: int, world: int, folder: str, has_shared: bool) -> dict[str, float]:
    """Worst relative errors of one family, patched on this rank against unpatched on all ranks' batches.

    Shared experts, if it has any, must run in the communication window.
    """
    batches = [ids_of(other) for other in range(world)]
    expected = build(folder)
    # One batch after the other, as the ranks have them: the same roundings outside the experts.
    reference = [run(expected, ids, index) for index, ids in enumerate(batches)]
    model = build(folder)
    fluid_hf.patch_model(model, FluidConfig(ep_size=world))
    with record_shared(model) as events:
        output, grad = run(model, batches[rank], rank)
    assert bool(events) == (has_shared and folder not in OTHER_PART)
    for name, found_events in events.items():
        assert misplaced(found_events) == [], (name, found_events)
    model.fluid.finish_batch()
    model.fluid.reduce_gradients(model)
    errors = {"output": relative_error(output, reference[rank][0]), "input": relative_error(grad, reference[rank][1])}
    wanted = {name: p.grad for name, p in expected.named_parameters() if p.grad is not None}
    split = {id(p) for layer in model.fluid.layers.values() for p in layer.split_parameters()}
    found = {name: p.grad * world for name, p in model.named_parameters() if id(p) not in split and name in wanted}
    for name, layer in model.fluid.layers.items():
        for parameter in layer.split_parameters():  # gather the gradients the way weights are gathered
            parameter.data = parameter.grad * world
        gathered = gather_experts(layer, model.fluid, to_all=True)
        found.update(as_stored(model, {f"{name}.{weight}": gradient for weight, gradient in gathered.items()}))
        if folder == "longcat_flash":  # rows that no expert has, which are kept beside the weights
            found[f"{name}.gate_up_proj"][layer.num_experts :] = 0
    for name in found.keys() - wanted.keys():  # experts that no token reached: zero instead of none
        assert not found.pop(name).any(), name
    assert found.keys() == wanted.keys(), wanted.keys() - found.keys()
    errors.update({name: relative_error(gradient, wanted[name]) for name, gradient in found.items()})
    fluid_hf.unpatch_model(model)
    return errors


FORMATS = [
    pytest.param(
        folder,
        marks=pytest.mark.skipif(not RECENT and folder not in FOLDERS, reason=f"this transformers has no {folder}"),
    )
    for folder in ("gpt_oss", "nemotron_h", "llama4", "muse_spark", "deepseek_v4", "dbrx", "longcat_flash")
]


def train(rank: int, world: int, folder: str, stage: int, patched: bool, leaf: str = "") -> list[tuple[float, float]]:
    """Losses and gradient norms of a few steps with DeepSpeed; modules of the class `leaf` are gathered as a whole."""
    import deepspeed
    from deepspeed.utils import set_z3_leaf_module

    from fluid_hf.integrations.deepspeed import init_communication

    if not deepspeed.comm.is_initialized():  # as patching does it: nothing is compiled
        init_communication()
    model = moe_families.tiny_model(folder)
    if patched:
        fluid_hf.patch_model(model, FluidConfig(ep_size=world))
        assert not leaf or model.fluid.bound_blocks
    for module in model.modules() if leaf else ():
        set_z3_leaf_module(module, type(module).__name__ == leaf or isinstance(module, ExpertParallelLayer))
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "fluid": {"ep_size": world} if patched else {},
    }
    engine, *_ = deepspeed.initialize(
        model=model, config=settings, optimizer=torch.optim.SGD(model.parameters(), lr=0.05), dist_init_required=False
    )
    curve = []
    for step in range(3):
        ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(10 * step + rank))
        loss = engine(input_ids=ids)[0].float().square().mean()
        engine.backward(loss)
        engine.step()
        torch.distributed.all_reduce(loss := loss.detach())
        curve.append((float(loss), float(engine.get_global_grad_norm())))
    engine.destroy()
    return curve


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("folder", FORMATS)
def test_deepspeed(pool2: RankPool, folder: str, stage: int) -> None:
    """Experts of every format under the three names that DeepSpeed reads."""
    expected = pool2.run(train, folder, 1, False)[0]
    for curve in pool2.run(train, folder, stage, True):
        for ours, theirs in zip(curve, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("leaf", ["", "GraniteMoeSharedMoE"])
def test_zero_3_with_a_shared_expert_beside_the_block(pool2: RankPool, leaf: str) -> None:
    expected = pool2.run(train, "granitemoeshared", 1, False)[0]
    for curve in pool2.run(train, "granitemoeshared", 3, True, leaf):
        for ours, theirs in zip(curve, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


def save(rank: int, world: int, folder: str, directory: str) -> bool:
    """Whether a patched model's checkpoint holds what the unpatched one's does."""
    model = fluid_hf.patch_model(moe_families.tiny_model(folder), FluidConfig(ep_size=world))
    fluid_hf.save_pretrained(model, directory)
    fluid_hf.unpatch_model(model)
    expected = moe_families.tiny_model(folder)
    reloaded = type(expected).from_pretrained(directory).state_dict()
    same = {name: torch.equal(reloaded[name], tensor) for name, tensor in expected.state_dict().items()}
    unpatched = {name: torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.state_dict().items()}
    return all(same.values()) and all(unpatched.values())


@pytest.mark.parametrize("folder", FORMATS)
def test_checkpoint(pool2: RankPool, folder: str, tmp_path: Path) -> None:
    assert pool2.run(save, folder, str(tmp_path / folder)) == [True, True]


@pytest.fixture(scope="module")
def listed() -> dict[str, fluid_hf.SupportedModel]:
    return {model.family: model for model in fluid_hf.supported_models()}


def test_every_folder_with_experts_is_listed(listed: dict[str, fluid_hf.SupportedModel]) -> None:
    """A new family must be served, which `test_family` shows, or be listed with a reason."""
    assert [family for family, model in listed.items() if model.served] == FOLDERS
    assert all(model.served or len(model.reason) > 20 for model in listed.values())
    assert all(model.shared_expert in ("overlapped", "none") for model in listed.values())
    text = {path.parent.name: path.read_text("utf-8") for path in moe_families.MODELS.glob("*/modeling_*.py")}
    routed = {name for name, source in text.items() if re.search(r"class \w*Experts?\w*\(|num_experts_per_tok", source)}
    assert routed <= listed.keys(), routed - listed.keys()
    if RECENT:
        assert sum(model.served for model in listed.values()) >= 64


@pytest.mark.skipif(not RECENT, reason="the page is of transformers 5.23")
def test_page_of_models_is_up_to_date() -> None:
    assert (ROOT / "examples" / "guides" / "models.md").read_text("utf-8") == models.page()


@pytest.mark.skipif(not RECENT, reason="the list is of transformers 5.23")
@pytest.mark.parametrize("folder", FOLDERS)
def test_sequence_parallel_is_as_listed(listed: dict[str, fluid_hf.SupportedModel], folder: str) -> None:
    model = moe_families.tiny_model(folder)
    try:
        find_attention(model, 2)
    except fluid_hf.UnsupportedModelError:
        assert not listed[folder].sequence_parallel
    else:
        assert listed[folder].sequence_parallel
        assert len(_attention_description(model, FluidConfig(sp_size=2))) > 5  # ranks can compare its settings


def check_all(rank: int, world: int, folders: dict[str, bool]) -> dict[str, Any]:
    """Errors by family; the text of an exception for a family that raised."""
    found: dict[str, Any] = {}
    for folder, has_shared in folders.items():
        try:
            found[folder] = check_family(rank, world, folder, has_shared)
        except Exception:
            found[folder] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def results(pool2: RankPool, listed: dict[str, fluid_hf.SupportedModel]) -> list[dict[str, Any]]:
    return pool2.run(check_all, {folder: listed[folder].shared_expert != "none" for folder in FOLDERS})


@pytest.mark.parametrize("folder", FOLDERS)
def test_family(results: list[dict[str, Any]], folder: str) -> None:
    for rank, result in enumerate(results):
        errors = result[folder]
        assert isinstance(errors, dict), errors
        name = max(errors, key=lambda key: errors[key])
        assert errors[name] <= TOLERANCE, f"rank {rank}: {name} is off by {errors[name]:.2e}"
