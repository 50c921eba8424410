"""Sequence parallelism by exchange of heads for sequence (Ulysses), as plain all-to-alls around the core attention.

Before the core every rank holds all heads of its piece of the sequence, during it some heads of the whole sequence.
Follows DeepSpeed-Ulysses (Jacobs et al., 2023). This is the reference; `fluid_hf.attention.overlapped` gives the same
numbers with the exchange cut into pieces that hide behind computation.

Legend: B sequences, L tokens of each here, T = S * L tokens in all, S ranks, N heads, n heads of one rank, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fluid_hf.attention.heads import HeadLayout
from fluid_hf.comm.gradients import refuse_second_derivatives
from fluid_hf.comm.peer_exchange import PeerExchange
from fluid_hf.nodes import apart

__all__ = ["CoreAttention", "gather_heads_scatter_seq", "scatter_heads_gather_seq", "ulysses_attention"]

CoreAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class _AllToAll(torch.autograd.Function):
    """[S, ...] by destination to [S, ...] by source; backward is the same exchange."""

    @staticmethod
    def forward(ctx: Any, sent: torch.Tensor, exchange: PeerExchange) -> torch.Tensor:
        ctx.exchange = exchange
        return _exchange(sent, exchange)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        refuse_second_derivatives(ctx.exchange.place[0])
        return _exchange(grads[0], ctx.exchange), None


def _exchange(sent: torch.Tensor, exchange: PeerExchange) -> torch.Tensor:
    sent = sent.contiguous()
    received = torch.empty_like(sent)
    ones = [1] * exchange.size
    with apart():
        exchange.all_to_all(received, sent, ones, ones).wait()
    return received


def scatter_heads_gather_seq(
    q_BNLD: torch.Tensor, k_BNLD: torch.Tensor, v_BNLD: torch.Tensor, layout: HeadLayout, exchange: PeerExchange
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All heads of this rank's tokens to this rank's heads of all tokens: [B, N, L, D] to [B, n, T, D] each.

    Key/value heads that several ranks need are sent to each of them; their gradients are summed.
    """
    if layout.replicated:
        k_BNLD, v_BNLD = (_replicate(tensor, layout) for tensor in (k_BNLD, v_BNLD))
    if v_BNLD.shape[3] != q_BNLD.shape[3]:  # values of another size (MiMo-V2) travel by themselves
        q, k = _gathered([q_BNLD, k_BNLD], exchange).split([layout.local_q, layout.local_kv], dim=1)
        return q, k, _gathered([v_BNLD], exchange)
    whole = _gathered([q_BNLD, k_BNLD, v_BNLD], exchange)
    q, k, v = whole.split([layout.local_q, layout.local_kv, layout.local_kv], dim=1)
    return q, k, v


def _gathered(tensors: list[torch.Tensor], exchange: PeerExchange) -> torch.Tensor:
    """One message per rank: [B, N, L, D] each to this rank's heads of all of them, [B, n, T, D]."""
    size, batch, _, length, dim = exchange.size, *tensors[0].shape
    sent = torch.cat([tensor.unflatten(1, (size, -1)) for tensor in tensors], dim=2).transpose(0, 1)  # [S, B, n, L, D]
    received = _AllToAll.apply(sent, exchange)  # type: ignore[no-untyped-call]
    return received.permute(1, 2, 0, 3, 4).reshape(batch, -1, size * length, dim)  # type: ignore[no-any-return]


def _replicate(heads_BNLD: torch.Tensor, layout: HeadLayout) -> torch.Tensor:
    index, count = layout.kv_index(), layout.num_kv_heads
    times = len(index) // count
    if index == [head for head in range(count) for _ in range(times)]:  # its gradient is one sum
        return heads_BNLD.unsqueeze(2).expand(-1, -1, times, -1, -1).flatten(1, 2)
    return torch.cat([heads_BNLD[:, head : head + 1] for head in index], dim=1)


def gather_heads_scatter_seq(context_BTnD: torch.Tensor, exchange: PeerExchange) -> torch.Tensor:
    """This rank's heads of all tokens back to all heads of this rank's tokens: [B, T, n, D] to [B, L, N, D]."""
    sent = context_BTnD.unflatten(1, (exchange.size, -1)).transpose(0, 1)  # [S, B, L, n, D]
    received = _AllToAll.apply(sent, exchange)  # type: ignore[no-untyped-call]
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3)  # type: ignore[no-any-return]


def ulysses_attention(
    q_BNLD: torch.Tensor,
    k_BNLD: torch.Tensor,
    v_BNLD: torch.Tensor,
    core: CoreAttention,
    layout: HeadLayout,
    exchange: PeerExchange,
) -> torch.Tensor:
    """Attention over the whole sequences for this rank's tokens. Collective over the group.

    Args:
        q_BNLD, k_BNLD, v_BNLD: this rank's tokens, rotary embedding applied; values may have another D.
        core: attention of [B, n, T, D] queries, keys, values; returns [B, T, n, D].
        layout: which rank gets which heads.
        exchange: exchange of the sequence-parallel group.

    Returns:
        [B, L, N, D].
    """
    q, k, v = scatter_heads_gather_seq(q_BNLD, k_BNLD, v_BNLD, layout, exchange)
    return gather_heads_scatter_seq(core(q, k, v), exchange)
