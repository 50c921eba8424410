"""Freed memory given back to the system while big tensors come and go."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

__all__ = ["MemoryReturner", "return_freed_memory"]


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim, if this is glibc."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return trim


def return_freed_memory() -> None:
    """Give back what is free. glibc keeps freed blocks below 32 MiB for later, and they add up between live ones."""
    trim = _trim()
    if trim is not None:
        trim(0)


class MemoryReturner:
    """Gives freed memory back once in a while.

    Args:
        every_bytes: how much is allocated between two times.
    """

    def __init__(self, every_bytes: int = 16 << 20) -> None:
        self._every = every_bytes
        self._since = 0

    def allocated(self, num_bytes: int) -> None:
        """Count an allocation."""
        self._since += num_bytes
        if self._since >= self._every:
            self._since = 0
            return_freed_memory()
