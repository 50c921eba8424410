"""Products that make up sequence-parallel attention's projections and their sums.

Legend: M tokens, K columns of them, S ranks, C columns that a rank gets, E columns of one rank's results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["add_product", "batched_product", "beside", "in_type", "mm_float", "product"]


def batched_product(
    x_SMK: torch.Tensor, right_SKC: torch.Tensor, biases: Sequence[torch.Tensor] | None
) -> torch.Tensor:
    if biases is None:
        return torch.bmm(x_SMK, right_SKC)
    return torch.baddbmm(torch.stack(list(biases))[:, None], x_SMK, right_SKC)


def product(
    x: torch.Tensor,
    rights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] | None,
    rank: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    if biases is None:
        return torch.mm(x, rights[rank], out=out)
    return torch.addmm(biases[rank], x, rights[rank], out=out)


def in_type(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor.to(dtype)`, which costs the host a microsecond where there is nothing to do."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def beside(parts: list[torch.Tensor]) -> torch.Tensor:
    """Parts [M, E] of chunks side by side: [M, sum of E]; one part as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def mm_float(a: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`a @ right` in float32 at least, accumulated in it."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, right)
    if a.device.type == "cuda":
        return torch.mm(a, right, out_dtype=torch.float32)
    return a.float() @ right.float()


def add_product(early: torch.Tensor, a: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`early + a @ right`, both as `mm_float` gives them: added in float32 and rounded once, in one pass."""
    return torch.add(early, mm_float(a, right), out=out)
