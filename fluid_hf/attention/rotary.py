"""Rotary position embedding of several heads in few kernel launches, from the wire's layout to the core's.

The half-split form of transformers' Llama-like models (Su et al., 2021): `x * cos + rotate_half(x) * sin`.
Legend: S ranks, B sequences, L tokens of each on a rank, T = S * L, n heads, D head size.
"""

from __future__ import annotations

import torch

__all__ = ["rotate", "rotate_back"]


def rotate(x_BSLnD: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor, out_BTnD: torch.Tensor) -> None:
    """Write the rotated heads to `out_BTnD`."""
    cos, sin = _by_rank(x_BSLnD, cos_BTD, sin_BTD)
    out, half = out_BTnD.unflatten(1, x_BSLnD.shape[1:3]), _half(x_BSLnD)
    torch.mul(x_BSLnD, cos, out=out)
    out[..., :half].addcmul_(x_BSLnD[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x_BSLnD[..., :half], sin[..., half:])


def rotate_back(grad_BTnD: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor, out_BSLnD: torch.Tensor) -> None:
    """Write the gradient of what was rotated to `out_BSLnD`."""
    cos, sin = _by_rank(out_BSLnD, cos_BTD, sin_BTD)
    grad, half = grad_BTnD.unflatten(1, out_BSLnD.shape[1:3]), _half(out_BSLnD)
    torch.mul(grad, cos, out=out_BSLnD)
    out_BSLnD[..., :half].addcmul_(grad[..., half:], sin[..., half:])
    out_BSLnD[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)


def _by_rank(x_BSLnD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines as [B or 1, S, L, 1, D], in the type of `x`."""
    ranks = x_BSLnD.shape[1:3]
    first, second = (table.to(x_BSLnD.dtype).unflatten(1, ranks).unsqueeze(3) for table in (cos, sin))
    return first, second


def _half(x: torch.Tensor) -> int:
    return x.shape[-1] // 2
