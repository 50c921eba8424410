"""Lets a second model route as a first one did, so that what differs between them is arithmetic and not a choice.

In bfloat16 a rounding can send a token to another expert, whose output has nothing to do with the first one's: of 8192
tokens in four layers of random weights enough do so to move the whole output by a seventh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["RecordedRouting", "SameRouting"]


class RecordedRouting(TorchFunctionMode):
    """Context of a forward pass whose routers' choices are kept.

    Attributes:
        chosen: the experts of each call of a router, [tokens, K].
    """

    def __init__(self) -> None:
        super().__init__()
        self.chosen: list[torch.Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.topk:
            self.chosen.append(found.indices)
        return found


class SameRouting(TorchFunctionMode):
    """Context of a forward pass whose routers choose what was recorded, with the weights that they give it themselves.

    Args:
        chosen: the experts of each call of a router, [tokens, K].

    Raises:
        StopIteration: more routers are called than were recorded.
    """

    def __init__(self, chosen: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._chosen: Iterator[torch.Tensor] = iter(chosen)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.topk:
            return func(*args, **(kwargs or {}))
        index = next(self._chosen)
        return torch.return_types.topk((args[0].gather(-1, index), index))
