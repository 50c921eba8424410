"""Multiprocessors that persistent GEMMs leave to the communication kernels beside them.

torch's grouped GEMM starts one block on each multiprocessor, and each computes its share of the tiles. Where NCCL's
kernel holds a multiprocessor, that block starts when the others are done, and the GEMM takes twice as long: between two
H200 over shared memory NCCL takes two of 132, and Mixtral's layers lost 5% by it. PyTorch can start fewer blocks
(`torch._C._set_sm_carveout_experimental`); it is set around single launches and set back, so that nothing else sees it.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

__all__ = ["AS_IT_IS", "Spared", "can_spare", "spared_now"]

AS_IT_IS: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()

_get: Any = getattr(torch._C, "_get_sm_carveout_experimental", None)
_set: Any = getattr(torch._C, "_set_sm_carveout_experimental", None)


def can_spare() -> bool:
    """Whether this PyTorch has the setting."""
    return _get is not None and _set is not None


def spared_now() -> int:
    """Multiprocessors that GEMMs launched now leave free."""
    return (_get() or 0) if _get is not None else 0


class Spared:
    """Context in which GEMMs leave multiprocessors free; used once.

    Args:
        number: of multiprocessors.
    """

    __slots__ = ("_before", "_number")

    def __init__(self, number: int) -> None:
        self._number, self._before = number, None

    def __enter__(self) -> None:
        self._before = _get()
        _set(self._number)

    def __exit__(self, *error: object) -> None:
        _set(self._before)
