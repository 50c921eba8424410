"""The fault table: what every rank raises, and after how many seconds, when something goes wrong on one of them.

    python tests/faults.py                      all faults, a Markdown table
    python tests/faults.py --only killed        those whose name contains a word
    python tests/faults.py --json FILE          also writes the whole text of every rank

Each fault starts ranks of its own over gloo, because most of them end the process group.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed import Failure, RankPool
from families import batch, tiny_model
from torch import nn

import fluid_hf
from fluid_hf import FluidConfig
from fluid_hf.comm import calibration
from fluid_hf.moe import layer as moe_layer
from fluid_hf.moe.layer import WaveChoice

TIMEOUT = 4.0  # seconds a rank waits for another one
BAD = 1  # the rank on which it goes wrong


class Grad(torch.autograd.Function):
    """Calls something in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, action: Callable[[], None]) -> torch.Tensor:
        ctx.action = action
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.action()
        return grads[0], None


def build(world: int, family: str = "qwen3_moe", **settings: Any) -> Any:
    config = FluidConfig(**{"ep_size": world, "timeout_seconds": TIMEOUT, **settings})
    return fluid_hf.patch_model(tiny_model(family), config)


def step(model: Any, rank: int) -> None:
    ids = batch(rank // model.fluid.groups.sp_size, 2)
    if model.fluid.groups.sp_size > 1:
        piece = model.fluid.shard_batch({"input_ids": ids, "labels": ids})
        labels = piece.pop("shift_labels")
        model.fluid.sequence_loss(model(**piece).logits, labels).backward()
    else:
        model(input_ids=ids, labels=ids).loss.backward()
    model.fluid.finish_batch()
    model.fluid.reduce_gradients(model)
    model.fluid.clip_grad_norm_(model, 1.0)


def before(module: nn.Module, action: Callable[[], None]) -> None:
    """Run the action when the module's forward starts."""
    module.register_forward_pre_hook(lambda *args: action())


def in_backward(module: nn.Module, action: Callable[[], None]) -> None:
    """Run the action when the gradient of the module's output arrives."""
    module.register_forward_hook(lambda module, args, output: Grad.apply(output, action))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def complain() -> None:
    raise ValueError("the user's own error")


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory (as if)")


def linger() -> None:
    time.sleep(TIMEOUT * 10)


def spoil(value: float) -> Callable[[Any], None]:
    def act(model: Any) -> None:
        with torch.no_grad():
            model.model.layers[1].mlp.gate.weight[0, 0] = value

    return act


def misroute(model: Any) -> None:
    gate = model.model.layers[1].mlp.gate
    gate.register_forward_hook(lambda module, args, output: (*output[:-1], output[-1] + 1))


def between(model: Any) -> nn.Module:
    """Between attention and experts of the second layer."""
    module: nn.Module = model.model.layers[1].post_attention_layernorm
    return module


def run_step(rank: int, world: int, name: str, settings: dict[str, Any]) -> None:
    """Patch, go wrong on one rank, take a step."""
    model = build(world, **settings)
    if rank == BAD:
        STEP_FAULTS[name.partition(",")[0]](model)
    step(model, rank)


STEP_FAULTS: dict[str, Callable[[Any], None]] = {
    "NaN in router logits": spoil(float("nan")),
    "Inf in router logits": spoil(float("inf")),
    "top-k index out of range": misroute,
    "raises in forward": lambda model: before(between(model), complain),
    "raises in backward": lambda model: in_backward(between(model), complain),
    "out of memory in forward": lambda model: before(between(model), out_of_memory),
    "killed in forward": lambda model: before(between(model), die),
    "killed in backward": lambda model: in_backward(between(model), die),
    "hangs in forward": lambda model: before(between(model), linger),
    "hangs in backward": lambda model: in_backward(between(model), linger),
    "killed between counts and rows": lambda model: die_after(model, "post dispatch"),
    "killed between returned gradients": lambda model: die_after(model, "dgrad own"),
}


def die_after(model: Any, what: str) -> None:
    """Die after an event of the second layer."""
    model.model.layers[1].mlp.experts.context.record = lambda event: die() if event == what else None


def run_calibration(rank: int, world: int, name: str, settings: dict[str, Any]) -> None:
    """The first call of a layer measures the link, as on a GPU; go wrong on one rank meanwhile."""
    moe_layer.MEASURED = ("cpu",)
    model = build(world, **settings)
    if rank == BAD:
        method, action = CALIBRATION_FAULTS[name.partition(",")[0]]
        setattr(calibration._Load, method, lambda *args: action())
    step(model, rank)


CALIBRATION_FAULTS: dict[str, tuple[str, Callable[[], None]]] = {
    "out of memory in calibration": ("__init__", out_of_memory),
    "raises in calibration": ("message", complain),
    "killed in calibration": ("share_taken", die),
    "hangs in calibration": ("_multiply", linger),
}


def run_patch(rank: int, world: int, name: str, settings: dict[str, Any]) -> None:
    """Ranks that differ at patch time."""
    family, overrides, config = "qwen3_moe", {}, {"ep_size": world}
    if rank == BAD:
        overrides = {"hidden_size": 48} if name == "shapes differ" else {}
        config |= {"recompute": True} if name == "settings differ" else {}
        family = "mixtral" if name == "models differ" else family
    model = tiny_model(family, **overrides)
    if rank == BAD and name == "dtypes differ":
        model = model.bfloat16()
    fluid_hf.patch_model(model, FluidConfig(**config))


def run_one_rank_only(rank: int, world: int, name: str, settings: dict[str, Any]) -> None:
    """Calls of all ranks that one rank does not make."""
    model = build(world)
    if name == "saves on one rank only":  # as a callback under `if rank == 1` does, while the others train on
        if rank != BAD:
            step(model, rank)
        else:
            model.save_pretrained("/nonexistent/never/written")
    elif name == "does not save with the others":
        if rank != BAD:
            model.save_pretrained("/nonexistent/never/written")
    elif name == "generates without synchronisation":  # rank BAD stops after one token, the others go on
        tokens = 1 if rank == BAD else 9
        model.generate(batch(rank, 1, length=5), max_new_tokens=tokens, do_sample=False, synced_gpus=False)
    elif name == "one rank takes fewer steps":
        for _ in range(1 if rank == BAD else 2):
            step(model, rank)
    if rank == BAD:
        linger()


def run_unlike(rank: int, world: int, name: str, settings: dict[str, Any]) -> None:
    """One rank calls the layers in another way than the others."""
    model = build(world, **{"waves": 1, **settings})
    step(model, rank)  # rows of the next one leave before their counts are known
    fault = name.partition(",")[0]
    autocast = fault.startswith("autocast")
    if rank == BAD:
        {**UNLIKE, **SEQUENCE_UNLIKE}[fault](model)
    dtype = torch.bfloat16 if rank == BAD else torch.float16
    with torch.autocast("cpu", dtype, enabled=autocast and (rank == BAD or fault == "autocast dtypes differ")):
        step(model, rank)


def fewer_experts(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 1


def freeze(model: Any) -> None:
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].self_attn.requires_grad_(False)
    model.model.layers[0].mlp.gate.requires_grad_(False)
    model.model.layers[0].input_layernorm.requires_grad_(False)
    model.model.layers[0].post_attention_layernorm.requires_grad_(False)


def more_waves(model: Any) -> None:
    """As the planner may choose for evaluation, in which one rank is."""
    for layer in model.fluid.layers.values():
        layer.wave_choice = WaveChoice(3)


UNLIKE: dict[str, Callable[[Any], Any]] = {
    "autocast on one rank only": lambda model: None,
    "autocast dtypes differ": lambda model: None,
    "model.to(dtype) on one rank only": lambda model: model.bfloat16(),
    "fewer experts per token on one rank": fewer_experts,
    "frozen on one rank only": freeze,
    "waves differ": more_waves,
}


def hook_a_projection(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, output: None)


SEQUENCE_UNLIKE: dict[str, Callable[[Any], Any]] = {
    "autocast on one rank only": lambda model: None,
    "a hook on one rank's projection": hook_a_projection,
}
PATCH_FAULTS = ("settings differ", "models differ", "shapes differ", "dtypes differ")
LONE_FAULTS = (
    "saves on one rank only",
    "does not save with the others",
    "generates without synchronisation",
    "one rank takes fewer steps",
)
UNSPLIT = ("top-k index out of range", "NaN in router logits", "killed in backward", "out of memory in forward")
SEQUENCE = ("raises in forward", "killed in forward", "killed in backward", "hangs in backward")
FAULTS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    **{name: (run_step, {}) for name in STEP_FAULTS},
    **{name: (run_calibration, {}) for name in CALIBRATION_FAULTS},
    "killed in forward, serial exchange": (run_step, {"overlap": False}),
    **{f"{name}, ep_size 1": (run_step, {"ep_size": 1}) for name in UNSPLIT},
    **{name: (run_patch, {}) for name in PATCH_FAULTS},
    **{name: (run_one_rank_only, {}) for name in LONE_FAULTS},
    **{name: (run_unlike, {}) for name in UNLIKE},
    **{f"{name}, sp_size 2": (run_step, {"sp_size": 2}) for name in SEQUENCE},
    **{f"{name}, sp_size 2": (run_unlike, {"ep_size": 1, "sp_size": 2}) for name in SEQUENCE_UNLIKE},
}


def try_fault(name: str, world: int) -> tuple[dict[int, Failure], float]:
    """What each rank raised, and how long the last of the survivors took."""
    function, settings = FAULTS[name]
    pool = RankPool(world)
    try:
        pool.run(_ready)
        start = time.monotonic()
        for connection in pool._connections:
            connection.send((__file__, function.__name__, (name, settings), {}))
        results = pool._collect(30 * TIMEOUT, until={rank for rank in range(world) if rank != BAD})
        seconds = time.monotonic() - start
        if isinstance(results[BAD], Failure) and results[BAD].kind == "RankTimeoutError":
            if pool._connections[BAD].poll(1.0):  # it answered just after the others
                results[BAD] = pool._receive(BAD)
    finally:
        pool.close()
    return {rank: result for rank, result in results.items() if isinstance(result, Failure)}, seconds


def _ready(rank: int, world: int) -> None:
    tiny_model("qwen3_moe")
    dist.barrier()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=4, choices=[2, 4], help="ranks (default: 4)")
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--json", type=Path, help="file for what every rank raised")
    options = parser.parse_args()
    print("| fault on rank 1 | rank 1 raised | the others raised | seconds |\n|---|---|---|---|")
    good, report = True, []
    for name in FAULTS:
        if options.only in name:
            failures, seconds = try_fault(name, options.world)
            others = {rank: failure for rank, failure in failures.items() if rank != BAD}
            kinds = sorted({failure.kind for failure in others.values()})
            good &= len(others) == options.world - 1 and all(hasattr(fluid_hf, kind) for kind in kinds)
            own = failures[BAD].kind if BAD in failures else "(nothing)"
            text = next(iter(others.values())).message if others else ""
            texts = {rank: f"{failure.kind}: {failure.message}" for rank, failure in sorted(failures.items())}
            report.append({"fault": name, "on rank": BAD, "seconds": round(seconds, 1), "ranks": texts})
            print(f"| {name} | {own} | {', '.join(kinds)}: {text.splitlines()[0][:220]} | {seconds:.1f} |", flush=True)
    if options.json is not None:
        about = {"command": f"python tests/faults.py --world {options.world}", "date": str(datetime.date.today())}
        about |= {"torch": torch.__version__, "timeout_seconds": TIMEOUT}
        options.json.write_text(json.dumps({**about, "faults": report}, indent=1) + "\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
