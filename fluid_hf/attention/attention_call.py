"""One forward (and backward) of one sequence-parallel attention layer: the work behind its autograd nodes.

Legend: B sequences, L tokens of each here, M = B * L, T = S * L, S ranks, H hidden, N heads, D head size; a chunk has
C columns per rank (its query, key and value heads) and E columns of results (its query heads).

    forward    scatter: C per rank -> wire          core, chunk by chunk, results -> wire     gather: o_proj
    backward   gather: gradients of results -> wire core, chunk by chunk, gradients -> wire   scatter: input gradient

The methods run in the order of `fluid_hf.attention.overlapped`, which holds the schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fluid_hf.attention.fused_projection import FusedChunk, Projections
from fluid_hf.attention.heads import HeadLayout
from fluid_hf.comm.peer_exchange import ExchangeHandle, PeerExchange
from fluid_hf.comm.tournament import num_rounds, round_peer
from fluid_hf.overlap.wgrad import WgradScheduler, WgradWork
from fluid_hf.ranges import mark, ranged

__all__ = ["AttentionCall", "AttentionContext"]


@dataclass
class AttentionContext:
    """What stays the same between calls of one layer.

    Attributes:
        exchange: exchange of the sequence-parallel group, of size 2 or more.
        layout: heads over ranks.
        head_dim: D.
        scheduler: weight gradient scheduler.
        record: called with the name of each event, for tests and timelines; `None` for nothing.
        name: of the layer, in the ranges of a profile.
    """

    exchange: PeerExchange
    layout: HeadLayout
    head_dim: int
    scheduler: WgradScheduler
    record: Callable[[str], None] | None = None
    name: str = "attention"

    def event(self, name: str) -> None:
        """Record an event, if anybody listens."""
        if self.record is not None:
            self.record(name)
        mark(name)


class AttentionCall:
    """State of one call; shared by its autograd nodes, never kept by the layer.

    Args:
        context: the layer's context.
        read: returns the projections as they are at the time of the call (ZeRO-3 gathers them again for backward).
        shape: B, L, H of the input.
        chunks: pieces the heads are cut into, equal on all ranks.
        dtype: type the projections compute in.
    """

    def __init__(
        self,
        context: AttentionContext,
        read: Callable[[], Projections],
        shape: torch.Size,
        chunks: int,
        dtype: torch.dtype,
    ) -> None:
        self.context, self.dtype = context, dtype
        self.batch, self.length, self.hidden = shape
        self._read = read
        layout, size = context.layout, context.layout.sp_size
        self.fused = [FusedChunk(layout, chunk, context.head_dim) for chunk in layout.chunks(chunks)]
        peers = (round_peer(index, context.exchange.rank, size) for index in range(num_rounds(size)))
        self.peers = [peer for peer in peers if peer is not None]
        # One product per destination, each posted before the next is computed, unless chunks do that already.
        self.by_peer = len(self.peers) == 1 or len(self.fused) == 1
        self._handles: list[list[ExchangeHandle]] = []
        self._received: list[torch.Tensor] = []
        self._returns: list[torch.Tensor | None] = []
        self.returns_in_flight = False

    @property
    def num_chunks(self) -> int:
        """Chunks of heads."""
        return len(self.fused)

    @property
    def complete(self) -> bool:
        """Whether the gradients of all chunks are on their way back."""
        return all(returned is not None for returned in self._returns)

    def projections(self) -> Projections:
        """The weights in the type the call computes in; called inside autograd nodes, without gradients."""
        return self._read().to(self.dtype)

    # -- forward --------------------------------------------------------------------------------------------------
    @ranged("forward attention")
    def scatter(self, x_MH: torch.Tensor) -> None:
        """Project for one chunk of all other ranks' heads after the other and post it; own heads last."""
        context, own = self.context, self.context.exchange.rank
        context.exchange.drain()
        projections = self.projections()
        biases = {name: bias[:, None] for name, bias in projections.biases.items() if bias is not None and name != "o"}
        rights, sums = [], []
        for index, fused in enumerate(self.fused):
            rights.append(fused.by_rank(projections.weights).mT)
            sums.append(fused.by_rank(biases).mT if biases else None)
            self._received.append(self._new(x_MH, fused.columns))
            self._handles.append(self._post_products(x_MH, rights[-1], sums[-1], self._received[-1]))
            context.event(f"post heads {index}")
        for right, bias, received in zip(rights, sums, self._received, strict=True):
            if self.by_peer:
                _product(x_MH, right[own], None if bias is None else bias[own], out=received[own])

    @ranged("forward attention")
    def arrive(self, index: int) -> torch.Tensor:
        """Wait for a chunk: query, key and value heads of this rank for all tokens, [B, S, L, heads, D]."""
        received = self._wait(index)
        self.context.event(f"wait heads {index}")
        return self._by_sequence(received)

    @ranged("forward attention")
    def post_context(self, index: int, context_BTnD: torch.Tensor) -> None:
        """Send the results of a chunk to the ranks that own the tokens."""
        by_rank = context_BTnD.flatten(2).unflatten(1, (-1, self.length)).transpose(0, 1)
        self._post(index, by_rank.reshape(by_rank.shape[0], -1, by_rank.shape[-1]).contiguous())
        self.context.event(f"post results {index}")

    @ranged("forward attention")
    def gather(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Multiply what has arrived with its slice of o_proj while the last chunk is on the wire.

        Returns:
            The output [M, H], and the results of all heads [M, N * D], chunk by chunk, for backward.
        """
        projections = self.projections()
        weight, bias = self._output_weight(projections.weights["o"]), projections.biases["o"]
        size = self.context.layout.sp_size
        first = self._received[0]
        full = first.new_empty(first.shape[1], weight.shape[1])
        early, start = None, 0
        for index in range(self.num_chunks):
            if index and index == self.num_chunks - 1:
                early = _mm_float(full[:, :start], weight[:, :start])
            received = self._wait(index)
            self.context.event(f"wait results {index}")
            end = start + size * received.shape[2]
            full[:, start:end].unflatten(1, (size, -1)).copy_(received.transpose(0, 1))
            if index < self.num_chunks - 1:
                start = end
        if early is None:
            return torch.nn.functional.linear(full, weight, bias), full
        output = early.add_(_mm_float(full[:, start:], weight[:, start:]))
        return (output if bias is None else output.add_(bias)).to(self.dtype), full

    # -- backward -------------------------------------------------------------------------------------------------
    @ranged("backward attention")
    def post_result_grads(self, grad_MH: torch.Tensor) -> None:
        """Send each head's result gradient to the rank that computed the head, the last chunk first."""
        self.context.exchange.drain()
        own = self.context.exchange.rank
        weight = self.projections().weights["o"].unflatten(1, (self.context.layout.sp_size, self.num_chunks, -1))
        rights = [weight[:, :, index].transpose(0, 1) for index in range(self.num_chunks)]  # [S, H, E] each
        self._received = [self._new(grad_MH, right.shape[2]) for right in rights]
        self._handles = [[] for _ in rights]
        self._returns = [None] * self.num_chunks
        for index in reversed(range(self.num_chunks)):
            self._handles[index] = self._post_products(grad_MH, rights[index], None, self._received[index])
            self.context.event(f"post result grads {index}")
        for index in reversed(range(self.num_chunks)):
            if self.by_peer:
                torch.mm(grad_MH, rights[index][own], out=self._received[index][own])

    @ranged("backward attention")
    def arrive_grad(self, index: int) -> torch.Tensor:
        """Wait for the result gradients of a chunk: [B, T, n, D]."""
        received = self._wait(index)
        self.context.event(f"wait result grads {index}")
        return self._by_sequence(received).flatten(1, 2)

    @ranged("backward attention")
    def post_return(self, index: int, grad_SMC: torch.Tensor) -> None:
        """Send the gradients of a chunk's query, key and value heads back to the ranks that projected them."""
        self._post(index, grad_SMC)
        self._returns[index] = self._received[index]
        self.returns_in_flight = True
        self.context.event(f"post return {index}")

    @ranged("backward attention")
    def finish_input_grad(
        self, wanted: bool, early: Callable[[dict[int, torch.Tensor]], None]
    ) -> tuple[torch.Tensor | None, dict[int, torch.Tensor]]:
        """Wait for the returns, last chunk first, and sum what they give for the input.

        Args:
            wanted: whether the input needs a gradient.
            early: called with the packed gradients of all chunks but the first, before that is waited for.

        Returns:
            The input's gradient [M, H] and the packed gradients of each chunk.
        """
        weights = self.projections().weights
        grad: torch.Tensor | None = None
        packed: dict[int, torch.Tensor] = {}
        for index in reversed(range(self.num_chunks)):
            if index == 0 and packed:
                early(packed)
            returned = self._returns[index]
            if returned is None:
                continue
            self._wait(index)
            self.context.event(f"wait return {index}")
            packed[index] = self.fused[index].pack_gradient(returned)
            if wanted:
                flat = self.fused[index].flat(weights)
                grad = packed[index] @ flat if grad is None else grad.addmm_(packed[index], flat)
        self._returns, self._received, self._handles = [], [], []
        self.returns_in_flight = False
        return grad, packed

    def output_work(self, grad_MH: torch.Tensor, full: torch.Tensor) -> WgradWork:
        """The weight gradient of o_proj, and of its bias."""

        def weight() -> torch.Tensor:
            gradient = grad_MH.t() @ full
            if self.num_chunks == 1:
                return gradient
            by_chunk = gradient.unflatten(1, (self.num_chunks, self.context.layout.sp_size, -1))
            return by_chunk.transpose(1, 2).flatten(1)

        compute = {"o": weight, "o.bias": lambda: grad_MH.sum(0)}
        held = (grad_MH.numel() + full.numel()) * full.element_size()
        return WgradWork(compute, held, lambda: self.returns_in_flight)

    def unpack(self, packed: Mapping[int, torch.Tensor], x_MH: torch.Tensor, into: Mapping[str, torch.Tensor]) -> None:
        """Compute the weight (and bias) gradients of some chunks into those of q, k, v."""
        weights = {name: grad for name, grad in into.items() if "." not in name}
        biases = {name.partition(".")[0]: grad[:, None] for name, grad in into.items() if "." in name}
        for index, gradient in packed.items():
            if weights:
                self.fused[index].unpack(gradient.t() @ x_MH, weights)
            if biases:
                self.fused[index].unpack(gradient.sum(0)[:, None], biases)

    # -- shared ---------------------------------------------------------------------------------------------------
    def _post_products(
        self, x_MK: torch.Tensor, right_SKC: torch.Tensor, bias_S1C: torch.Tensor | None, received_SMC: torch.Tensor
    ) -> list[ExchangeHandle]:
        """Compute and send one product to each peer; with a product for all at once, own rows are copied."""
        exchange = self.context.exchange
        if self.by_peer:
            handles = []
            for peer in self.peers:
                product = _product(x_MK, right_SKC[peer], None if bias_S1C is None else bias_S1C[peer])
                handles.append(exchange.post([(peer, product)], [(peer, received_SMC[peer])]))
            return handles
        x_SMK = x_MK.expand(right_SKC.shape[0], *x_MK.shape)
        products = torch.bmm(x_SMK, right_SKC) if bias_S1C is None else torch.baddbmm(bias_S1C, x_SMK, right_SKC)
        return [self._post_to_peers(products, received_SMC)]

    def _post(self, index: int, sent_SMC: torch.Tensor) -> None:
        received = torch.empty_like(sent_SMC)
        self._handles[index] = [self._post_to_peers(sent_SMC, received)]
        self._received[index] = received

    def _post_to_peers(self, sent_SMC: torch.Tensor, received_SMC: torch.Tensor) -> ExchangeHandle:
        sends = [(peer, sent_SMC[peer]) for peer in self.peers]
        handle = self.context.exchange.post(sends, [(peer, received_SMC[peer]) for peer in self.peers])
        own = self.context.exchange.rank
        received_SMC[own].copy_(sent_SMC[own])
        return handle

    def _wait(self, index: int) -> torch.Tensor:
        for handle in self._handles[index]:
            handle.wait()
        self._handles[index] = []
        return self._received[index]

    def _new(self, like_MK: torch.Tensor, columns: int) -> torch.Tensor:
        return like_MK.new_empty(self.context.layout.sp_size, like_MK.shape[0], columns)

    def _by_sequence(self, received_SMC: torch.Tensor) -> torch.Tensor:
        """[S, M, heads * D] to [B, S, L, heads, D], without a copy."""
        ranks = received_SMC.shape[0]
        return received_SMC.view(ranks, self.batch, self.length, -1, self.context.head_dim).transpose(0, 1)

    def _output_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """o_proj with its columns in the order in which chunks arrive: [H, N * D]."""
        if self.num_chunks == 1:
            return weight
        return weight.unflatten(1, (self.context.layout.sp_size, self.num_chunks, -1)).transpose(1, 2).flatten(1)


def _product(
    x: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    return torch.mm(x, right, out=out) if bias is None else torch.addmm(bias, x, right, out=out)


def _mm_float(a: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`a @ weight.T` as float32, accumulated in float32."""
    if a.dtype == torch.float32:
        return a @ weight.t()
    if a.device.type == "cuda":
        return torch.mm(a, weight.t(), out_dtype=torch.float32)
    return a.float() @ weight.float().t()
