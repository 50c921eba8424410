"""RMSNorm, rotary embedding and SwiGLU around the experts of a decoder layer, in one launch each way.

In transformers they are written out in PyTorch, six, ten and two launches: of a norm, float32 copies of the rows and of
the normed rows stay until backward; of SwiGLU, the activated gate. Here the inputs stay alone, of the rotary embedding
nothing but its tables, and everything is computed in float32 and rounded once. The plain code beside them is
transformers' own, which also serves what the kernels do not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fluid_hf.comm.gradients import inside_transforms
from fluid_hf.kernels import kernel_module, use_kernels

__all__ = ["fuses_norm", "fuses_rotary", "fuses_swiglu", "rms_norm", "rotary", "swiglu"]

WIDEST_ROW = 16384  # of a norm: a program holds whole rows
WIDEST_HEAD = 512
PLAIN = (torch.Tensor, torch.nn.Parameter)


def fuses_norm(rows: torch.Tensor, weight_N: torch.Tensor) -> bool:
    """Whether `rms_norm` serves these: plain tensors of one type on one GPU with Triton; a compiler fuses by itself."""
    return _are_alike(rows, weight_N) and weight_N.dim() == 1 and 0 < weight_N.shape[0] == rows.shape[-1] <= WIDEST_ROW


def fuses_swiglu(gate: torch.Tensor, up: torch.Tensor) -> bool:
    """Whether `swiglu` serves these: as `fuses_norm`."""
    return _are_alike(gate, up) and gate.shape == up.shape and gate.is_contiguous() and up.is_contiguous()


def fuses_rotary(q_BnTD: torch.Tensor, k_BnTD: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor) -> bool:
    """Whether `rotary` serves these: as `fuses_norm`, the whole head turned, no gradient of the angles."""
    batch, _, tokens, dim = q_BnTD.shape
    return (
        _are_alike(q_BnTD, k_BnTD, cos_BTD, sin_BTD)
        and cos_BTD.shape == sin_BTD.shape
        and cos_BTD.shape in ((1, tokens, dim), (batch, tokens, dim))
        and k_BnTD.shape[::2] == (batch, tokens)
        and k_BnTD.shape[3] == dim <= WIDEST_HEAD
        and dim % 2 == 0
        and q_BnTD.stride(3) == k_BnTD.stride(3) == 1
        and not (cos_BTD.requires_grad or sin_BTD.requires_grad)
    )


def rms_norm(rows: torch.Tensor, weight_N: torch.Tensor, eps: float) -> torch.Tensor:
    """`weight * rows / sqrt(mean(rows ** 2) + eps)` along the last dimension (Zhang and Sennrich, arXiv:1910.07467)."""
    result: torch.Tensor = _RMSNorm.apply(rows, weight_N, eps)
    return result


def rotary(
    q_BnTD: torch.Tensor, k_BnTD: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x * cos + rotate_half(x) * sin` of queries and keys (Su et al., arXiv:2104.09864)."""
    result: tuple[torch.Tensor, torch.Tensor] = _Rotary.apply(q_BnTD, k_BnTD, cos_BTD, sin_BTD)
    return result


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` (Shazeer, arXiv:2002.05202)."""
    result: torch.Tensor = _SwiGLU.apply(gate, up)
    return result


def _are_alike(first: torch.Tensor, *others: torch.Tensor) -> bool:
    if torch.compiler.is_compiling() or not use_kernels(first) or type(first) not in PLAIN or inside_transforms():
        return False
    dtype, device = first.dtype, first.get_device()
    return all([other.dtype == dtype and other.get_device() == device and type(other) in PLAIN for other in others])


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight_N: torch.Tensor, eps: float) -> torch.Tensor:
        # The result has memory and shape of its own: a view made in here could not be written to (router jitter does).
        out, scale = kernel_module("block_kernels").rms_norm_forward(rows.contiguous(), weight_N.contiguous(), eps)
        ctx.save_for_backward(rows, weight_N, scale)
        return out  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        rows, weight, scale = ctx.saved_tensors
        grad_rows, grad_weight = kernel_module("block_kernels").rms_norm_backward(
            grad.contiguous(), rows.contiguous(), weight.contiguous(), scale, ctx.needs_input_grad[1]
        )
        return grad_rows, grad_weight, None


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


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return kernel_module("block_kernels").rotate(q, k, cos, sin, False)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        q, k = (grad if grad.stride(3) == 1 else grad.contiguous() for grad in grads)
        q, k = kernel_module("block_kernels").rotate(q, k, *ctx.saved_tensors, True)
        return q, k, None, None
