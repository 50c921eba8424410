"""`patch_model` and `unpatch_model`: find, check everything, then swap; and the exact undo."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import weakref
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from fluid_hf.backends import LOADED_SHARE, Backend, TorchBackend
from fluid_hf.checkpoint.gather import gather_experts, stack_stored, trained_weights
from fluid_hf.checkpoint.memory import MemoryReturner
from fluid_hf.checkpoint.saving import bind_adapter_saving, bind_saving, unbind_saving
from fluid_hf.config import FluidConfig
from fluid_hf.control import ControlGroup, as_error
from fluid_hf.errors import AlreadyPatchedError, ConfigError, NotPatchedError, UnsupportedModelError
from fluid_hf.models.adapters import adapters_of, inside_adapters, join_adapters, refuse_late_adapters, split_adapters
from fluid_hf.models.attention import find_attention
from fluid_hf.models.attention_wgrad import CrossLayerWgrad
from fluid_hf.models.expert_hooks import give_back_hooks, is_watched, share_hooks
from fluid_hf.models.fused_parts import bind_parts, unbind_parts
from fluid_hf.models.generation import bind_generation, unbind_generation
from fluid_hf.models.registry import ExpertsSite, check_loaded, check_unshared, find_experts, has_experts
from fluid_hf.models.sequence_parallel import SequenceParallel
from fluid_hf.models.sequence_router import RouterGather
from fluid_hf.models.sharding import RefuseDDP, refuse_copy, refuse_sharding, refuse_unpatching
from fluid_hf.models.shared_experts import bind_blocks, bind_methods, unbind_blocks, unbind_methods
from fluid_hf.models.stored_experts import StoredExperts, let_go, put_parameters, put_weights, stored_parameters
from fluid_hf.moe.general_experts import GeneralMath
from fluid_hf.moe.layer import ExpertParallelLayer, WaveChoice
from fluid_hf.process_groups import (
    ParallelGroups,
    check_alive,
    resolve_ep_size,
    resolve_sp_size,
    tell_crossing_groups,
    with_exchange_groups,
    with_sequence_groups,
)
from fluid_hf.state import FluidState, patched_elsewhere, unwrapped

__all__ = ["check_config", "get_state", "patch_model", "release_model", "requested_config", "unpatch_model"]

ModelT = TypeVar("ModelT", bound=nn.Module)


def patch_model(model: ModelT, config: FluidConfig | None = None) -> ModelT:
    """Make a Hugging Face MoE model expert parallel, and sequence parallel if asked, in place. Collective.

    The model keeps its class, its outputs and its checkpoint format; only `block.experts` of every MoE block is
    replaced by a module that holds this rank's experts. With `sp_size` over 1 the attention layers, of models without
    experts too, exchange heads for sequence. Patching again with the same settings does nothing.

    Args:
        model: a whole transformers model whose experts follow `use_experts_implementation`, or PEFT's around one.
        config: settings. `None` reads the `"fluid"` block of the DeepSpeed JSON in force; without one, defaults.

    Returns:
        The same model; `model.fluid` is its `FluidState`.

    Raises:
        UnsupportedModelError: the model is not transformers', or has no experts that can be patched; names the class
            and what is missing.
        CollectiveError: not all ranks call this within five minutes.
        ConfigError: the settings do not fit the model, the world size or the DeepSpeed JSON.
        AlreadyPatchedError: the model is patched with other settings, or holds or is a part of one that is patched.
        RankMismatchError: ranks pass different settings or models, or another rank raised one of the above.

    Nothing is changed on any rank if any rank raises.
    """
    control, inner = ControlGroup(what="patch_model"), inside_adapters(model)
    try:
        error, requested, config, backend, sites = _prepare(inner, config, hosts := control.hosts("patch_model"))
        settings = config.to_dict() if config else {}
        described = {site.name: _description(site) for site in sites}
        control.agree(error, {**settings, **described, **_attention_description(inner, config)}, "patch_model")
    except BaseException:
        control.close()
        raise
    assert config is not None and requested is not None and backend is not None
    if getattr(inner, "fluid", None) is not None:
        control.close()
        return model
    assert config.ep_size is not None and config.sp_size is not None
    control.wait_at_most(config.timeout_seconds)
    tell_crossing_groups(hosts, ep_size=config.ep_size, sp_size=config.sp_size)
    state = FluidState(config, requested, _create_groups(backend, config), backend, control)
    wave_choice, memory = WaveChoice(config.waves), MemoryReturner()
    for site in sites:
        adapters = [] if isinstance(site.module, StoredExperts) else adapters_of(inner, site.module)
        _swap(site, state, wave_choice)
        memory.allocated(sum(parameter.nbytes for parameter in state.layers[site.name].parameters()))
        if config.ep_size > 1 and adapters:
            split_adapters(adapters, state.layers[site.name])
    if config.ep_size == 1:
        let_go(inner, [(source, state.layers[name].weight_names) for name, source in state.originals.items()])
    if config.ep_size > 1 or any(site.format is not None and site.format.scale_input for site in sites):
        state.bound_blocks = bind_blocks(inner, state.layers)
    if config.wgrad == "cross_layer":
        _attach_cross_layer(inner, state)
    if config.sp_size > 1:
        _attach_sequence(inner, state)
    _bind(inner, state)
    if inner is not model:
        bind_adapter_saving(model)
    return model


def _bind(model: nn.Module, state: FluidState) -> None:
    """All on the model inside PEFT's, which passes attributes on: it is what is left when adapters are merged."""
    model.fluid = state  # type: ignore[assignment]
    for layer in state.layers.values():
        layer.patched_in, layer.patched_with = type(model).__name__, weakref.ref(next(layer.parameters()))
    if state.groups.ep_size > 1:
        model._ddp_params_and_buffers_to_ignore = RefuseDDP()  # type: ignore[assignment]
        bind_generation(model)
        state.sharding_check = refuse_sharding(model, list(state.layers.values()))
        refuse_late_adapters(model, list(state.layers.values()))
    bind_saving(model, state)
    bind_parts(model)
    model.__deepcopy__ = model.__reduce_ex__ = refuse_copy  # type: ignore[assignment]
    state.backend.attach(model)


def _create_groups(backend: Backend, config: FluidConfig) -> ParallelGroups:
    assert config.ep_size is not None and config.sp_size is not None
    groups = with_sequence_groups(backend.create_groups(config.ep_size), config.sp_size)
    return with_exchange_groups(groups, config.nccl_max_ctas)


def _attach_sequence(model: nn.Module, state: FluidState) -> None:
    config = state.config
    sites = find_attention(model, state.groups.sp_size)
    state.sequence_router = RouterGather(model, state.sequence_exchange)
    state.sequence_router.attach()
    state.sequence = SequenceParallel(
        model, sites, state.sequence_exchange, state.scheduler, overlap=config.overlap, chunks=config.waves
    )
    state.sequence.attach()
    for name in state.sequence.overlapped:
        state.backend.gather_together(model.get_submodule(name), True)


def _attach_cross_layer(model: nn.Module, state: FluidState) -> None:
    if state.groups.ep_size == 1:
        state.scheduler.fall_back("ep_size (1) leaves nothing to send, so there are no communication windows")
        return
    state.cross_layer = CrossLayerWgrad(model, state.layers, state.scheduler)
    state.cross_layer.attach()


def unpatch_model(model: ModelT) -> ModelT:
    """Put the original modules back, with the full current weights on every rank. Collective over all ranks.

    Of experts that were split, gradients and what an optimizer holds are not put back: build a new optimizer.

    Raises:
        NotPatchedError: the model is not patched.
        ConfigError: its experts are sharded by FSDP.
        CollectiveError: the process groups of experts that are split were destroyed.
    """
    state, inner = get_state(model), inside_adapters(unwrapped(model))
    refuse_unpatching(inner, [(layer, layer.patched_with()) for layer in state.layers.values()])
    check_alive(state.groups.ep_group, "unpatch_model")
    state.finish_batch()
    state.backend.detach(inner)
    state.stop_measuring()
    unbind_saving(unwrapped(model))
    unbind_saving(inner)
    unbind_generation(inner)
    unbind_parts(inner)
    if state.sequence is not None:
        for forward in state.sequence.overlapped.values():
            state.backend.gather_together(forward.module, False)
        state.sequence.detach()
    if state.sequence_router is not None:
        state.sequence_router.detach()
    if state.cross_layer is not None:
        state.cross_layer.detach()
    if state.sharding_check is not None:
        state.sharding_check.remove()
    unbind_blocks(state.bound_blocks)
    with state.gathering():  # all before the first one is swapped: an engine walks the model that it was given
        for name in state.originals:
            _take_back(inner, name, state)
    for name in state.originals:
        _swap_back(inner, name, state)
    state.held_groups.release()
    del inner.fluid
    for name in ("_ddp_params_and_buffers_to_ignore", "__deepcopy__", "__reduce_ex__"):
        inner.__dict__.pop(name, None)
    return model


def release_model(model: nn.Module) -> None:
    """Give back the process groups of a patched model that another one replaces. Collective over all ranks.

    Nothing is gathered: its experts stay shared out. It can still be saved, but ranks no longer agree on errors.

    Raises:
        NotPatchedError: the model is not patched.
    """
    state = get_state(model)
    state.backend.detach(inside_adapters(unwrapped(model)))
    state.held_groups.release()


def _take_back(model: nn.Module, name: str, state: FluidState) -> None:
    """Give the original experts the weights of all ranks. Collective over all ranks."""
    original, layer = state.originals[name], state.layers[name]
    join_adapters(adapters_of(model, layer))
    if state.groups.ep_size == 1 and not isinstance(original, StoredExperts):
        put_parameters(original, layer, layer.weight_names)
        return
    put_weights(original, gather_experts(layer, state, to_all=True), trained_weights(layer))


def _swap_back(model: nn.Module, name: str, state: FluidState) -> None:
    original, layer = state.originals[name], state.layers[name]
    # Wrappers may be gone, and decoder layers somewhere else, or no part of the model any more.
    place = next((place for place, module in model.named_modules() if module is layer), None)
    if place is None:
        return
    parent, _, attribute = place.rpartition(".")
    block = model.get_submodule(parent)
    if isinstance(original, StoredExperts):
        unbind_methods(block, state.bound_methods[name])
    give_back_hooks(layer)
    module = original.module if isinstance(original, StoredExperts) else original
    setattr(block, attribute, module.train(layer.training))


def get_state(model: Any) -> FluidState:
    """The `FluidState` of a patched model, also through wrappers that pass attributes on (PEFT).

    Raises:
        NotPatchedError: the model is not patched.
    """
    state = getattr(model, "fluid", None)
    if not isinstance(state, FluidState):
        raise NotPatchedError(f"{type(model).__name__} is not patched; call fluid_hf.patch_model(model) first.")
    return state


def _prepare(
    model: nn.Module, config: FluidConfig | None, hosts: list[str]
) -> tuple[Exception | None, FluidConfig | None, FluidConfig | None, Backend | None, list[ExpertsSite]]:
    """Every check that one rank can make by itself. Changes nothing; returns the error instead of raising it."""
    try:
        check_config(config)
        requested = requested_config(config)
        state = getattr(model, "fluid", None)
        if isinstance(state, FluidState):
            if requested not in (state.requested, state.config):
                raise AlreadyPatchedError(
                    f"{type(model).__name__} is patched already with {state.requested}; requested {requested}. "
                    "Call unpatch_model(model) first, or pass the same settings."
                )
            return None, requested, state.config, state.backend, []
        _check_model(model)
        world = dist.get_world_size() if dist.is_initialized() else 1
        sp_size = resolve_sp_size(requested.sp_size, world)
        if sp_size > 1:
            find_attention(model, sp_size)
        sites = find_experts(model) if sp_size == 1 or has_experts(model) else []
        check_loaded(sites)
        counts = sorted({site.num_experts for site in sites})
        if requested.ep_size is not None and requested.ep_size > 1 and not dist.is_initialized():
            raise ConfigError(
                f"ep_size ({requested.ep_size}) needs torch.distributed, which is not initialised; launch with "
                "`deepspeed` or `torchrun` and initialise it before patching, or use ep_size 1."
            )
        if len(counts) > 1:
            raise UnsupportedModelError(f"{type(model).__name__} has layers with different num_experts {counts}.")
        ep_size = resolve_ep_size(requested.ep_size, world, counts[0] if counts else 1, hosts)
        if ep_size > 1:
            check_unshared(model, sites)
        resolved = dataclasses.replace(requested, ep_size=ep_size, sp_size=sp_size)
        backend = _choose_backend(resolved)
        backend.check(resolved)
        return None, requested, resolved, backend, sites
    except Exception as error:  # reported to the other ranks, then raised on this one
        return as_error(error), None, None, None, []


def _check_model(model: nn.Module) -> None:
    """Raise unless it is a transformers model, whose checkpoints can be written, and not patched in part."""
    kind = type(model).__name__
    if not isinstance(model, nn.Module):  # a class, a Trainer, a path
        given = f"{model.__name__} itself, a {kind}," if isinstance(model, type) else kind
        raise UnsupportedModelError(
            f"{given} is no transformers model (PreTrainedModel); patch a model that was built."
        )
    if place := patched_elsewhere(model):
        raise AlreadyPatchedError(
            f"{kind} cannot be patched: {place}, already; use it as it is, or call unpatch_model on that one first."
        )
    if not isinstance(model, PreTrainedModel):
        inside = next((name for name, part in model.named_modules() if isinstance(part, PreTrainedModel)), None)
        remedy = f"the model inside: {inside}" if inside else "a transformers model that has experts"
        raise UnsupportedModelError(f"{kind} is no transformers model (PreTrainedModel); patch {remedy}.")


def check_config(config: Any) -> None:
    """Raise `ConfigError` unless it is a `FluidConfig` or `None`."""
    if config is not None and not isinstance(config, FluidConfig):
        raise ConfigError(f"config ({config!r}) must be a FluidConfig; use FluidConfig.from_dict({{...}}).")


def requested_config(config: FluidConfig | None) -> FluidConfig:
    """The settings asked for: the argument, or the "fluid" block of the DeepSpeed JSON that transformers holds."""
    block = None
    if importlib.util.find_spec("deepspeed") is not None:
        from transformers.integrations.deepspeed import deepspeed_config

        active = deepspeed_config()
        block = active.get("fluid") if isinstance(active, dict) else None
    if block is None:
        return config or FluidConfig()
    from_json = FluidConfig.from_dict(block)
    if config is not None and from_json.sp_size is None:
        from_json = dataclasses.replace(from_json, sp_size=config.sp_size)
    if config is not None and config != from_json:
        raise ConfigError(
            f'config ({config}) must equal the "fluid" block of the DeepSpeed JSON ({from_json}); give only one.'
        )
    return from_json


def _choose_backend(config: FluidConfig) -> Backend:
    if dist.is_initialized() and importlib.util.find_spec("deepspeed") is not None:
        # The one step up from the core: the engine's protocol lives with the integrations.
        from fluid_hf.integrations.deepspeed import DeepSpeedBackend

        return DeepSpeedBackend()
    return TorchBackend()


def _description(site: ExpertsSite) -> str:
    """What must be equal on all ranks, shapes and types included: messages of other sizes would not match."""
    names = [name for name in ("gate_up_proj", "down_proj") if name in site.weight_names]
    dtypes = {name: str(stored_parameters(site.module, name)[0].dtype) for name in names}
    shapes = {name: (*site.parameter_shape(name), dtypes[name]) for name in names}
    return f"{site.num_experts} experts, {shapes}"


def _attention_description(model: nn.Module, config: FluidConfig | None) -> dict[str, str]:
    """What must be equal on all ranks that share sequences, of models without experts too."""
    if config is None or config.sp_size == 1:
        return {}
    settings: Any = model.config
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    layers = list(getattr(settings, "per_layer_config", None) or [settings])  # with it, `settings` raises
    described = {name: str([getattr(layer, name, None) for layer in layers]) for name in names}
    dtypes = sorted({str(parameter.dtype) for parameter in model.parameters()})
    return {**described, "dtypes": ", ".join(dtypes)}


@torch.no_grad()
def _swap(site: ExpertsSite, state: FluidState, wave_choice: WaveChoice) -> None:
    source: Any = site.module
    act: Any = getattr(source, "act_fn", nn.functional.silu)
    settings = ExpertParallelLayer(
        site.num_experts,
        state.exchange,
        state.scheduler,
        functools.partial(act) if is_watched(act) else act,  # with hooks it is called, not taken for what its class is
        overlap=state.config.overlap,
        recompute=state.config.recompute,
        wave_choice=wave_choice,
    )
    settings.weight_names = site.weight_names
    if site.format is not None:
        settings.context.math = GeneralMath(site.format)
    layer = state.backend.build_layer(source, settings, state.groups)
    layer.context.name = site.name
    layer.train(source.training)
    if isinstance(source, StoredExperts):
        layer.unstack, layer.stack = source.unstack, source.stack
        layer.register_load_state_dict_pre_hook(stack_stored)
        bind_methods(site.parent, site.methods)
        state.bound_methods[site.name] = list(site.methods)
        for weight_name in site.weight_names:
            source.release(weight_name)
    else:
        share_hooks(source, layer)
    if state.groups.ep_size > 1 and not isinstance(source, StoredExperts):  # whole weights live on in shares only
        for parameter in (getattr(source, name) for name in site.weight_names):
            if not hasattr(parameter, "ds_id"):
                parameter.data = parameter.data.new_empty(0)
        vars(source).pop(LOADED_SHARE, None)  # unpatching gives it all experts
    setattr(site.parent, site.attribute, layer)
    state.layers[site.name] = layer
    state.originals[site.name] = source
