"""DeepSpeed: expert-parallel groups, expert parameters as its engine wants them, client optimizers, checkpoints.

A module that is an `AutoEPMoELayer` gets from DeepSpeed 0.19.8 MoE optimizer groups, reduction over the
expert-data-parallel group, clipping across experts, ZeRO 1 to 3 placement and expert checkpoint files. The layer here
is one, but runs none of AutoEP's own code: its constructor is not called and its forward is replaced.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint import constants
from deepspeed.checkpoint.autoep_affine import (
    autoep_experts_for_rank,
    autoep_placement_to_affine_map,
    legacy_uniform_autoep_placement_descriptor,
)
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import set_z3_leaf_module
from torch import nn
from transformers.integrations.deepspeed import deepspeed_config

from fluid_hf.backends import TorchBackend, WeakModels, take_local_experts
from fluid_hf.config import FluidConfig
from fluid_hf.errors import ConfigError
from fluid_hf.integrations.client_optimizer import prepare_optimizer
from fluid_hf.integrations.deepspeed_checkpoint import bind_checkpoints
from fluid_hf.integrations.deepspeed_checks import check_training
from fluid_hf.integrations.deepspeed_groups import forget_destroyed_groups
from fluid_hf.integrations.engine_step import bind_step
from fluid_hf.integrations.sequence_engine import sequence_parallel_engine
from fluid_hf.models.expert_formats import extra_modules
from fluid_hf.models.stored_experts import StoredExperts, stored_parameters
from fluid_hf.moe.general_experts import GeneralMath
from fluid_hf.moe.layer import ExpertParallelLayer
from fluid_hf.process_groups import ParallelGroups, backend_of
from fluid_hf.state import FluidState

__all__ = ["DeepSpeedBackend", "DeepSpeedExperts", "SplitExperts", "init_communication"]


class SplitExperts(nn.Module):
    """The weights under the three names that DeepSpeed reads; it asks only that the first dimension is [E_local].

    w1 and w3 hold the outputs of the first projection in two halves (of gated experts: gate and up), w2 the down
    projection. Of experts with biases, w1 holds the first projection whole and w3 the biases of both side by side.
    """

    def __init__(self, weights: dict[str, torch.Tensor], trainable: dict[str, bool], transposed: bool) -> None:
        super().__init__()
        names = list(weights)
        first, down = names[0], "down_proj"
        self.has_bias = len(names) == 4
        if self.has_bias:
            one, three = weights[first], torch.cat([weights[names[1]], weights[names[3]]], dim=1)
        else:
            one, three = weights[first].chunk(2, dim=2 if transposed else 1)
        self.w1 = nn.Parameter(one.contiguous(), requires_grad=trainable[first])
        self.w3 = nn.Parameter(three.contiguous(), requires_grad=trainable[names[1] if self.has_bias else first])
        self.w2 = nn.Parameter(weights[down], requires_grad=trainable[down])


class DeepSpeedExperts(ExpertParallelLayer, AutoEPMoELayer):
    """Expert-parallel experts that DeepSpeed's engine recognises as its own kind of MoE layer."""

    comm_backend = "comm"
    combine_impl = "weighted_sum"

    def __init__(
        self, settings: ExpertParallelLayer, group_name: str, experts: SplitExperts, modules: dict[str, nn.Module]
    ) -> None:
        self.init_like(settings)
        self.experts = experts
        for name, module in modules.items():
            setattr(self, name, module)
        self.ep_group_name = group_name
        self.expert_placement_descriptor = legacy_uniform_autoep_placement_descriptor(
            self.num_experts, self.num_local_experts, self.ep_size
        )

    def expert_parameters(self) -> dict[str, torch.Tensor]:
        experts = self.experts
        if self.context.math is None:
            return {"gate": experts.w1, "up": experts.w3, "down": experts.w2}
        names = ("first", "biases") if experts.has_bias else ("first.0", "first.1")
        first = dict(zip(names, (experts.w1, experts.w3), strict=True))
        return {**first, **self.extra_parameters(), "down": experts.w2}

    def own_weights(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        math = self.context.math
        transposed = isinstance(math, GeneralMath) and math.format.transposed
        experts = SplitExperts(weights, dict.fromkeys(weights, False), transposed)
        return {f"experts.{name}": value for name, value in experts.state_dict().items()}

    def weights_in_parameters(self) -> dict[str, tuple[str, ...]]:
        first, *biases = (name for name in self.weight_names if name != "down_proj")
        return {"experts.w1": (first,), "experts.w3": tuple(biases) or (first,), "experts.w2": ("down_proj",)}

    def checkpoint_metadata(self, parameter: torch.Tensor) -> dict[str, Any]:
        """What DeepSpeed's universal checkpoint stores about one expert parameter."""
        placement = self.expert_placement_descriptor
        shape = [self.num_experts, *parameter.shape[1:]]
        return {
            constants.AUTOEP_EXPERT_PLACEMENT: placement,
            constants.AFFINE_MAP: autoep_placement_to_affine_map(placement, shape).to_dict(),
            constants.AUTOEP_PARAM_LOGICAL_SHAPE: shape,
            constants.AUTOEP_PARAM_EP_RANK: self.ep_rank,
            constants.AUTOEP_PARAM_LOCAL_EXPERTS: list(autoep_experts_for_rank(placement, self.ep_rank)),
        }


class FrozenExperts(ExpertParallelLayer):
    """What `DeepSpeedExperts` become when they were frozen after patching (by PEFT): without an optimizer group."""

    experts: SplitExperts
    expert_parameters = DeepSpeedExperts.expert_parameters
    own_weights = DeepSpeedExperts.own_weights
    weights_in_parameters = DeepSpeedExperts.weights_in_parameters


class DeepSpeedBackend(TorchBackend):
    """Groups from `deepspeed.utils.groups`, expert weights as ZeRO wants them."""

    name = "deepspeed"

    def check(self, config: FluidConfig) -> None:
        _refuse_autoep(deepspeed_config())

    def create_groups(self, ep_size: int) -> ParallelGroups:
        if not deepspeed.comm.is_initialized():
            init_communication()
        forget_destroyed_groups()
        world_size = dist.get_world_size()
        if ep_size == 1:
            return ParallelGroups(1, 0, None, None, world_size)
        name = _group_name(ep_size)
        deepspeed_groups._create_expert_and_data_parallel(expert_parallel_size_=ep_size)
        group = deepspeed_groups._get_expert_parallel_group(name)
        edp_group = deepspeed_groups._get_expert_data_parallel_group(name)
        return ParallelGroups(ep_size, dist.get_rank(group), group, edp_group, world_size)

    def build_layer(self, source: Any, settings: ExpertParallelLayer, groups: ParallelGroups) -> ExpertParallelLayer:
        if groups.ep_size == 1 and not isinstance(source, StoredExperts):
            return super().build_layer(source, settings, groups)
        stored = {name: stored_parameters(source, name) for name in settings.weight_names}
        trainable = {name: parameters[0].requires_grad for name, parameters in stored.items()}
        convert = getattr(stored["down_proj"][0], "convert_to_zero_parameters", None)
        # One AutoEP layer asks for an optimizer group of its own: not for experts that are whole, or not trained.
        split = groups.ep_size > 1 and any(trainable.values())
        with self.full(parameter for parameters in stored.values() for parameter in parameters):
            if split:
                layer: ExpertParallelLayer = self._split_layer(source, settings, groups, trainable)
            else:
                layer = super().build_layer(source, settings, groups)
        own = layer.split_parameters()
        for parameter in own if groups.ep_size > 1 else ():
            _mark_expert_parameter(parameter, _group_name(groups.ep_size))
            if isinstance(layer, DeepSpeedExperts):
                setattr(parameter, constants.DS_AUTOEP_UC_META, layer.checkpoint_metadata(parameter))
        if convert is not None:  # the model was built under zero.Init: the new parameters join it
            for parameter in own if groups.ep_size > 1 else ():
                setattr(parameter, "ds_zero_partition_process_group", groups.expert_data_group)  # noqa: B010
            convert(param_list=own)
        # ZeRO-3 gathers the whole layer at once: its parameters are read outside their own module's forward.
        set_z3_leaf_module(layer, True)
        return layer

    @staticmethod
    def _split_layer(
        source: Any, settings: ExpertParallelLayer, groups: ParallelGroups, trainable: dict[str, bool]
    ) -> DeepSpeedExperts:
        math = settings.context.math
        transposed = isinstance(math, GeneralMath) and math.format.transposed
        experts = SplitExperts(take_local_experts(source, settings), trainable, transposed)
        modules = extra_modules(source) if math is not None else {}
        layer = DeepSpeedExperts(settings, _group_name(groups.ep_size), experts, modules)
        layer.ep_group = groups.ep_group  # type: ignore[assignment]
        return layer

    def full(self, parameters: Iterable[torch.Tensor]) -> contextlib.AbstractContextManager[Any]:
        partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
        return deepspeed.zero.GatheredParameters(partitioned) if partitioned else contextlib.nullcontext()

    def gather_together(self, module: nn.Module, together: bool) -> None:
        set_z3_leaf_module(module, together)

    def attach(self, model: nn.Module) -> None:
        _PATCHED.add(model)
        if not hasattr(deepspeed.initialize, "__wrapped__"):
            deepspeed.initialize = _wrap_initialize(deepspeed.initialize)

    def detach(self, model: nn.Module) -> None:
        _PATCHED.remove(model)
        if not len(_PATCHED) and hasattr(deepspeed.initialize, "__wrapped__"):
            deepspeed.initialize = deepspeed.initialize.__wrapped__


# Models for which deepspeed.initialize is wrapped; the wrap goes when the last of them is unpatched.
_PATCHED = WeakModels()


def init_communication() -> None:
    """Let DeepSpeed adopt torch.distributed's default group.

    On a CPU it would also compile an all-reduce of its own, which takes a minute and a C++ compiler and is not needed.
    """
    operators = deepspeed.ops.__compatible_ops__
    known = operators.get("deepspeed_shm_comm")
    operators["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(dist_backend=backend_of(), auto_mpi_discovery=False)
    finally:
        if known is None:
            del operators["deepspeed_shm_comm"]
        else:
            operators["deepspeed_shm_comm"] = known


def _wrap_initialize(initialize: Callable[..., Any]) -> Callable[..., Any]:
    """`deepspeed.initialize` that prepares client optimizers of patched models and binds the engine; else as before."""
    signature = inspect.signature(initialize)

    @functools.wraps(initialize)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        model: Any = bound.arguments.get("model")
        state = _patched_inside(model)
        if state is None:
            return initialize(*args, **kwargs)
        settings = _take_settings(bound.arguments)
        _refuse_autoep(settings)
        check_training(settings, model, state, split=DeepSpeedExperts, frozen=FrozenExperts)
        _gather_adapted_attention_by_parts(state)
        state.leave_engine()
        with sequence_parallel_engine(bound.arguments, settings, state):
            prepare_optimizer(bound.arguments, settings, model, state, split=DeepSpeedExperts)
            result = initialize(*bound.args, **bound.kwargs)
        _bind_engine(result[0], model, state)
        return result

    return wrapped


def _patched_inside(model: Any) -> FluidState | None:
    """The state of the model to train, or of the one inside it, such as that of a value head."""
    state = getattr(model, "fluid", None)
    if isinstance(state, FluidState):
        return state
    if not isinstance(model, nn.Module):
        return None
    found = {
        name: inside
        for name, part in model.named_modules()
        if isinstance(inside := vars(part).get("fluid"), FluidState)
    }
    if len(found) > 1:
        raise ConfigError(
            f"model ({type(model).__name__}) of deepspeed.initialize must hold one patched model, but holds "
            f"{len(found)} ({', '.join(found)}); give each an engine of its own."
        )
    return next(iter(found.values()), None)


def _take_settings(arguments: dict[str, Any]) -> Any:
    """The engine's settings, wherever `deepspeed.initialize` was given them; they are left in `config`, read.

    That is in `config` or `config_params`, or by the launcher's option `--deepspeed_config` in `args`: a dictionary,
    the path of a file, or base64.
    """
    args, options = arguments.get("args"), ("deepspeed_config", "deepscale_config")
    named = [value for name in options if (value := getattr(args, name, None)) is not None]
    found = [value for name in ("config", "config_params") if (value := arguments.get(name)) is not None][:1] + named
    if len(found) != 1:
        return None  # DeepSpeed says what is missing, or given twice
    try:
        settings = load_ds_config(str(found[0]) if isinstance(found[0], Path) else found[0])
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"config ({found[0]!r}) of deepspeed.initialize cannot be read: {error}; give a dictionary, or the path of "
            "a JSON file that every rank can read."
        ) from error
    if named:
        arguments["args"] = copy.copy(args)
        vars(arguments["args"]).update(dict.fromkeys(options))
    arguments["config"] = settings
    return settings


def _gather_adapted_attention_by_parts(state: FluidState) -> None:
    """Attention layers that got adapters or hooks run their own forward: ZeRO 3 gathers their modules one by one."""
    for forward in state.sequence.overlapped.values() if state.sequence is not None else ():
        set_z3_leaf_module(forward.module, forward.is_plain())


def _bind_engine(engine: Any, model: nn.Module, state: FluidState) -> None:
    """Make the engine save whole models and refuse checkpoints of another layout."""
    state.engine_bound, state.leave_engine = True, functools.partial(_leave, weakref.ref(engine))
    state.gathering = functools.partial(_quiet_optimizer, engine)
    bind_checkpoints(engine, model, state)
    if state.groups.ep_size > 1:
        bind_step(engine, model, state)


def _leave(engine: weakref.ref[Any]) -> None:
    """Take ZeRO-3's hooks off the layers it gathers whole: they would fire beside those of the next engine."""
    optimizer = getattr(engine(), "optimizer", None)
    for hook in getattr(optimizer, "_leaf_module_hooks", ()):
        hook.remove()


@contextlib.contextmanager
def _quiet_optimizer(engine: Any) -> Iterator[None]:
    """ZeRO-3 must finish what it fetched ahead before parameters are gathered, as for DeepSpeed's own saving."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "checkpoint_event_prologue"):
        optimizer.checkpoint_event_prologue()
    try:
        yield
    finally:
        if hasattr(optimizer, "checkpoint_event_epilogue"):
            optimizer.checkpoint_event_epilogue()


def _refuse_autoep(config: Any) -> None:
    block = config.get("expert_parallel") if isinstance(config, dict) else None
    if isinstance(block, dict) and block.get("enabled", False):
        raise ConfigError(
            "expert_parallel.enabled (true) in the DeepSpeed JSON must be false for a patched model; remove the "
            '"expert_parallel" block and keep the "fluid" block.'
        )


def _mark_expert_parameter(parameter: torch.Tensor, group_name: str) -> None:
    marks = {
        "allreduce": False,
        "group_name": group_name,
        "ds_zero_placement_family": "autoep_expert",
        "ds_zero_partition_group_name": group_name,
    }
    for name, value in marks.items():
        setattr(parameter, name, value)


def _group_name(ep_size: int) -> str:
    return f"ep_size_{ep_size}"
