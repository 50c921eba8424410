"""Grouped GEMM over expert-sorted pairs: forward, input gradient (dgrad) and weight gradient (wgrad).

Legend: S pairs sorted by expert, E experts, N output and M input features; a weight is [E, N, M] as in transformers.
On CUDA in 16-bit types through `torch.nn.functional.grouped_mm`; elsewhere a loop over the experts.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from fluid_hf.kernels import kernel_module, use_kernels

__all__ = ["grouped_dgrad", "grouped_linear", "grouped_wgrad", "is_one_kernel"]


@functools.cache
def is_one_kernel(dtype: torch.dtype, device: torch.device, *widths: int) -> bool:
    """Whether torch's grouped GEMM of matrices with rows of `widths` elements is one kernel.

    Elsewhere it is a loop over the experts, for which the host waits for the device.
    """
    if dtype != torch.bfloat16 or device.type != "cuda" or torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return False
    return all([width % 8 == 0 for width in widths])


def grouped_linear(input_SM: torch.Tensor, weight_ENM: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """`input @ weight[expert].T` for each pair: [S, N]."""
    return _grouped_mm(input_SM, weight_ENM.transpose(-2, -1), offsets_E)


def grouped_dgrad(grad_SN: torch.Tensor, weight_ENM: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """Gradient of `grouped_linear` with respect to its input: [S, M]."""
    return _grouped_mm(grad_SN, weight_ENM, offsets_E)


def grouped_wgrad(
    grads: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], offsets: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Gradient of `grouped_linear` with respect to its weight, summed over pieces: [E, N, M].

    Args:
        grads: output gradients [S_i, N] of each piece.
        inputs: inputs [S_i, M] of each piece.
        offsets: `offsets_E` of each piece.
    """
    pairs = sum([grad.shape[0] for grad in grads])
    if pairs and _use_grouped_mm(grads[0], grads[0].shape[1], inputs[0].shape[1]):
        if len(grads) > 1:
            order, joint = _joint_order(offsets)
            grad, input = torch.cat(list(grads))[order], torch.cat(list(inputs))[order]
        else:
            grad, input, joint = grads[0], inputs[0], offsets[0]
        weight = torch.nn.functional.grouped_mm(grad.t(), input, offs=joint)
        if not _writes_all(weight.device):
            _zero_empty(weight, joint)
        return weight
    experts = offsets[0].shape[0]
    weight = grads[0].new_zeros(experts, grads[0].shape[1], inputs[0].shape[1])
    if not pairs:  # without waiting for the device
        return weight
    for grad, input, ends_E in zip(grads, inputs, offsets, strict=True):
        for expert, (start, end) in enumerate(_spans(ends_E)):
            if end > start:
                weight[expert].addmm_(grad[start:end].t(), input[start:end])
    return weight


def _grouped_mm(input_SM: torch.Tensor, weight_EMN: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    if input_SM.shape[0] == 0:
        return input_SM.new_empty(0, weight_EMN.shape[-1])
    if _use_grouped_mm(input_SM, *weight_EMN.shape[1:]):
        return torch.nn.functional.grouped_mm(input_SM, weight_EMN, offs=offsets_E)
    output = input_SM.new_empty(input_SM.shape[0], weight_EMN.shape[-1])
    for expert, (start, end) in enumerate(_spans(offsets_E)):
        if end > start:
            torch.mm(input_SM[start:end], weight_EMN[expert], out=output[start:end])
    return output


def _use_grouped_mm(operand: torch.Tensor, *widths: int) -> bool:
    """Whether torch takes such operands: 16-bit on CUDA, rows (of `widths` elements) of a multiple of 16 bytes.

    The number of pairs may be any: no row is as long.
    """
    if not operand.is_cuda or operand.dtype not in (torch.bfloat16, torch.float16):
        return False
    return all([width % 8 == 0 for width in widths])


@functools.cache
def _writes_all(device: torch.device) -> bool:
    """Whether torch's weight gradient of an expert without pairs is zero; on Blackwell it is what the memory held.

    Seen by others with PyTorch 2.9 to 2.13 (pytorch issue 172439); on Hopper and where torch loops it is zero.
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 10


def _zero_empty(weight_ENM: torch.Tensor, offsets_E: torch.Tensor) -> None:
    if use_kernels(weight_ENM) and weight_ENM.is_contiguous():
        kernel_module("row_kernels").zero_empty(weight_ENM, offsets_E)
    else:
        empty = torch.diff(offsets_E, prepend=offsets_E.new_zeros(1)) == 0
        weight_ENM.masked_fill_(empty[:, None, None], 0)


def _spans(offsets_E: torch.Tensor) -> list[tuple[int, int]]:
    ends = offsets_E.tolist()  # host synchronisation when on CUDA; only the loop path comes here
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _joint_order(offsets: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Order that sorts the concatenated pieces by expert, ties by piece, and the joint offsets."""
    experts = torch.arange(offsets[0].shape[0], device=offsets[0].device)
    counts = [torch.diff(ends, prepend=ends.new_zeros(1)) for ends in offsets]
    expert_of = torch.cat([experts.repeat_interleave(count) for count in counts])
    return torch.argsort(expert_of, stable=True), torch.stack(list(offsets)).sum(0).to(torch.int32)
