"""Between rows and expert-sorted (row, expert) pairs, and back: the steps around the grouped GEMM.

Legend: R rows, T tokens, K experts per token, S pairs, H hidden size, P ranks, E experts held here. Triton on
CUDA, plain PyTorch elsewhere; sums run in float32 (float64 for float64 input) in a fixed order, so results are equal
from run to run.

    rows      0: e1 e0      1: e1 -       2: e0 e1
    pairs     expert 0: (0, e0) (2, e0)   expert 1: (0, e1) (1, e1) (2, e1)
    pair_row  0 2 0 1 2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fluid_hf.kernels import kernel_module, use_kernels

__all__ = [
    "PairPlan",
    "expand_rows",
    "gather_rows",
    "gather_weight_grads",
    "make_pair_plan",
    "reduce_pairs",
    "reduce_rows",
    "spread_rows",
    "stacked",
    "sum_dtype",
]


class PairPlan(NamedTuple):
    """Where each pair comes from.

    Attributes:
        pair_row_S: row of each pair, expert-sorted, ties by row then slot.
        pair_slot_S: `row * K + slot` of each pair.
        row_pair_RK: pair of each (row, slot); S or more where there is none.
        offsets_E: end of each expert's pairs, int32 (the `offs` of a grouped GEMM).
    """

    pair_row_S: torch.Tensor
    pair_slot_S: torch.Tensor
    row_pair_RK: torch.Tensor
    offsets_E: torch.Tensor

    def first_pairs(self, num_pairs: int) -> PairPlan:
        """The plan without the places that were kept for more pairs than there are."""
        if num_pairs == self.num_pairs:
            return self
        return PairPlan(self.pair_row_S[:num_pairs], self.pair_slot_S[:num_pairs], self.row_pair_RK, self.offsets_E)

    @property
    def num_pairs(self) -> int:
        """S."""
        return self.pair_row_S.shape[0]


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type in which sums of `dtype` values are accumulated."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_pair_plan(
    ids_RK: torch.Tensor,
    num_experts: int,
    num_pairs: int,
    first_expert: int = 0,
    *,
    flag: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
) -> PairPlan:
    """Sort the (row, expert) pairs by expert.

    Args:
        ids_RK: expert ids, any integer type; those outside [first_expert, first_expert + E) have no pair.
        num_experts: E.
        num_pairs: number of ids inside, known on the host, so that nothing waits for the device; or more, with what
            lies beyond undefined (see `PairPlan.first_pairs`).
        flag: where the kernels write that an id is outside (`fluid_hf.comm.late_status`); `None` if that is no fault.
        offsets: int32 [E], where the kernels write `offsets_E`; a new tensor by default.
    """
    if use_kernels(ids_RK):
        sort_kernels = kernel_module("sort_kernels")
        return PairPlan(*sort_kernels.pair_plan(ids_RK, first_expert, num_experts, num_pairs, flag, offsets))
    rows, top_k = ids_RK.shape
    key = ids_RK.reshape(-1).to(torch.int64) - first_expert
    key = torch.where((key < 0) | (key >= num_experts), num_experts, key)
    order = torch.argsort(key, stable=True)[:num_pairs]
    row_pair = torch.full((rows * top_k,), num_pairs, dtype=torch.int64, device=ids_RK.device)
    row_pair[order] = torch.arange(num_pairs, device=ids_RK.device)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids_RK.device)
    counts.scatter_add_(0, key, torch.ones_like(key))
    offsets = counts[:num_experts].cumsum(0).to(torch.int32)
    return PairPlan(order // top_k, order, row_pair.view(rows, top_k), offsets)


def gather_rows(rows_RH: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`rows_RH[index]`."""
    if use_kernels(rows_RH):
        row_kernels = kernel_module("row_kernels")
        return row_kernels.expand(rows_RH, index)
    return rows_RH.index_select(0, index)


def expand_rows(rows_RH: torch.Tensor, plan: PairPlan, early: bool = False) -> torch.Tensor:
    """Copy each row to its pairs: [R, H] -> [S, H]; the kernels `early` to those before the plan's last offset only."""
    if early and use_kernels(rows_RH):
        copied: torch.Tensor = kernel_module("row_kernels").expand(rows_RH, plan.pair_row_S, ends_E=plan.offsets_E)
        return copied
    return gather_rows(rows_RH, plan.pair_row_S)


def spread_rows(
    source_TH: torch.Tensor, row_token_R: torch.Tensor | None, token_row_TP: torch.Tensor, rows: int
) -> torch.Tensor:
    """Each token's row at all its destinations: [R, H].

    Args:
        row_token_R: token of each row; the kernels do without.
        token_row_TP: row of each (token, destination); R or more where there is none.
    """
    if row_token_R is None:
        wire_kernels = kernel_module("wire_kernels")
        return wire_kernels.spread_rows(source_TH, token_row_TP, rows)
    return source_TH.index_select(0, row_token_R)


def reduce_pairs(pairs: Sequence[torch.Tensor], plan: PairPlan, out_RH: torch.Tensor) -> None:
    """Write to each row the sum of its pairs, over all tensors [S, H] given; zero for rows without pairs."""
    if use_kernels(out_RH):
        row_kernels = kernel_module("row_kernels")
        return row_kernels.reduce_pairs(list(pairs), plan.row_pair_RK, out_RH)
    total = torch.zeros(out_RH.shape, dtype=sum_dtype(out_RH.dtype), device=out_RH.device)
    for slot in range(plan.row_pair_RK.shape[1]):
        index_R = plan.row_pair_RK[:, slot]
        valid_R1 = (index_R < plan.num_pairs)[:, None]
        for pairs_SH in pairs:
            if plan.num_pairs:
                picked = pairs_SH.index_select(0, index_R.clamp(max=plan.num_pairs - 1)).to(total.dtype)
                total += torch.where(valid_R1, picked, 0.0)
    out_RH.copy_(total)


def reduce_rows(
    own_TH: torch.Tensor | None, rows_RH: torch.Tensor, token_row_TP: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Sum the rows of each token, own part first, then by rank: [T, H] of type `dtype`."""
    if use_kernels(rows_RH):
        row_kernels = kernel_module("row_kernels")
        return row_kernels.reduce_rows(own_TH, rows_RH, token_row_TP, dtype)
    num_rows = rows_RH.shape[0]
    shape = (token_row_TP.shape[0], rows_RH.shape[1])
    if own_TH is not None:
        total = own_TH.to(sum_dtype(rows_RH.dtype), copy=True)
    else:
        total = torch.zeros(shape, dtype=sum_dtype(rows_RH.dtype), device=rows_RH.device)
    for rank in range(token_row_TP.shape[1] if num_rows else 0):
        index_T = token_row_TP[:, rank]
        picked = rows_RH.index_select(0, index_T.clamp(max=num_rows - 1)).to(total.dtype)
        total += torch.where((index_T < num_rows)[:, None], picked, 0.0)
    return total.to(dtype)


def gather_weight_grads(
    own_TK: torch.Tensor | None,
    returned_RK: torch.Tensor,
    token_row_TP: torch.Tensor,
    index_TK: torch.Tensor,
    num_local_experts: int,
    own_rank: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Gradients of the routing weights [T, K], from the own tokens and from the row that each expert's rank returned.

    Args:
        own_TK: those of the own tokens, zero for other ranks' experts; `None` if they travelled like all others.
        dtype: of the result.
    """
    if use_kernels(returned_RK):
        wire_kernels = kernel_module("wire_kernels")
        inputs = (own_TK, returned_RK, token_row_TP, index_TK.contiguous(), num_local_experts, own_rank, dtype)
        return wire_kernels.gather_weight_grads(*inputs)
    # The kernels' places say more than R where there is no row.
    row_TK = token_row_TP.gather(1, index_TK // num_local_experts).clamp(max=returned_RK.shape[0]).long()
    grad_TK = torch.nn.functional.pad(returned_RK, (0, 0, 0, 1)).gather(0, row_TK)
    return (grad_TK if own_TK is None else grad_TK + own_TK).to(dtype)


def stacked(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Vectors of one length [N, E]: as they are if they lie side by side, which costs no launch, else a copy."""
    first, count, size = vectors[0], len(vectors), vectors[0].shape[0]
    start, step = first.data_ptr(), first.nbytes
    beside = all([vector.data_ptr() == start + at * step for at, vector in enumerate(vectors)])
    # What lies inside the first one's memory is part of it: no other tensor's memory overlaps it.
    if beside and first.untyped_storage().nbytes() >= (first.storage_offset() + count * size) * first.itemsize:
        return first.as_strided((count, size), (size, 1))
    return torch.stack(list(vectors))
