"""transformers' expert parallelism: "fluid" gives the outputs, gradients and checkpoints of "all_to_all"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from distributed import RankPool, rank_pool
from families import batch, relative_error, tiny_model
from packaging.version import Version

pool2 = rank_pool(2)
pool4 = rank_pool(4)

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"), reason="transformers has no registered expert parallelism"
)
TOLERANCE = 1e-5


def tensor(value: torch.Tensor) -> torch.Tensor:
    """The whole of a distributed tensor."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def run_model(
    rank: int, folder: str, implementation: str, sizes: dict[str, int], saved: str
) -> dict[str, torch.Tensor]:
    """Output and gradients of a model loaded, run and saved by transformers."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    import fluid_hf.integrations.transformers_ep  # noqa: F401 - registers "fluid"

    config = DistributedConfig(**sizes, ep_implementation=implementation)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, dtype=torch.float32)
    model.train()
    shared = sizes.get("tp_size", 1)  # ranks with the same batch
    ids = batch(rank // shared, 1 + rank // shared)
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    found = {"logits": tensor(output.logits).detach(), "loss": output.loss.detach()}
    found.update({name: tensor(p.grad) for name, p in model.named_parameters() if p.grad is not None})
    model.save_pretrained(saved)
    with torch.no_grad():
        found["evaluated"] = tensor(model.eval()(input_ids=ids).logits)
    return found


def compare(rank: int, world: int, family: str, sizes: dict[str, int], folder: str) -> dict[str, float]:
    theirs = run_model(rank, f"{folder}/{family}", "all_to_all", sizes, f"{folder}/theirs")
    ours = run_model(rank, f"{folder}/{family}", "fluid", sizes, f"{folder}/ours")
    assert ours.keys() == theirs.keys()
    assert sum(".experts." in name for name in ours) == 4
    return {name: relative_error(ours[name], theirs[name]) for name in theirs}


def check(pool: RankPool, family: str, sizes: dict[str, int], tmp_path: Path) -> None:
    model = tiny_model(family, num_experts=4)
    model.save_pretrained(tmp_path / family)
    for errors in pool.run(compare, family, sizes, str(tmp_path)):
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] <= TOLERANCE, f"{worst} is off by {errors[worst]:.2e}"
    reloaded = type(model).from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(reloaded[name], weight) for name, weight in model.state_dict().items())


def run_windows(rank: int, world: int, folder: str) -> list[tuple[int, int]]:
    """Weight gradients computed inside and outside communication windows, for each layer."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig
    from transformers.distributed.expert_parallel import EPImplementationInterface

    from fluid_hf.integrations.transformers_ep import FluidEP

    made: list[FluidEP] = []

    class Recorded(FluidEP):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    EPImplementationInterface.register("recorded", Recorded)
    config = DistributedConfig(fsdp_size=world, ep_size=world, ep_implementation="recorded")
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, dtype=torch.float32)
    ids = batch(rank, 2)
    model(input_ids=ids, labels=ids).loss.backward()
    stats = [implementation.layer.context.scheduler.finish_batch() for implementation in made]
    return [(found.inside, found.outside) for found in stats]


def test_weight_gradients_run_in_windows_under_fsdp(pool2: RankPool, tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    assert pool2.run(run_windows, str(tmp_path)) == [[(2, 0), (2, 0)]] * 2


def run_extra_parameters(rank: int, world: int) -> None:
    import moe_families
    from torch.distributed.device_mesh import init_device_mesh

    from fluid_hf.integrations.transformers_ep import FluidEP

    model = moe_families.tiny_model("muse_spark")
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("tp", "ep"))
    experts = next(module for module in model.modules() if hasattr(module, "_apply_gate"))
    FluidEP(experts, mesh["ep"], mesh["tp"])


def test_parameters_that_fsdp_would_replace_are_refused(pool2: RankPool) -> None:
    message = pool2.expect("UnsupportedModelError", run_extra_parameters)[0]
    assert "post_expert_norm.weight" in message and "all_to_all" in message


WAYS: list[Any] = [{"fsdp_size": 2, "ep_size": 2}, {"tp_size": 2, "ep_size": 2}]


@pytest.mark.parametrize("sizes", WAYS, ids=str)
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_two_ranks(pool2: RankPool, family: str, sizes: dict[str, int], tmp_path: Path) -> None:
    check(pool2, family, sizes, tmp_path)


@pytest.mark.parametrize(
    "sizes",
    [
        {"fsdp_size": 4, "ep_size": 4},
        {"fsdp_size": 4, "ep_size": 2},
        {"fsdp_size": 2, "tp_size": 2, "ep_size": 4},
    ],
    ids=str,
)
def test_four_ranks(pool4: RankPool, sizes: dict[str, int], tmp_path: Path) -> None:
    check(pool4, "qwen3_moe", sizes, tmp_path)
