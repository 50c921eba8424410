"""What DeepSpeed would do wrongly without a word, refused before the engine is built."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, get_zero_config
from torch import nn

from fluid_hf.errors import ConfigError
from fluid_hf.models.adapters import check_adapters
from fluid_hf.state import FluidState

__all__ = ["check_adagrad", "check_optimizer", "check_training", "offloads_optimizer", "zero_settings"]


def check_training(config: Any, model: nn.Module, state: FluidState, *, split: type, frozen: type) -> None:
    """Bring split experts in line with what is trained now, and refuse what would train wrongly.

    Args:
        config: DeepSpeed's settings.
        model: the patched model, or what wraps it.
        state: its state.
        split: class of layers for which DeepSpeed makes optimizer groups.
        frozen: what such layers become when nothing in them is trained any more.

    Raises:
        ConfigError: see the functions below.
    """
    zero = zero_settings(config)
    stage = int(zero.stage)
    _refuse_unscaled_loss(stage, config)
    if state.groups.ep_size == 1:
        return
    check_adapters(model, state.layers.values())
    _match_training(state, split, frozen)
    _refuse_frozen_experts(stage, state, split)
    _refuse_zeropp(stage, zero, state)
    _refuse_unclipped_experts(stage, config, state)
    _refuse_mixed_experts(stage, zero, state)


def check_optimizer(name: str, config: Any, groups: list[dict[str, Any]], state: FluidState, *, split: type) -> None:
    """Refuse optimizer groups, which have been split, without the experts where DeepSpeed asks for a group of them.

    Args:
        name: what was given to `deepspeed.initialize`.
        config, state, split: as for `check_training`.
        groups: the optimizer's.

    Raises:
        ConfigError: they hold no expert though they are trained, at stage 1 or 2.
    """
    stage = int(zero_settings(config).stage)
    trained = [place for place, layer in state.layers.items() if isinstance(layer, split)]
    if stage in (1, 2) and trained and not any(group.get("moe") for group in groups):
        raise ConfigError(
            f"{name} at zero_optimization.stage ({stage}) must hold the experts, whose requires_grad is true "
            f"({trained[0]}); freeze them before patch_model, or give them to the optimizer."
        )


def check_adagrad(name: str, config: Any, state: FluidState) -> None:
    """Refuse PyTorch's Adagrad, which DeepSpeed 0.19 makes anew with one group, and so without one of the experts.

    Args:
        name: where it was found.
        config, state: as for `check_training`.

    Raises:
        ConfigError: the stage is 1 or more, and experts are split and trained.
    """
    stage = int(zero_settings(config).stage)
    if stage in (1, 2, 3) and state.groups.ep_size > 1 and _trained(state):
        raise ConfigError(
            f"{name} (Adagrad) must be another one at zero_optimization.stage ({stage}) when ep_size "
            f"({state.groups.ep_size}) is over 1: DeepSpeed would make it anew without a group of the experts; use "
            "AdamW, or stage 0."
        )


def zero_settings(config: Any) -> DeepSpeedZeroConfig:
    """The block `zero_optimization` as DeepSpeed reads it: a stage of `"1"`, `true` for the block, older names, too."""
    try:
        return get_zero_config(config if isinstance(config, dict) else {})
    except (TypeError, ValueError):
        return DeepSpeedZeroConfig()  # DeepSpeed says what is wrong with it


def offloads_optimizer(zero: DeepSpeedZeroConfig) -> bool:
    """Whether the optimizer's states are on the CPU, or further away."""
    return zero.offload_optimizer is not None and zero.offload_optimizer.device != "none"


def _match_training(state: FluidState, split: type, frozen: type) -> None:
    """Bring the layers in line with what was frozen, or not, since the model was patched."""
    for name, layer in state.layers.items():
        trained = any(parameter.requires_grad for parameter in layer.split_parameters())
        if isinstance(layer, split) and not trained:
            layer.__class__ = frozen
        elif trained and not isinstance(layer, split):
            raise ConfigError(
                f"requires_grad (true) of the experts ({name}) must be what it was when the model was patched (false); "
                "set it before patch_model."
            )


def _refuse_frozen_experts(stage: int, state: FluidState, split: type) -> None:
    """At stage 3 DeepSpeed would partition frozen experts over all ranks, as if every rank held the same ones."""
    frozen = [name for name, layer in state.layers.items() if not isinstance(layer, split)]
    if stage == 3 and frozen:
        raise ConfigError(
            f"zero_optimization.stage (3) must be below 3 when experts are frozen ({frozen[0]}) and ep_size "
            f"({state.groups.ep_size}) is over 1; use stage 2, or ep_size 1."
        )


def _refuse_zeropp(stage: int, zero: DeepSpeedZeroConfig, state: FluidState) -> None:
    """Of ZeRO++ DeepSpeed 0.19 raises an AssertionError that names AutoEP, for copies inside a node and for quantised
    gradients of experts.
    """
    if stage != 3 or not _trained(state):
        return
    for field, most, shown in (("zero_hpz_partition_size", 1, "1"), ("zero_quantized_gradients", 0, "false")):
        value = getattr(zero, field)
        if value > most:
            raise ConfigError(
                f"zero_optimization.{field} ({str(value).lower()}) must be {shown} at stage 3 when ep_size "
                f"({state.groups.ep_size}) is over 1: DeepSpeed has it for dense weights only; remove it."
            )


def _refuse_unscaled_loss(stage: int, config: Any) -> None:
    """At stage 0 DeepSpeed 0.19 divides float16 gradients by a loss scale that it never multiplied the loss by."""
    if stage == 0 and isinstance(config, dict) and _enabled(config.get("fp16")):
        raise ConfigError(
            "zero_optimization.stage (0) must be 1 or more when fp16.enabled (true): DeepSpeed would divide gradients "
            "by the loss scale without having multiplied the loss by it, patched or not; use stage 1."
        )


def _refuse_unclipped_experts(stage: int, config: Any, state: FluidState) -> None:
    """At stage 0 in bfloat16 DeepSpeed 0.19 leaves the experts out of the norm that it clips by."""
    settings = config if isinstance(config, dict) else {}
    reduced = [name for name in ("bf16", "bfloat16") if _enabled(settings.get(name))]
    clipping = settings.get("gradient_clipping", 0)
    if stage == 0 and reduced and _trained(state) and isinstance(clipping, (int, float)) and clipping > 0:
        raise ConfigError(
            f"gradient_clipping ({clipping}) at zero_optimization.stage (0) in {reduced[0]} leaves the experts out of "
            f"the norm when ep_size ({state.groups.ep_size}) is over 1; use stage 1."
        )


def _refuse_mixed_experts(stage: int, zero: DeepSpeedZeroConfig, state: FluidState) -> None:
    """Without its common buffer DeepSpeed 0.19 sums experts' gradients over all ranks at stage 1; at 2 it raises, and
    at both without reduce_scatter.
    """
    if stage not in (1, 2) or not _trained(state):
        return
    if not zero.reduce_scatter:
        raise ConfigError(
            f"zero_optimization.reduce_scatter (false) must be true at stage {stage} when ep_size "
            f"({state.groups.ep_size}) is over 1: DeepSpeed trains experts in no other way; remove it."
        )
    if zero.contiguous_gradients or offloads_optimizer(zero):
        return  # with offload DeepSpeed copies them together whatever is asked for
    raise ConfigError(
        f"zero_optimization.contiguous_gradients (false) must be true at stage {stage} when ep_size "
        f"({state.groups.ep_size}) is over 1: DeepSpeed would sum gradients of different experts; remove it."
    )


def _trained(state: FluidState) -> bool:
    """Whether any split expert is trained."""
    return any(p.requires_grad for layer in state.layers.values() for p in layer.split_parameters())


def _enabled(block: Any) -> bool:
    return isinstance(block, dict) and bool(block.get("enabled", False))
