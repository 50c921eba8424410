"""Triton kernels for what stands around the experts in a decoder layer: RMSNorm, rotary embedding, SwiGLU of dense and
of shared experts.

Each launch reads its inputs once and writes its outputs once; sums run in float32 in a fixed order, without atomics.
Legend: M rows, N columns; B sequences, T tokens of each, n heads, D head size.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from fluid_hf.launch import Kernel, blocks_of, power_of_two

__all__ = ["rms_norm_backward", "rms_norm_forward", "rotate", "swiglu_backward", "swiglu_forward"]

ELEMENTS = 4096  # of a program's tile of RMSNorm; more where a row is longer
BLOCKS = (4096, 2048, 1024)  # elements of a program of SwiGLU: the first that divides them all needs no mask
TOKENS = 32  # of a program of the rotary embedding, for one head
PROGRAMS = 4  # of the backward of RMSNorm on each multiprocessor: each sums the weight's gradient over its rows


def rms_norm_forward(x: torch.Tensor, weight_N: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight * x / sqrt(mean(x ** 2) + eps)` [..., N], and the reciprocal of that root [M] in float32."""
    width = weight_N.shape[0]
    rows = x.numel() // width
    out, scale = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        columns, height, warps = _tile(width)
        _rms_norm_forward((blocks_of(rows, height), 1, 1), (x, weight_N, out, scale), (rows,),
                          (width, eps, height, columns), warps)  # fmt: skip
    return out, scale


def rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight_N: torch.Tensor, scale_M: torch.Tensor, needs_weight: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of `x` [..., N], and of the weight [N] if it is needed."""
    rows, width = scale_M.shape[0], weight_N.shape[0]
    out = torch.empty_like(x)
    columns, height, warps = _tile(width)
    programs = min(max(1, blocks_of(rows, height)), PROGRAMS * _processors(x.device))
    shape = (programs if needs_weight else 0, width)
    sums = torch.empty(shape, dtype=torch.float32, device=x.device)
    if rows:
        _rms_norm_backward((programs, 1, 1), (grad, x, weight_N, scale_M, out, sums), (rows, programs),
                           (width, needs_weight, height, columns), warps)  # fmt: skip
    elif needs_weight:
        sums.zero_()
    return out, sums.sum(0).to(weight_N.dtype) if needs_weight else None


def rotate(
    q_BnTD: torch.Tensor, k_BnTD: torch.Tensor, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor, back: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys turned by their positions' angles, or with `back` the gradients of what was turned.

    Args:
        q_BnTD, k_BnTD: in any order of their dimensions but the last, which is dense; so are the results.
        cos_BTD, sin_BTD: contiguous; of one sequence for all, or of each.
    """
    batch, heads, tokens, dim = q_BnTD.shape
    outs = torch.empty_like(q_BnTD), torch.empty_like(k_BnTD)
    places = [tensor.stride()[:3] for tensor in (q_BnTD, k_BnTD, *outs)]
    steps = [step for place in places for step in place]
    unit = 8 if all([step % 8 == 0 for step in steps]) else 1  # wide accesses, whatever the lengths are
    if q_BnTD.numel() or k_BnTD.numel():
        _rotate(
            (blocks_of(batch * tokens, TOKENS), heads + k_BnTD.shape[1], 1),
            (q_BnTD, k_BnTD, cos_BTD, sin_BTD, *outs),
            (batch * tokens, tokens, 0 if cos_BTD.shape[0] == 1 else tokens, *[step // unit for step in steps]),
            (heads, dim, power_of_two(dim // 2), unit, back, TOKENS),
        )
    return outs


def swiglu_forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of contiguous tensors of one shape."""
    out = torch.empty_like(gate)
    blocks, last, constants, warps = _blocks(gate.numel())
    if blocks:
        _swiglu_forward((blocks, 1, 1), (gate, up, out), (last,), constants, warps)
    return out


def swiglu_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `gate` and `up`."""
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    blocks, last, constants, warps = _blocks(gate.numel())
    if blocks:
        _swiglu_backward((blocks, 1, 1), (grad, gate, up, grad_gate, grad_up), (last,), constants, warps)
    return grad_gate, grad_up


@functools.cache
def _tile(width: int) -> tuple[int, int, int]:
    """Columns and rows of a tile, and its warps: 16 elements a thread."""
    columns = power_of_two(width)
    rows = max(1, ELEMENTS // columns)
    return columns, rows, max(1, min(16, columns * rows // 512))


@functools.lru_cache(maxsize=256)
def _blocks(elements: int) -> tuple[int, int, tuple[int, bool], int]:
    """Programs, elements of the last one, size of a block and whether all are full, and warps: 8 elements a thread.

    A mask that may end anywhere would make every access as narrow as an element.
    """
    size = next((size for size in BLOCKS if elements % size == 0), BLOCKS[-1])
    blocks = blocks_of(elements, size)
    return blocks, elements - (blocks - 1) * size, (size, elements % size == 0), size // 256


@functools.cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 2


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_forward_kernel(
    source, weight, out, scale, rows, width: tl.constexpr, eps: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, COLUMNS)
    known = row < rows
    inside = known[:, None] & (at < width)[None, :]
    x = tl.load(source + row[:, None] * width + at[None, :], mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + at, mask=at < width, other=0.0).to(tl.float32)
    root = 1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / width + eps)
    tl.store(scale + row, root, mask=known)
    y = x * root[:, None] * w[None, :]
    tl.store(out + row[:, None] * width + at[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "programs"])
def _rms_norm_backward_kernel(
    grad, source, weight, scale, out, sums, rows, programs,
    width: tl.constexpr, WEIGHT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, COLUMNS)
    w = tl.load(weight + at, mask=at < width, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), programs):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        known = row < rows
        inside = known[:, None] & (at < width)[None, :]
        place = row[:, None] * width + at[None, :]
        x = tl.load(source + place, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        root = tl.load(scale + row, mask=known, other=0.0)
        normed = x * root[:, None]
        if WEIGHT:
            total += dy * normed
        dy *= w[None, :]
        mean = tl.sum(dy * normed, 1) / width
        dx = (dy - normed * mean[:, None]) * root[:, None]
        tl.store(out + place, dx.to(out.dtype.element_ty), mask=inside)
    if WEIGHT:
        tl.store(sums + tl.program_id(0) * width + at, tl.sum(total, 0), mask=at < width)


@triton.jit
def _turn(source, out, place, target, low, cos_low, sin_low, cos_high, sin_high, inside, half, BACK: tl.constexpr):
    """One half of a head's elements with the other: `x * cos + (-other, other) * sin`, or that transposed."""
    x = tl.load(source + place + low, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(source + place + half + low, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        first, second = x * cos_low + y * sin_high, y * cos_high - x * sin_low
    else:
        first, second = x * cos_low - y * sin_low, y * cos_high + x * sin_high
    tl.store(out + target + low, first.to(out.dtype.element_ty), mask=inside)
    tl.store(out + target + half + low, second.to(out.dtype.element_ty), mask=inside)


_STEPS = [f"{name}_{axis}" for name in ("q", "k", "to_q", "to_k") for axis in ("batch", "head", "token")]


@triton.jit(do_not_specialize=["count", "tokens", "table_step", *_STEPS])
def _rotate_kernel(
    q, k, cos, sin, to_q, to_k, count, tokens, table_step,
    q_batch, q_head, q_token, k_batch, k_head, k_token,
    to_q_batch, to_q_head, to_q_token, to_k_batch, to_k_head, to_k_token,
    heads: tl.constexpr, dim: tl.constexpr, HALF: tl.constexpr, UNIT: tl.constexpr, BACK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sequence, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    half: tl.constexpr = dim // 2
    low = tl.arange(0, HALF)[None, :]
    inside = (row < count)[:, None] & (low < half)
    at = ((sequence * table_step + token) * dim)[:, None] + low
    cos_low = tl.load(cos + at, mask=inside, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + at, mask=inside, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + at + half, mask=inside, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + at + half, mask=inside, other=0.0).to(tl.float32)
    if head < heads:
        place = (sequence * q_batch + head * q_head + token * q_token)[:, None] * UNIT
        target = (sequence * to_q_batch + head * to_q_head + token * to_q_token)[:, None] * UNIT
        _turn(q, to_q, place, target, low, cos_low, sin_low, cos_high, sin_high, inside, half, BACK)
    else:
        head -= heads
        place = (sequence * k_batch + head * k_head + token * k_token)[:, None] * UNIT
        target = (sequence * to_k_batch + head * to_k_head + token * to_k_token)[:, None] * UNIT
        _turn(k, to_k, place, target, low, cos_low, sin_low, cos_high, sin_high, inside, half, BACK)


@triton.jit(do_not_specialize=["last"])
def _swiglu_forward_kernel(gate, up, out, last, SIZE: tl.constexpr, FULL: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, SIZE)
    # The last block may hold fewer: all elements together may be more than a 32-bit number tells.
    inside = within < (SIZE if FULL else tl.where(block + 1 < tl.num_programs(0), SIZE, last))
    at = block * SIZE + within
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["last"])
def _swiglu_backward_kernel(grad, gate, up, grad_gate, grad_up, last, SIZE: tl.constexpr, FULL: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, SIZE)
    inside = within < (SIZE if FULL else tl.where(block + 1 < tl.num_programs(0), SIZE, last))
    at = block * SIZE + within
    dh = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    activated = g * sigmoid
    tl.store(grad_gate + at, (dh * u * (sigmoid * (1 + g * (1 - sigmoid)))).to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + at, (dh * activated).to(grad_up.dtype.element_ty), mask=inside)


_rms_norm_forward = Kernel(_rms_norm_forward_kernel)
_rms_norm_backward = Kernel(_rms_norm_backward_kernel)
_rotate = Kernel(_rotate_kernel)
_swiglu_forward = Kernel(_swiglu_forward_kernel)
_swiglu_backward = Kernel(_swiglu_backward_kernel)
