"""All weights of a patched model under transformers' names, one after the other; experts gathered from their ranks.

Experts that the model stores otherwise, such as a list of modules, go through here as tensors of all of them, too;
`as_stored` makes of them what the model's checkpoints have.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from fluid_hf.checkpoint.files import TensorSpec
from fluid_hf.comm.reduce import in_time
from fluid_hf.errors import CheckpointError
from fluid_hf.moe.layer import ExpertParallelLayer
from fluid_hf.state import FluidState

__all__ = [
    "as_stored",
    "check_whole",
    "gather_experts",
    "held_elsewhere",
    "iterate_weights",
    "local_weights",
    "share_of_whole",
    "stack_stored",
    "trained_weights",
    "weight_specs",
]


def split_layers(model: nn.Module) -> dict[str, ExpertParallelLayer]:
    """Layers whose weights are not the model's as they are, by their name in `model` (which may wrap the patched one).

    This rank holds a share only, or the model stores its experts otherwise.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, ExpertParallelLayer)}
    return {name: layer for name, layer in layers.items() if layer.ep_size > 1 or layer.unstack is not None}


def as_stored(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the names and in the shapes of the unpatched model, views where that can be."""
    layers, found = split_layers(model), dict[str, torch.Tensor]()
    for name, tensor in tensors.items():
        parent, _, weight = name.rpartition(".")
        layer = layers.get(parent)
        if layer is not None and layer.unstack is not None and weight in layer.weight_names:
            found.update({f"{parent}.{key}": value for key, value in layer.unstack(weight, tensor).items()})
        else:
            found[name] = tensor
    return found


def stack_stored(
    layer: ExpertParallelLayer, state_dict: MutableMapping[str, torch.Tensor], prefix: str, *_: Any
) -> None:
    """Before `load_state_dict`: this rank's experts under the layer's names, in place of all as the model stores them.

    Raises:
        CheckpointError: a tensor of some expert is missing or has another shape; names it.
    """
    assert layer.unstack is not None and layer.stack is not None
    held, stored = _held_specs(layer), dict[str, dict[str, torch.Tensor]]()
    for name, share in held.items():
        stored[name] = layer.unstack(name, share.new_empty((layer.num_experts, *share.shape[1:])))
    expected = {key: tensor.shape for parts in stored.values() for key, tensor in parts.items()}
    given = {key: state_dict[prefix + key] for key in expected if prefix + key in state_dict}
    if all(key in held and tensor.shape == held[key].shape for key, tensor in given.items()):
        return  # none, or the layer's own under equal names
    for key, shape in expected.items():
        if key not in given or given[key].shape != shape:
            found = f"has shape {list(given[key].shape)}" if key in given else "is not there"
            raise CheckpointError(
                f"tensor ({prefix}{key}) must have shape {list(shape)} in the state dict but {found}; load all experts "
                "of the layer, as the unpatched model's state dict has them."
            )
    start = layer.ep_rank * layer.num_local_experts
    mine = slice(start, start + layer.num_local_experts)
    weights = {name: layer.stack(name, given, mine) for name in stored}
    for key in given:
        del state_dict[prefix + key]
    state_dict.update({prefix + key: value for key, value in layer.own_weights(weights).items()})


def held_elsewhere(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a rank that holds none of what another one saves; `share_of_whole` tells it from others."""
    nothing: Any = OrderedDict[str, torch.Tensor]()
    nothing._metadata = {name: {"held_elsewhere": True} for name in split_layers(model)}  # as torch's own have
    found: dict[str, torch.Tensor] = nothing
    return found


def share_of_whole(state: FluidState) -> Callable[..., None]:
    """What takes this rank's experts out of the unpatched model's, before `load_state_dict` of a layer.

    Raises, when it is called:
        CheckpointError: an engine drives the model, and would not know of the weights; or not all experts are there.
    """
    find_state = weakref.ref(state)  # the layer must not keep alive what keeps it alive

    def take(
        layer: ExpertParallelLayer,
        state_dict: MutableMapping[str, torch.Tensor],
        prefix: str,
        metadata: Mapping[str, Any],
        *_: Any,
    ) -> None:
        held, owner = _held_specs(layer) if layer.unstack is None else {}, find_state()
        given = {name: state_dict[prefix + name] for name in held if prefix + name in state_dict}
        own = all(tensor.shape == held[name].shape for name, tensor in given.items())  # under equal names; or none
        if metadata.get("held_elsewhere") or (not own and owner is not None and owner.engine_bound):
            raise CheckpointError(
                f"experts of layer {layer.context.name} must be loaded by the engine that drives the model: its state "
                "dict is whole, on rank 0 alone, and for saving; use engine.load_checkpoint, or load plain weights "
                "before deepspeed.initialize."
            )
        if own:
            return
        for name, share in held.items():
            shape = [layer.num_experts, *share.shape[1:]]
            if name not in given or list(given[name].shape) != shape:
                found = f"has shape {list(given[name].shape)}" if name in given else "is not there"
                raise CheckpointError(
                    f"tensor ({prefix}{name}) must have shape {shape} in the state dict but {found}; load all experts "
                    "of the layer, as the unpatched model's state dict has them, or what this model's has on this rank."
                )
        start = layer.ep_rank * layer.num_local_experts
        weights = {name: state_dict.pop(prefix + name)[start : start + layer.num_local_experts] for name in held}
        state_dict.update({prefix + key: value for key, value in layer.own_weights(weights).items()})

    return take


def weight_specs(model: nn.Module) -> dict[str, TensorSpec]:
    """Whole shapes and dtypes by transformers' names, in the model's order; tied weights once, under one name."""
    layers = split_layers(model)
    found: dict[str, TensorSpec] = {}
    for name in dense_names(model, layers):
        found[name] = TensorSpec.of(_lookup(model, name))
    for layer_name, layer in layers.items():
        for name, tensor in _held_specs(layer).items():
            found[f"{layer_name}.{name}"] = TensorSpec((layer.num_experts, *tensor.shape[1:]), tensor.dtype)
    position = {id(module): index for index, module in enumerate(model.modules())}

    def place(name: str) -> int:
        return position[id(model.get_submodule(name.rpartition(".")[0]))]

    return {name: found[name] for name in sorted(found, key=place)}


def dense_names(model: nn.Module, layers: dict[str, ExpertParallelLayer]) -> list[str]:
    """Names of the weights that every rank holds whole. Of tied ones that which transformers reads."""
    split = {id(parameter) for layer in layers.values() for parameter in layer.split_parameters()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    groups: dict[int, list[str]] = {}
    for name, tensor in nn.Module.state_dict(model, keep_vars=True).items():
        if id(tensor) not in split:
            groups.setdefault(id(tensor), []).append(name)
    return [next((name for name in names if name not in tied), names[0]) for names in groups.values()]


def local_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights of a model with `ep_size` 1, as they are here: views, by the names of `as_stored`."""
    layers, found = split_layers(model), {}
    for name in weight_specs(model):
        parent, _, attribute = name.rpartition(".")
        layer = layers.get(parent)
        own = {} if layer is None else layer.named_weights(layer.expert_parameters())
        found[name] = (own[attribute] if attribute in own else _lookup(model, name)).detach()
    return as_stored(model, found)


def check_whole(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Raise unless the experts among weights that are to be saved are as the unpatched model has them.

    Raises:
        CheckpointError: they are this rank's, or under the layer's names: from a plain `model.state_dict()`.
    """
    stacked = {name: spec.meta() for name, spec in weight_specs(model).items()}
    stored = as_stored(model, dict(stacked))
    for prefix, layer in split_layers(model).items():
        for name in (f"{prefix}.{key}" for key in layer.state_dict(keep_vars=True)):
            whole = [tensors[name].shape for tensors in (stacked, stored) if name in tensors]
            if name in weights and weights[name].shape not in whole:
                raise CheckpointError(
                    f"state_dict ({name}) given to save_pretrained has the experts as this rank holds them, not all "
                    "of them as checkpoints do; call save_pretrained without state_dict, on all ranks."
                )


def _held_specs(layer: ExpertParallelLayer) -> dict[str, torch.Tensor]:
    """This rank's share in transformers' layout as shapes only, without touching (or gathering) the data."""
    return layer.named_weights({name: TensorSpec.of(w).meta() for name, w in layer.expert_parameters().items()})


@torch.enable_grad()
def trained_weights(layer: ExpertParallelLayer) -> dict[str, bool]:
    """Whether each weight is trained, by transformers' name: one that is several parameters here, if any of them is."""
    own = layer.expert_parameters()
    shapes = {name: TensorSpec.of(weight).meta().requires_grad_(weight.requires_grad) for name, weight in own.items()}
    return {name: weight.requires_grad for name, weight in layer.named_weights(shapes).items()}


def _lookup(model: nn.Module, name: str) -> torch.Tensor:
    parent, _, attribute = name.rpartition(".")
    tensor = getattr(model.get_submodule(parent), attribute)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _unsharded(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that FSDP has sharded; collective over the ranks that share it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # type: ignore[no-untyped-call]


def iterate_weights(model: nn.Module, state: FluidState, names: list[str]) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Each named weight, whole and on the CPU of rank 0; `None` on the others. Collective: consume it on all ranks.

    At most one weight is gathered at a time; what was yielded may be kept, it is a copy.
    """
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    layers = split_layers(model)
    progress = {"desc": "Gathering weights", "delay": 2, "leave": False, "disable": None if is_main else True}
    for name in logging.tqdm(names, **progress):  # shown or not as transformers' own bars
        parent, _, attribute = name.rpartition(".")
        if parent in layers and attribute in layers[parent].weight_names:
            yield name, _gather_weight(layers[parent], state, attribute, to_all=False)
            continue
        tensor = _lookup(model, name)
        with state.backend.full([tensor]):
            tensor = _unsharded(tensor)
            whole = tensor.detach().to("cpu", copy=True) if is_main else None
        yield name, whole


def gather_experts(layer: ExpertParallelLayer, state: FluidState, *, to_all: bool) -> dict[str, torch.Tensor]:
    """All experts of a layer, named and laid out as in transformers: on every rank, or on the CPU of global rank 0."""
    found = {name: _gather_weight(layer, state, name, to_all=to_all) for name in layer.weight_names}
    return {name: weight for name, weight in found.items() if weight is not None}


@torch.no_grad()
def _gather_weight(layer: ExpertParallelLayer, state: FluidState, name: str, *, to_all: bool) -> torch.Tensor | None:
    group, size = state.groups.ep_group, state.groups.ep_size
    rank = dist.get_rank() if dist.is_initialized() else 0
    if size == 1:
        with state.backend.full(layer.parameters()):
            weight = _unsharded(layer.named_weights(layer.expert_parameters())[name]).clone()
        return weight if to_all else weight.cpu() if rank == 0 else None
    takes_part = to_all or 0 in dist.get_process_group_ranks(group)
    with state.backend.full(layer.parameters()):
        if not takes_part:
            return None
        share = layer.named_weights(layer.expert_parameters())[name].contiguous()
        whole = share.new_empty((share.shape[0] * size, *share.shape[1:])) if to_all or rank == 0 else None
        parts = None if whole is None else list(whole.chunk(size))
        in_time(
            lambda: (
                dist.all_gather(parts, share, group=group, async_op=True)
                if to_all
                else dist.gather(share, parts, dst=0, group=group, async_op=True)
            ),
            share.device,
            group,
            state.config.timeout_seconds,
            f"the gathering of {name} of layer {layer.context.name}",
            state.groups.met,
        )
    return whole if to_all or whole is None else whole.cpu()
