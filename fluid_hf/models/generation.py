"""`generate` on ranks that hold different experts: a rank that has finished goes on until all have.

transformers has the loop for it (`synced_gpus`), made for ZeRO 3 and FSDP, where it is the default; experts that are
split over ranks need it for the same reason. What a rank that goes on may run out of it does not look after: the room
of a static cache, and tokens to draft. Nor does it for prompts that are read in pieces.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS

from fluid_hf.errors import ConfigError

__all__ = ["bind_generation", "unbind_generation"]

# The first arguments of transformers' `generate`, in order.
ARGUMENTS = (
    "inputs",
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
)
DEFAULT_STEPS = 20  # of transformers, where no length is set
DRAFTING = "_get_candidate_generator"


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What one rank is about to generate: most steps, those its cache has room for, forward passes of the prompt."""

    steps: int
    room: int | None
    chunks: int


def bind_generation(model: nn.Module) -> None:
    """Let the model's `generate` synchronise the ranks unless it is told not to.

    It then raises `ConfigError` on all ranks where they would go different ways, and `CollectiveError` where not every
    rank calls it within `timeout_seconds`.

    Args:
        model: a patched model with split experts; one without `generate` stays as it is.
    """
    own = getattr(type(model), "generate", None)
    if own is None or "generate" in model.__dict__:
        return

    @functools.wraps(own)
    def generate(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
        if len(args) <= ARGUMENTS.index("synced_gpus") and given.get("synced_gpus") is None:
            given["synced_gpus"] = kwargs["synced_gpus"] = True
        if given["synced_gpus"]:
            # In every call, as a rank cannot know what the others were given; it is small beside one forward pass.
            state: Any = model.fluid
            _check(state.control.gather(_plan(model, given), "generate of a patched model"))
        return own(model, *args, **kwargs)

    generate.is_synchronised = True  # type: ignore[attr-defined]
    model.generate = generate  # type: ignore[assignment]
    if hasattr(type(model), DRAFTING):
        setattr(model, DRAFTING, _keep_drafting(getattr(type(model), DRAFTING), model))


def unbind_generation(model: nn.Module) -> None:
    """Give the model its class's own `generate` back."""
    if hasattr(model.__dict__.get("generate"), "is_synchronised"):
        del model.generate
        model.__dict__.pop(DRAFTING, None)


def _plan(model: Any, given: Mapping[str, Any]) -> _Plan:
    configs = (given.get("generation_config"), getattr(model, "generation_config", None))

    def setting(name: str) -> Any:
        found = (given.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in found if value is not None), None)

    decodes_only = not getattr(model.config, "is_encoder_decoder", False)
    names = ("inputs_embeds", "inputs", "input_ids") if decodes_only else ("decoder_input_ids",)
    prompts = [given[name].shape[1] for name in names if given.get(name) is not None]
    length = max(prompts, default=1)
    steps = setting("max_new_tokens")
    if steps is None:
        steps = DEFAULT_STEPS if setting("max_length") is None else setting("max_length") - length
    cache, room, chunks = given.get("past_key_values"), None, 1
    # Layers with a sliding window go on without end.
    held = [layer for layer in getattr(cache, "layers", ()) if not getattr(layer, "is_sliding", False)]
    sizes = [layer.max_cache_len for layer in held if hasattr(layer, "max_cache_len")]
    if sizes:
        room = min(sizes) - length + 1  # the last token needs none
    elif cache is None and setting("cache_implementation") in ALL_STATIC_CACHE_IMPLEMENTATIONS:
        room = max(steps, (setting("max_cache_len") or 0) - length + 1)
    if setting("prefill_chunk_size") is not None:
        read = 0 if cache is None else int(cache.get_seq_length())  # a prompt with all that was read, or without it
        chunks = math.ceil((length - read if length > read else length) / setting("prefill_chunk_size"))
    return _Plan(steps, room, chunks)


def _check(plans: list[_Plan]) -> None:
    """Refuse what only some ranks could go on with, in the same words on all.

    Raises:
        ConfigError: a static cache is too small for another rank's steps, or prompts have unlike numbers of chunks.
    """
    steps = max(plan.steps for plan in plans)
    for rank, plan in enumerate(plans):
        if plan.room is not None and plan.room < steps:
            raise ConfigError(
                f"static cache of rank {rank} (room for {plan.room} new tokens) must hold the steps of all ranks "
                f"({steps}), as they generate together; pass equal max_new_tokens, or use a dynamic cache."
            )
    chunks = [plan.chunks for plan in plans]
    if min(chunks) != max(chunks):
        raise ConfigError(
            f"prefill_chunk_size must give all ranks equally many chunks, but rank {chunks.index(min(chunks))} has "
            f"{min(chunks)} and rank {chunks.index(max(chunks))} has {max(chunks)}; pad the prompts to one length, or "
            "leave prefill_chunk_size out."
        )


def _keep_drafting(own: Callable[..., Any], model: nn.Module) -> Callable[..., Any]:
    """The maker of an assistant's drafts; of a rank that has finished transformers would ask for less than none.

    An assistant with split experts needs its ranks together, so there each of them drafts at least one token.
    """

    @functools.wraps(own)
    def make(*args: Any, **kwargs: Any) -> Any:
        drafts = own(model, *args, **kwargs)
        count = getattr(drafts, "_calculate_new_tokens", None)
        if count is not None:
            assistant = getattr(drafts, "assistant_model", None)
            least = int(hasattr(getattr(assistant, "generate", None), "is_synchronised"))

            def at_least(*ids: Any) -> tuple[int, int]:
                fewest, most = count(*ids)
                return max(fewest, 0), max(most, least)

            drafts._calculate_new_tokens = at_least
        return drafts

    return make
