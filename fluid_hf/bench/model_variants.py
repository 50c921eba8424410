"""The variants of a slice: ours, which share one patched model, and the peers' layers in the place of the experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fluid_hf.bench.model import ModelBench
from fluid_hf.bench.peers import autoep_layer, transformers_layer
from fluid_hf.config import FluidConfig
from fluid_hf.models.attention import find_attention
from fluid_hf.models.fused_parts import bind_parts, unbind_parts
from fluid_hf.models.sequence_parallel import SequenceParallel
from fluid_hf.moe.layer import WaveChoice
from fluid_hf.overlap.wgrad import WgradScheduler
from fluid_hf.patching import patch_model
from fluid_hf.process_groups import release_exchange_groups

__all__ = ["PEERS", "PeerExperts", "Switch", "Way", "patched", "peer_model", "release", "ways"]

PEERS: dict[str, Callable[..., tuple[Any, nn.Module]]] = {"AutoEP": autoep_layer, "AllToAllEP": transformers_layer}


@dataclass(frozen=True)
class Way:
    """How a patched model exchanges its rows; switched on it between two calls.

    Attributes:
        name: of the variant.
        overlap: in waves, with weight gradients in the windows; else one all-to-all each way and nothing beside it.
        waves: number of waves; `None` for the planner's choice.
        per_expert: one row per (token, expert), as peers send them.
        max_ctas: most thread blocks of NCCL; needs a model patched with it.
        wgrad: policy of the weight gradients; needs a model patched with it. `None` for the one by default.
        fused: norms, rotary embeddings and gated MLPs by one kernel each; else as transformers has them.
    """

    name: str
    overlap: bool = True
    waves: int | None = None
    per_expert: bool = False
    max_ctas: int | None = None
    wgrad: str | None = None
    fused: bool = True

    @property
    def settings(self) -> dict[str, Any]:
        """Of `FluidConfig`, which a model is patched with."""
        found = {"nccl_max_ctas": self.max_ctas, "wgrad": self.wgrad}
        return {name: value for name, value in found.items() if value is not None}


def ways(waves: Iterable[int] = (), max_ctas: Iterable[int] = (), wgrad: Iterable[str] = ()) -> list[Way]:
    """The baselines, the planner's choice, and what is timed beside them."""
    found = [Way("row per expert", overlap=False, per_expert=True), Way("serial", overlap=False), Way("fluid_hf")]
    found += [Way("fluid_hf, parts unfused", fused=False)]
    found += [Way(f"fluid_hf waves {count}", waves=count) for count in waves]
    found += [Way(f"fluid_hf wgrad {policy}", wgrad=policy) for policy in wgrad]
    return found + [Way(f"fluid_hf CTAs {count}", max_ctas=count) for count in max_ctas]


def patched(bench: ModelBench, **settings: Any) -> nn.Module:
    """The slice, patched, with all ranks as expert-parallel group unless told otherwise. Collective."""
    return patch_model(bench.build(), FluidConfig(**{"ep_size": bench.size, "sp_size": bench.part.sp, **settings}))


class Switch:
    """Lets a patched model work in one way after the other; what a way measured and chose at first stays chosen."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._choices: dict[str, WaveChoice] = {}
        self._sequences: dict[str, SequenceParallel] = {}

    def to(self, way: Way) -> None:
        """Work in that way from now on."""
        model, state = self._model, self._model.fluid
        scheduler = state.scheduler if way.overlap else WgradScheduler("off")
        choice = self._choices.setdefault(way.name, WaveChoice(way.waves))
        for layer in state.layers.values():
            layer.context.overlap, layer.context.scheduler, layer.wave_choice = way.overlap, scheduler, choice
            vars(layer).pop("forward", None)
            if way.per_expert:
                layer.forward = _one_row_per_expert(layer.forward)
        unbind_parts(model)
        if state.sequence is not None:
            state.sequence.detach()
            if way.name not in self._sequences:
                sites = find_attention(model, state.groups.sp_size)
                self._sequences[way.name] = SequenceParallel(
                    model, sites, state.sequence_exchange, scheduler, overlap=way.overlap, chunks=way.waves
                )
            state.sequence = self._sequences[way.name]
            state.sequence.attach()
        if way.fused:
            bind_parts(model)


def release(model: Any) -> None:
    """Close the groups that patching opened; the model is not used any more."""
    state = getattr(model, "fluid", None)
    if state is not None:
        state.control.close()
        release_exchange_groups(state.groups)


def peer_model(bench: ModelBench, name: str) -> nn.Module:
    """The slice with a peer's layers for experts and all else as transformers has it; sequences are cut by plain
    all-to-alls around the core attention.
    """
    model: Any = patched(bench, ep_size=1, overlap=False) if bench.part.sp > 1 else bench.build()
    if bench.part.sp > 1:
        unbind_parts(model)
    local = bench.shape.experts // bench.size
    held = slice(bench.rank * local, (bench.rank + 1) * local)
    blocks: list[Any] = [module for module in model.modules() if hasattr(module, "experts")]
    for block in blocks:
        weights = (block.experts.gate_up_proj.data[held].clone(), block.experts.down_proj.data[held].clone())
        block.experts = PeerExperts(*PEERS[name](bench.shape, *weights))
    return model


class PeerExperts(nn.Module):
    """Experts of a peer in the place of the block's own."""

    def __init__(self, call: Callable[..., torch.Tensor], module: nn.Module) -> None:
        super().__init__()
        self._call = [call]  # a list: the call may be a module that holds `module` already
        self.module = module

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        # transformers' all-to-all returns the type of the routing weights, which is float32 in Mixtral.
        return self._call[0](hidden, index, weights).to(hidden.dtype)


def _one_row_per_expert(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same layer with every (token, expert) pair as a token of its own."""

    def forward(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, between: Any = None) -> Any:
        top_k = index.shape[1]
        rows = hidden[:, None].expand(-1, top_k, -1).reshape(-1, hidden.shape[1])
        output = call(rows, index.reshape(-1, 1), weights.reshape(-1, 1)).view(-1, top_k, hidden.shape[1]).sum(1)
        return output if between is None else (output, between())

    return forward
