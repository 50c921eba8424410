"""The step of DeepSpeed's engine where experts are split: what it would do with each rank's gradients alone."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.moe.utils import is_moe_param
from torch import nn

from fluid_hf.comm.reduce import all_reduce_in_time, spread_overflow
from fluid_hf.state import FluidState

__all__ = ["bind_step"]


def bind_step(engine: Any, model: nn.Module, state: FluidState) -> None:
    """Make an engine's step that of all ranks' experts.

    Args:
        engine: made for the model.
        model: the patched model, or what wraps it.
        state: its state; `ep_size` is over 1.
    """
    engine.clip_fp32_gradients = functools.partial(_clip_gradients, engine, model, state)
    if engine.torch_autocast_z0_gradscaler is not None:
        engine._take_model_step = functools.partial(_step_together, engine._take_model_step, state)
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if hasattr(engine.optimizer, "_optimizer_step") and link is not None:
        engine.optimizer._lazy_init_hp_params_optimizer_state = functools.partial(
            _link_states, engine.optimizer, link, itertools.count(1)
        )


def _link_states(optimizer: Any, link: Callable[[], None], calls: Iterator[int]) -> None:
    """Let parameters know the optimizer's states of all groups, for `safe_get_full_optimizer_state`.

    ZeRO 1 and 2 step group after group and do it once, with the first: the experts' have no states yet.
    """
    if optimizer._hp_optimizer_states_linked:
        return
    link()
    optimizer._hp_optimizer_states_linked = next(calls) >= len(optimizer.single_partition_of_fp32_groups)


def _step_together(step: Callable[..., None], state: FluidState, *args: Any, **kwargs: Any) -> None:
    """Skip a step of stage 0 under float16 autocast on all ranks, or on none.

    PyTorch's `GradScaler`, which DeepSpeed uses there, looks at this rank's gradients: where its experts alone have an
    overflow, the others would make the step, and dense weights and loss scales differ from then on.
    """
    parameters = (parameter for layer in state.layers.values() for parameter in layer.split_parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:  # of what is trained, on all ranks: DeepSpeed fills in zeros
        spread_overflow(gradients, state.config.timeout_seconds, state.groups.met)
    step(*args, **kwargs)


@torch.no_grad()
def _clip_gradients(engine: Any, model: nn.Module, state: FluidState) -> None:
    """Clip by the norm over all experts, exactly; DeepSpeed's own stage 0 averages the experts' norms over ranks."""
    squares = [torch.zeros((), dtype=torch.float64, device=engine.device) for _ in range(2)]
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for parameter in model.parameters():
        if parameter.grad is not None:
            squares[is_moe_param(parameter)] += parameter.grad.double().square().sum()
    groups, place = state.groups, "the norm of the gradients"
    all_reduce_in_time(squares[1], groups.ep_group, state.config.timeout_seconds, place, groups.met)
    norm = (squares[0] + squares[1]).sqrt()
    scale = (engine.gradient_clipping() / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.to(gradient.dtype))
    # Host synchronisation, once a step, as in the other stages.
    (engine._global_grad_norm,) = state.exchange.read(norm[None], place)
