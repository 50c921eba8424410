"""`generate` on ranks that hold different experts: a rank that has finished goes on until all have.

transformers has the loop for it (`synced_gpus`), made for ZeRO 3 and FSDP, where it is the default; experts that are
split over ranks need it for the same reason. A rank that goes on in it would leave tokens of its own in the cache,
which the next turn of a conversation continues, and drafts behind its end. So it leaves the loop, and then goes on with
a token that leaves nothing; one that drafts, or has an encoder, stays in. What such a rank may run out of is looked
after here: the room of a static cache, and tokens to draft. So are prompts that are read in pieces.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor
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
GOES_ON = "_has_unfinished_sequences"
BATCHING = "init_continuous_batching"  # also of `generate_batch` and of the cache "paged"


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What one rank is about to generate: most steps, those its cache has room for, passes of the prompt and a step."""

    steps: int
    room: int | None
    chunks: int
    passes: int


def bind_generation(model: nn.Module) -> None:
    """Let the model's `generate` synchronise the ranks unless it is told not to, and refuse continuous batching.

    `generate` then raises `ConfigError` on all ranks where they would go different ways, and `CollectiveError` where
    not every rank calls it within `timeout_seconds`.

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
        if not given["synced_gpus"] or not all(hasattr(model, name) for name in (DRAFTING, GOES_ON)):
            return own(model, *args, **kwargs)
        # In every call, as a rank cannot know what the others were given; it is small beside one forward pass.
        state: Any = model.fluid
        plan = _plan(model, given)
        _check(state.control.gather(plan, "generate of a patched model"))
        ending = _Ending(model)
        with ending.bound():
            output = own(model, *args, **kwargs)
        ending.accompany(plan.passes)
        return output

    generate.is_synchronised = True  # type: ignore[attr-defined]
    model.generate = generate  # type: ignore[assignment]
    if hasattr(type(model), BATCHING):
        setattr(model, BATCHING, _refuse_batching)


def unbind_generation(model: nn.Module) -> None:
    """Give the model its class's own `generate` back."""
    if hasattr(model.__dict__.get("generate"), "is_synchronised"):
        del model.generate
        model.__dict__.pop(BATCHING, None)


def _refuse_batching(*args: Any, **kwargs: Any) -> Any:
    # Each rank's thread takes as many steps as its requests need; what it raises is logged, and answers end early.
    raise ConfigError(
        "continuous batching (generate_batch, or cache_implementation='paged') cannot be used with ep_size above 1, as "
        "the ranks would take unlike numbers of steps; use generate, or unpatch the model."
    )


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
    scale = setting("guidance_scale")
    processors = given.get("logits_processor") or ()
    guides = sum(isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) for processor in processors)
    return _Plan(steps, room, chunks, passes=1 + guides + (scale is not None and scale != 1))


def _check(plans: list[_Plan]) -> None:
    """Refuse what only some ranks could go on with, in the same words on all.

    Raises:
        ConfigError: a static cache is too small for another rank's steps, prompts have unlike numbers of chunks, or
            only some ranks generate with guidance.
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

    passes = [plan.passes for plan in plans]
    if min(passes) != max(passes):
        least, most = passes.index(min(passes)), passes.index(max(passes))
        raise ConfigError(
            "guidance_scale must be set on all ranks or on none, as it runs the model twice in each step, but rank "
            f"{least} runs it {min(passes)} and rank {most} {max(passes)} times."
        )


class _Ending:
    """What one call of `generate` does when its rank has finished and others have not."""

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._stays = bool(getattr(model.config, "is_encoder_decoder", False))  # a step needs what the encoder said
        self._finished = False
        self._device: torch.device | None = None  # where the ranks ask each other, once the loop was left

    @contextlib.contextmanager
    def bound(self) -> Iterator[None]:
        """The model's loop asks here; before, it may have asked a call that this one is drafting for."""
        names, given = (GOES_ON, DRAFTING), vars(self._model)
        before = {name: given[name] for name in names if name in given}
        own = {name: functools.partial(getattr(type(self._model), name), self._model) for name in names}
        self._ask = own[GOES_ON]
        given.update({GOES_ON: self._goes_on, DRAFTING: functools.partial(self._make_drafts, own[DRAFTING])})
        try:
            yield
        finally:
            for name in names:
                del given[name]
            given.update(before)

    def accompany(self, passes: int) -> None:
        """Take part in the steps of other ranks, `passes` forward passes each, until all have finished."""
        if self._device is None:
            return
        token, going = torch.zeros(1, 1, dtype=torch.long, device=self._device), True
        with torch.no_grad():
            while going:
                for _ in range(passes):
                    self._model(input_ids=token, use_cache=False)
                going = self._ask(True, True, device=self._device)

    def _goes_on(self, this_peer_finished: bool, synced_gpus: bool, device: torch.device) -> bool:
        going = self._ask(this_peer_finished, synced_gpus, device=device)
        self._finished = bool(this_peer_finished)
        if going and self._finished and not self._stays:
            self._device = device
            return False
        return going

    def _make_drafts(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The maker of drafts; of a rank that has finished transformers would ask for less than none, and take them.

        An assistant with split experts needs its ranks together, so there each of them drafts at least one token.
        """
        self._stays = True
        drafts = own(*args, **kwargs)
        config: Any = kwargs.get("generation_config", args[0] if args else None)
        propose, count = drafts.get_candidates, getattr(drafts, "_calculate_new_tokens", None)

        def get_candidates(input_ids: torch.Tensor, *rest: Any, **more: Any) -> Any:
            if self._finished:
                config.max_length = input_ids.shape[1]  # the loop then takes no draft, and its cache keeps none
            return propose(input_ids, *rest, **more)

        drafts.get_candidates = get_candidates
        if count is not None:
            assistant = getattr(drafts, "assistant_model", None)
            least = int(hasattr(getattr(assistant, "generate", None), "is_synchronised"))

            def at_least(*ids: Any) -> tuple[int, int]:
                fewest, most = count(*ids)
                return max(fewest, 0), max(most, least)

            drafts._calculate_new_tokens = at_least
        return drafts
