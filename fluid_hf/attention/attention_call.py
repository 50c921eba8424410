"""One forward (and backward) of one sequence-parallel attention layer: the work behind its autograd nodes.

Legend: B sequences, L tokens of each here, M = B * L, T = S * L, S ranks, K chunks, H hidden, N heads, D head size; a
chunk has C columns per rank (its query, key and value heads) and E columns of results (its query heads).

    forward    scatter: C per rank -> wire          core, chunk by chunk, results -> wire     gather: o_proj
    backward   gather: gradients of results -> wire core, chunk by chunk, gradients -> wire   scatter: input gradient

The methods run in the order of `fluid_hf.attention.overlapped`, which holds the schedule. What two ranks exchange is
the other one's part only; more of them exchange all parts in one all-to-all, the own one among them. With one chunk of
many bytes two ranks send each message in two pieces, halves of the tokens: the second one is computed while the first
travels, and what the first gives while the second does. Only gradients of results, whose product is short, go whole.

Order on a GPU. Everything is queued on one stream but the messages: a message starts behind what is queued when it is
posted, and what reads its received buffer is queued behind `_wait`. A handle keeps both buffers of a message until that
wait is queued, so their memory goes to work behind it only; of a message in pieces each handle keeps its own, and each
piece is read behind the wait for it. What is not in a message (the ordered weights, the own
parts) is written and read on the one stream, and may be freed as soon as its last reader is queued.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fluid_hf.attention.attention_context import AttentionContext
from fluid_hf.attention.fused_projection import Projections
from fluid_hf.attention.head_gradients import HeadGradients, PackedGradients, PartedGradients
from fluid_hf.attention.head_layouts import NormSums
from fluid_hf.attention.planner import travels_in_pieces
from fluid_hf.attention.products import add_product, batched_product, beside, mm_float, product
from fluid_hf.comm.gradients import check_versions
from fluid_hf.comm.peer_exchange import ExchangeHandle
from fluid_hf.overlap.wgrad import WgradWork
from fluid_hf.ranges import ranged

__all__ = ["AttentionCall"]


class AttentionCall:
    """State of one call; shared by its autograd nodes, never kept by the layer.

    Args:
        context: the layer's context.
        read: returns the projections as they are at the time of the call (ZeRO-3 gathers them again for backward).
        shape: B, L, H of the input.
        chunks: pieces the heads are cut into at most, equal on all ranks.
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
        self._during_forward: Projections | None = None  # never longer: ZeRO-3 frees the weights after it
        self.plan = context.plan(chunks)
        self.num_chunks = len(self.plan.chunks)
        self.size, self.own = context.layout.sp_size, context.exchange.rank
        self.peer = 1 - self.own if self.size == 2 else None  # whose part alone is exchanged
        tokens = self.batch * self.length
        sent = context.layout.bytes_sent(tokens, context.head_dim, dtype.itemsize)
        self.in_pieces = travels_in_pieces(sent, self.num_chunks, self.size, context.exchange.speed)
        self._even = [1] * self.size
        self._handles: list[list[ExchangeHandle]] = []
        self._received: list[torch.Tensor] = []
        self._own_results: list[torch.Tensor] = []
        self._returns: list[tuple[torch.Tensor, torch.Tensor] | None] = []  # by rank, and what arrived
        self.norm_sums: NormSums | None = None
        self.returns_wanted = False
        self.returns_in_flight = False
        self._versions: list[int] | None = None

    def projections(self, only_inputs: bool = False) -> Projections:
        """The weights in the type the call computes in; called inside autograd nodes, without gradients.

        With `only_inputs` what o_proj has may have changed: an optimizer may step on each gradient as it comes.
        """
        found = self._read()
        tensors = [found.weights[name] for name in ("q", "k", "v")]
        if not only_inputs:
            tensors += [tensor for tensor in (found.weights["o"], *found.biases.values()) if tensor is not None]
        before = None if self._versions is None else self._versions[: len(tensors)]
        versions = check_versions(before, tensors, self.context.name)
        self._versions = self._versions or versions
        return found.to(self.dtype)

    # -- forward --------------------------------------------------------------------------------------------------
    @ranged("forward attention")
    def scatter(self, x_MH: torch.Tensor) -> None:
        """Project for one chunk of all other ranks' heads after the other and post it; own heads last."""
        self.context.exchange.drain()
        projections = self._during_forward = self.projections()
        biases = {name: bias for name, bias in projections.biases.items() if bias is not None and name != "o"}
        plan, rows = self.plan, self.plan.travelling(projections.weights)
        rights = plan.by_rank(rows) if self.peer is None else plan.apart(rows)
        sums = plan.apart(plan.travelling(biases)) if biases else None
        self._at("forward heads")
        self._post_products(x_MH, rights, sums, plan.columns, range(self.num_chunks), "post heads", self.in_pieces)

    @ranged("forward attention")
    def arrive(self, index: int) -> torch.Tensor:
        """Wait for a chunk: query, key and value heads of this rank for all tokens, [S, M, C]."""
        received = self._wait(index)
        self.context.event(f"wait heads {index}")
        return received

    @ranged("forward attention")
    def post_context(self, index: int, context_BTnD: torch.Tensor) -> None:
        """Send the results of a chunk to the ranks that own the tokens."""
        if self.batch == 1:
            by_rank = context_BTnD.reshape(self.size, self.length, -1)
        else:
            by_rank = context_BTnD.reshape(self.batch, self.size, self.length, -1).transpose(0, 1)
            by_rank = by_rank.reshape(self.size, self.batch * self.length, -1)
        if self.peer is not None:
            parts = by_rank.unbind(0)
            self._own_results.append(parts[self.own])  # a view: the core's backward keeps its memory anyway
            by_rank = parts[self.peer]
        by_rank = by_rank.contiguous()  # of one token a rank the reshaping above is a view
        received = torch.empty_like(by_rank)
        self._at("forward results", index)
        self._received[index] = received
        self._post(index, by_rank, received)
        self.context.event(f"post results {index}")

    @ranged("forward attention")
    def gather(self) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Multiply the results with o_proj; of two ranks, the own heads' while the others' are on the wire.

        Returns:
            The output [M, H], and what backward needs: the results of all heads [M, N * D], or of two ranks those of
            this one's and of the other one's heads [M, N / 2 * D]. All in the order of o_proj's columns.
        """
        projections, self._during_forward = self._during_forward or self.projections(), None
        weight, bias = projections.weights["o"], projections.biases["o"]
        if self.peer is None:
            arrived = [self._arrived_results(index).transpose(0, 1) for index in range(self.num_chunks)]
            full = torch.cat(arrived, dim=2).flatten(1)
            return torch.nn.functional.linear(full, weight, bias), (full,)
        rights, own = weight.t().chunk(2), beside(self._own_results)
        self._own_results = []
        early = mm_float(own, rights[self.own])
        if bias is not None:
            early.add_(bias)
        if self.in_pieces:
            other = self._received[0]
            output = self._add_arriving(early, rights[self.peer])
            self.context.event("wait results 0")
            return output, (own, other)
        other = beside([self._arrived_results(index) for index in range(self.num_chunks)])
        return add_product(early, other, rights[self.peer], self._room(early)), (own, other)

    def _arrived_results(self, index: int) -> torch.Tensor:
        received = self._wait(index)
        self.context.event(f"wait results {index}")
        return received

    # -- backward -------------------------------------------------------------------------------------------------
    @ranged("backward attention")
    def post_result_grads(self, grad_MH: torch.Tensor) -> None:
        """Send each head's result gradient to the rank that computed the head, the last chunk first."""
        self.context.exchange.drain()
        weight = self.projections().weights["o"]
        rights = self.plan.results_by_rank(weight) if self.peer is None else self.plan.results_apart(weight)
        self._returns = [None] * self.num_chunks
        self._at("backward result gradients")
        order = range(self.num_chunks - 1, -1, -1)
        self._post_products(grad_MH, rights, None, self.plan.results, order, "post result grads")

    @ranged("backward attention")
    def arrive_grad(self, index: int) -> torch.Tensor:
        """Wait for the result gradients of a chunk: [B, T, n, D]."""
        received = self._wait(index)
        self.context.event(f"wait result grads {index}")
        if self.batch == 1:  # without a copy
            return received.view(1, self.size * self.length, -1, self.context.head_dim)
        shape = (self.size, self.batch, self.length, -1, self.context.head_dim)
        return received.view(shape).transpose(0, 1).flatten(1, 2)

    def new_return(self, index: int) -> torch.Tensor:
        """Room for the gradients of a chunk's heads by rank: [S, M, C]."""
        rows = self.batch * self.length
        return self._received[index].new_empty(self.size, rows, self.plan.columns[index], dtype=self.dtype)

    @ranged("backward attention")
    def post_return(self, index: int, grad_SMC: torch.Tensor) -> None:
        """Send the gradients of a chunk's query, key and value heads back to the ranks that projected them."""
        self._at("backward head gradients", index)
        sent = grad_SMC if self.peer is None else grad_SMC[self.peer]  # the own part stays: `_returns` keeps it
        received = torch.empty_like(sent)
        self._post(index, sent, received)
        self._received[index], self._returns[index] = received, (grad_SMC, received)
        self.returns_in_flight = True
        self.context.event(f"post return {index}")

    @ranged("backward attention")
    def finish_input_grad(self, wanted: bool, x_MH: torch.Tensor | None) -> tuple[torch.Tensor | None, HeadGradients]:
        """Wait for the returns, last chunk first, and sum what they give for the input.

        Args:
            wanted: whether the input needs a gradient.
            x_MH: the input, if the projections' weights need gradients and may have some of it now.

        Returns:
            The input's gradient [M, H], and what the weights get of the gradients of q, k and v.
        """
        weights = self.projections(only_inputs=True).weights
        returns, self._returns = self._returns, []
        if self.in_pieces and not self.context.layout.replicated and returns[0] is not None:
            found = self._finish_own_first(weights if wanted else None, x_MH, *returns[0])
        else:
            whole = torch.cat([weights[name] for name in ("q", "k", "v")]) if wanted else None
            packed = self._pack(returns)
            found = None if whole is None else packed @ whole, PackedGradients(self.plan, packed)
        self._received, self._handles = [], []
        self.returns_in_flight = False
        return found

    def _pack(self, returns: Sequence[tuple[torch.Tensor, torch.Tensor] | None]) -> torch.Tensor:
        like = next(returned[0] for returned in returns if returned is not None)
        packed = self.plan.new_packed(like, complete=None not in returns)
        for index in reversed(range(self.num_chunks)):
            returned = returns[index]
            if returned is None:
                continue
            self._wait(index)
            self.context.event(f"wait return {index}")
            if self.peer is None:
                self.plan.pack_gradient(index, returned[1], packed)
            else:  # the own part is where it was made; what was sent from there is no longer needed
                self.plan.pack_gradient(index, returned[0], packed, self.peer, returned[1])
        return packed

    def _finish_own_first(
        self,
        weights: Mapping[str, torch.Tensor] | None,
        x_MH: torch.Tensor | None,
        grads_SMC: torch.Tensor,
        received_MC: torch.Tensor,
    ) -> tuple[torch.Tensor | None, HeadGradients]:
        """Multiply the own part of the gradients while the other one travels, then that one, piece by piece.

        The own part is not in the message; what is in it is read, and its memory kept, by the link alone.
        """
        assert self.peer is not None
        own = grads_SMC[self.own]
        parts = PartedGradients(self.plan, (own, received_MC) if self.own == 0 else (received_MC, own))
        rights = () if weights is None else self.plan.travelling(weights).chunk(2)
        early = mm_float(own, rights[self.own]) if rights else None
        if x_MH is not None:
            parts.multiply(self.own, x_MH)
        grad = None if early is None else self._add_arriving(early, rights[self.peer])
        self._wait(0)  # for what nobody has waited for yet
        self.context.event("wait return 0")
        return grad, parts

    def output_work(self, grad_MH: torch.Tensor, results: Sequence[torch.Tensor], names: list[str]) -> WgradWork:
        """The weight gradients of o_proj: of its weight, of its bias; `results` are what `gather` gave."""

        def weight() -> torch.Tensor:
            left = grad_MH.t()
            if self.peer is None:
                return left @ results[0]
            gradient = grad_MH.new_empty(grad_MH.shape[1], 2 * results[0].shape[1])
            columns = gradient.chunk(2, dim=1)
            torch.mm(left, results[0], out=columns[self.own])
            torch.mm(left, results[1], out=columns[self.peer])
            return gradient

        compute = {"o": weight, "o.bias": lambda: grad_MH.sum(0)}
        held = grad_MH.nbytes + sum(part.nbytes for part in results)
        return WgradWork({name: compute[name] for name in names}, held, lambda: self.returns_in_flight)

    def input_work(self, gradients: HeadGradients, x_MH: torch.Tensor, names: list[str]) -> WgradWork:
        """The weight gradients of q_proj, k_proj and v_proj, and of their biases: views of one product each."""
        made: dict[bool, dict[str, torch.Tensor]] = {}

        def gradient(name: str) -> torch.Tensor:
            base, _, bias = name.partition(".")
            if bool(bias) not in made:
                made[bool(bias)] = gradients.biases() if bias else gradients.weights(x_MH)
            return made[bool(bias)].pop(base)

        compute = {name: (lambda name=name: gradient(name)) for name in names}  # type: ignore[misc]
        return WgradWork(compute, x_MH.nbytes + gradients.nbytes, lambda: self.returns_in_flight)

    # -- shared ---------------------------------------------------------------------------------------------------
    def _post_products(
        self,
        x_MK: torch.Tensor,
        rights: Sequence[torch.Tensor] | Sequence[Sequence[torch.Tensor]],
        sums: Sequence[Sequence[torch.Tensor]] | None,
        columns: Sequence[int],
        order: range,
        event: str,
        in_pieces: bool = False,
    ) -> None:
        """Compute and send what each chunk's destinations get, [M, C] each; of two ranks, the own part last.

        Args:
            rights: right-hand sides of each chunk: [S, K, C], or of two ranks [K, C] each.
            sums: what is added, [C] of each chunk's ranks.
            columns: C of each chunk.
            in_pieces: whether each message travels in two.
        """
        self._handles = [[] for _ in range(self.num_chunks)]
        peer, x_SMK = self.peer, x_MK if self.peer is not None else x_MK.expand(self.size, *x_MK.shape)
        self._received = [x_MK.new_empty(self.size, x_MK.shape[0], count) for count in columns]
        own: list[tuple[Any, ...]] = []
        for index in order:
            right, received = rights[index], self._received[index]
            added = None if sums is None else sums[index]
            if isinstance(right, torch.Tensor):
                self._handles[index] = [self._exchange(batched_product(x_SMK, right, added), received)]
            else:
                assert peer is not None
                arriving = received.unbind(0)
                for rows, room in self._pieces(in_pieces, x_MK, arriving[peer]):
                    self._handles[index].append(self._exchange(product(rows, right, added, peer), room))
                own.append((x_MK, right, added, self.own, arriving[self.own]))
            self.context.event(f"{event} {index}")
        for arguments in own:
            product(*arguments)

    def _at(self, step: str, index: int = 0) -> None:
        self.context.exchange.at(self.context.name, step, index)

    def _exchange(self, sent: torch.Tensor, received: torch.Tensor) -> ExchangeHandle:
        """Post an all-to-all: of [S, ...], or with one peer only."""
        splits = self._even
        if self.peer is not None:
            splits = [0, sent.shape[0]] if self.peer else [sent.shape[0], 0]
        return self.context.exchange.all_to_all(received, sent, splits, splits)

    def _pieces(self, wanted: bool, *rows_MC: torch.Tensor) -> Sequence[Sequence[torch.Tensor]]:
        """What goes with one message each, if wanted; contiguous rows of contiguous ones."""
        return list(zip(*[rows.chunk(2) for rows in rows_MC], strict=True)) if wanted else [rows_MC]

    def _post(self, index: int, sent: torch.Tensor, received: torch.Tensor) -> None:
        pieces = self._pieces(self.in_pieces, sent, received)
        self._handles[index] = [self._exchange(part, room) for part, room in pieces]

    def _wait(self, index: int) -> torch.Tensor:
        for handle in self._handles[index]:
            handle.wait()
        self._handles[index] = []
        return self._received[index]

    def _add_arriving(self, early_MK: torch.Tensor, right_CK: torch.Tensor) -> torch.Tensor:
        """Add what arrives of the only chunk, times `right_CK`, piece by piece."""
        output = self._room(early_MK)
        parts = self._pieces(self.in_pieces, self._received[0], early_MK, output)
        for handle, (part, early, room) in zip(self._handles[0], parts, strict=True):
            handle.wait()
            add_product(early, part, right_CK, room)
        self._handles[0] = []
        return output

    def _room(self, early: torch.Tensor) -> torch.Tensor:
        """For a sum with what `mm_float` gave."""
        return early if early.dtype == self.dtype else early.new_empty(early.shape, dtype=self.dtype)
