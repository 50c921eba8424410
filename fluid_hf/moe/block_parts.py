"""RMSNorm and SwiGLU around the experts of a decoder layer, one launch each way instead of six and two.

In transformers both are written out in PyTorch: of a norm, float32 copies of the rows and of the normed rows stay until
backward; of SwiGLU, the activated gate. Here the inputs stay alone, and everything is computed in float32 and rounded
once. The plain code beside them is transformers' own, which also serves what the kernels do not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fluid_hf.kernels import kernel_module, use_kernels

__all__ = ["fuses_norm", "fuses_swiglu", "rms_norm", "swiglu"]

WIDEST_ROW = 16384  # of a norm: a program holds whole rows


def fuses_norm(rows: torch.Tensor, weight_N: torch.Tensor) -> bool:
    """Whether `rms_norm` serves these: tensors of one type on a GPU with Triton; a compiler fuses by itself."""
    return (
        use_kernels(rows)
        and rows.dtype == weight_N.dtype
        and weight_N.dim() == 1
        and 0 < weight_N.shape[0] == rows.shape[-1] <= WIDEST_ROW
        and _is_plain(rows)
        and _is_plain(weight_N)
    )


def fuses_swiglu(gate: torch.Tensor, up: torch.Tensor) -> bool:
    """Whether `swiglu` serves these: as `fuses_norm`."""
    return (
        use_kernels(gate)
        and gate.dtype == up.dtype
        and gate.shape == up.shape
        and gate.is_contiguous()
        and up.is_contiguous()
        and _is_plain(gate)
        and _is_plain(up)
    )


def rms_norm(rows: torch.Tensor, weight_N: torch.Tensor, eps: float) -> torch.Tensor:
    """`weight * rows / sqrt(mean(rows ** 2) + eps)` along the last dimension (Zhang and Sennrich, arXiv:1910.07467)."""
    result: torch.Tensor = _RMSNorm.apply(rows, weight_N, eps)
    return result


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` (Shazeer, arXiv:2002.05202)."""
    result: torch.Tensor = _SwiGLU.apply(gate, up)
    return result


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight_N: torch.Tensor, eps: float) -> torch.Tensor:
        flat = rows.reshape(-1, rows.shape[-1]).contiguous()
        out, scale = kernel_module("block_kernels").rms_norm_forward(flat, weight_N.contiguous(), eps)
        ctx.save_for_backward(rows, weight_N, scale)
        return out.view(rows.shape)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        rows, weight, scale = ctx.saved_tensors
        flat, width = rows.reshape(-1, rows.shape[-1]).contiguous(), rows.shape[-1]
        grad_rows, grad_weight = kernel_module("block_kernels").rms_norm_backward(
            grad.reshape(-1, width).contiguous(), flat, weight.contiguous(), scale, ctx.needs_input_grad[1]
        )
        return grad_rows.view(rows.shape), grad_weight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return kernel_module("block_kernels").swiglu_forward(gate, up)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return kernel_module("block_kernels").swiglu_backward(grad.contiguous(), gate, up)  # type: ignore[no-any-return]
