"""Whether the Triton kernels serve a tensor; the plain PyTorch code beside them serves the rest."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch

__all__ = ["MAX_INNER_FUSED", "MAX_INNER_GATHERED_WGRAD", "kernel_module", "use_kernels"]

# Largest intermediate sizes with which the grouped GEMMs read rows by index instead of a copy: in the first projection,
# which then computes the activation too, and in the down projection's weight gradient. The first projection's reads a
# copy of any size where torch's grouped GEMM is one kernel. The cost model reckons with the same.
MAX_INNER_FUSED, MAX_INNER_GATHERED_WGRAD = 4096, 2048


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def use_kernels(tensor: torch.Tensor) -> bool:
    """True on CUDA with Triton, except for float64, which the kernels would round."""
    return tensor.is_cuda and tensor.dtype != torch.float64 and _has_triton()


@functools.cache
def kernel_module(name: str) -> Any:
    """`fluid_hf.moe.NAME`, which needs Triton: imported by the first who asks.

    A layer call asks about forty times; this costs the host a fifth of an import statement.
    """
    return importlib.import_module(f"fluid_hf.moe.{name}")
