"""What a model may be given with a piece of a sequence."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from fluid_hf.errors import ConfigError

__all__ = ["PACKING_KEYWORDS", "by_position", "check_inputs", "for_rotary"]

PACKING_KEYWORDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def check_inputs(given: dict[str, Any], sp_size: int) -> None:
    """Everything a piece must or must not come with; equal on all ranks of a group by construction.

    Raises:
        ConfigError: names the input.
    """
    positions, mask = given.get("position_ids"), given.get("attention_mask")
    if positions is None:
        raise ConfigError(
            f"position_ids must be given when sequences are cut over sp_size ({sp_size}) ranks, so that each piece "
            "keeps its place; use model.fluid.shard_batch, or model.eval() for whole sequences."
        )
    if positions.dim() != 2:
        raise ConfigError(f"position_ids must have 2 dimensions [sequences, tokens], not {positions.dim()}.")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
        raise ConfigError(
            "attention_mask must be 2-D [sequences, tokens] of this rank's piece with sequence parallelism; masks of "
            "another shape cannot be cut: describe packed samples by position_ids."
        )
    if given.get("past_key_values") is not None:
        raise ConfigError("past_key_values cannot be used with sequences cut over ranks; generate in model.eval().")
    if given.get("output_attentions"):
        raise ConfigError("output_attentions (true) must be false with sequences cut over ranks.")
    packed = [name for name in PACKING_KEYWORDS if given.get(name) is not None]
    if packed:
        raise ConfigError(
            f"{', '.join(packed)} cannot be cut over ranks; describe packed samples by position_ids that start again "
            "at 0 (DataCollatorWithFlattening(return_position_ids=True, return_flash_attn_kwargs=False))."
        )


def for_rotary(rotary: Any, positions: torch.Tensor) -> torch.Tensor:
    """Positions [B, T] as a rotary embedding takes them: with three kinds of positions (Qwen3-VL) [3, B, T].

    transformers' newer ones expand two dimensions themselves, those of 5.17 do not.
    """
    return positions.expand(3, -1, -1) if _takes_three_kinds(type(rotary).forward) else positions


@functools.lru_cache(maxsize=16)  # reading source takes the host long, and this is asked before every forward pass
def _takes_three_kinds(forward: Callable[..., Any]) -> bool:
    return "expand(3, position_ids.shape[1]" in inspect.getsource(forward)


def by_position(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hand the input over by position under ZeRO-3, whose hooks for the end of a module's backward look at such inputs
    only. Elsewhere somebody's own hooks see what they see in the unpatched model.
    """
    weight = module.o_proj._parameters.get("weight")
    if weight is None:  # in what adapters wrap; or computed, and computed once more if the module were asked for it
        weight = next(module.o_proj.parameters(), None)
    if args or "hidden_states" not in kwargs or not hasattr(weight, "ds_id"):
        return args, kwargs
    return (kwargs["hidden_states"],), {name: value for name, value in kwargs.items() if name != "hidden_states"}
