"""Rotary position embedding of several heads in few kernel launches, from the wire's layout to the core's.

The half-split form of transformers' Llama-like models (Su et al., 2021): `x * cos + rotate_half(x) * sin`.
Legend: S ranks, B sequences, L tokens of each on a rank, T = S * L, n heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["RotaryTables", "rotate", "rotate_back"]


@dataclass(frozen=True)
class RotaryTables:
    """Cosines and sines of all tokens, shaped once per forward pass.

    Attributes:
        cos, sin: [B or 1, S, L, 1, D], contiguous.
        sin_low, sin_high: the sines' halves [B or 1, S, L, 1, D / 2].
    """

    cos: torch.Tensor
    sin: torch.Tensor
    sin_low: torch.Tensor
    sin_high: torch.Tensor

    @classmethod
    def shaped(cls, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor, sp_size: int) -> RotaryTables:
        """From the tables of the model's rotary embedding."""
        cos, sin = (table.contiguous().unflatten(1, (sp_size, -1)).unsqueeze(3) for table in (cos_BTD, sin_BTD))
        return cls(cos, sin, *sin.chunk(2, dim=-1))

    def to(self, dtype: torch.dtype) -> RotaryTables:
        """The same in another type."""
        if self.cos.dtype == dtype:
            return self
        sin = self.sin.to(dtype)
        return RotaryTables(self.cos.to(dtype), sin, *sin.chunk(2, dim=-1))


def rotate(x_BSLnD: torch.Tensor, tables: RotaryTables) -> torch.Tensor:
    """The rotated heads, contiguous: [B, S, L, n, D]."""
    out = torch.empty_like(x_BSLnD, memory_format=torch.contiguous_format)
    torch.mul(x_BSLnD, tables.cos, out=out)
    low, high = x_BSLnD.chunk(2, dim=-1)
    out_low, out_high = out.chunk(2, dim=-1)
    out_low.addcmul_(high, tables.sin_low, value=-1)
    out_high.addcmul_(low, tables.sin_high)
    return out


def rotate_back(grad_BSLnD: torch.Tensor, tables: RotaryTables, out_BSLnD: torch.Tensor) -> None:
    """Write the gradient of what was rotated to `out_BSLnD`."""
    torch.mul(grad_BSLnD, tables.cos, out=out_BSLnD)
    low, high = grad_BSLnD.chunk(2, dim=-1)
    out_low, out_high = out_BSLnD.chunk(2, dim=-1)
    out_low.addcmul_(high, tables.sin_high)
    out_high.addcmul_(low, tables.sin_low, value=-1)
