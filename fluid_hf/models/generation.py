"""`generate` on ranks that hold different experts: a rank that has finished goes on until all have.

transformers has the loop for it (`synced_gpus`), made for ZeRO 3 and FSDP, where it is the default; experts that are
split over ranks need it for the same reason.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

__all__ = ["bind_generation", "unbind_generation"]

POSITION = 5  # of `synced_gpus` among the arguments of transformers' `generate`


def bind_generation(model: nn.Module) -> None:
    """Let the model's `generate` synchronise the ranks unless it is told not to."""
    own = getattr(type(model), "generate", None)
    if own is None or "generate" in model.__dict__:
        return

    @functools.wraps(own)
    def generate(*args: Any, **kwargs: Any) -> Any:
        if len(args) <= POSITION and kwargs.get("synced_gpus") is None:
            kwargs["synced_gpus"] = True
        return own(model, *args, **kwargs)

    generate.is_synchronised = True  # type: ignore[attr-defined]
    model.generate = generate  # type: ignore[assignment]


def unbind_generation(model: nn.Module) -> None:
    """Give the model its class's own `generate` back."""
    if hasattr(model.__dict__.get("generate"), "is_synchronised"):
        del model.generate
