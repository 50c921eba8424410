"""Where a patched model's shared experts run: the order of their events among those of the routed experts' exchange."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from fluid_hf.models.shared_methods import shared_children


def shared_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Shared experts in the block or the layer around routed experts, by the name of the first of these."""
    found: dict[str, nn.Module] = {}
    owners: set[str] = set()
    for name in model.fluid.layers:  # type: ignore[union-attr]
        block = name.rpartition(".")[0]
        for owner in (block, block.rpartition(".")[0]):
            for child in shared_children(model.get_submodule(owner)):
                if owner not in owners:
                    owners.add(owner)
                    found[name] = model.get_submodule(f"{owner}.{child}")
    return found


@contextlib.contextmanager
def record_shared(model: Any) -> Iterator[dict[str, list[str]]]:
    """Events of every layer that has a shared expert, with its passes among them, by the experts' name."""
    watched, found, hooks = shared_experts(model), {}, []
    with model.fluid.record_events() as events:
        for name, shared in watched.items():
            hooks.append(shared.register_forward_hook(lambda *_, n=name: events.append((n, "shared forward"))))
            for parameter in shared.parameters():
                note = lambda _, n=name: events.append((n, "shared backward"))  # noqa: E731
                hooks.append(parameter.register_post_accumulate_grad_hook(note))
        found.update({name: [] for name in watched})
        yield found
    for hook in hooks:
        hook.remove()
    for layer, event in events:
        if layer in found:
            found[layer].append(event)


def misplaced(events: list[str], passes: int = 1) -> list[str]:
    """What did not run in a communication window, of one layer's events; empty if all did.

    Args:
        events: from `record_shared`.
        passes: forward passes that were recorded.
    """
    windows = {"shared forward": ("post combine", "wait combine"), "shared backward": ("post output", "wait output")}
    wrong = [] if events.count("shared forward") == passes else [f"{events.count('shared forward')} forward passes"]
    state = {"post combine": False, "post output": False}
    for event in events:
        kind = " ".join(event.split()[:2])
        for opening, closing in windows.values():
            state[opening] = (state[opening] or kind == opening) and kind != closing
        if event in windows and not state[windows[event][0]]:
            wrong.append(event)
    return wrong
