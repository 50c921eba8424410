"""The rows of one call on their way out: counted, packed and, as far as promised, sent before the counts are known.

Legend: T tokens here, H hidden, K experts per token, P ranks, R rows sent, Q rows received.

    count    counts of rows and pairs -> peers                     (the host will wait for the peers' counts)
    pack     tokens -> rows; the promised ones -> wire             (`fluid_hf.comm.head_start`)
    read     counts of the peers -> plan, route, promise for the next call
    post     the other rows -> wire
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fluid_hf.comm.call_form import CallForm
from fluid_hf.comm.faults import GOOD
from fluid_hf.comm.head_start import EarlyRows
from fluid_hf.comm.peer_exchange import ExchangeHandle
from fluid_hf.comm.row_route import RowRoute, make_route, post_between_two, route_parts
from fluid_hf.errors import RankMismatchError, RoutingError
from fluid_hf.kernels import kernel_module
from fluid_hf.moe.layer_context import LayerContext
from fluid_hf.moe.permutation import PairPlan, make_pair_plan
from fluid_hf.moe.routing_plan import HitMap, SourcePlan, count_rows, local_expert_ids, place_rows
from fluid_hf.moe.rows import RowFormat
from fluid_hf.ranges import ranged

__all__ = ["Outgoing"]

Reading = Callable[[float], list[Any]]


class Outgoing:
    """Used once, within one call; the methods in the order in which they are called.

    Args:
        context: of the layer.
        form: layout of a row.
        hidden_TH, weights_TK, index_TK: tokens, routing weights and global expert ids.
    """

    def __init__(
        self,
        context: LayerContext,
        form: RowFormat,
        hidden_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        index_TK: torch.Tensor,
    ) -> None:
        self.context = context
        self._format = form
        self._hidden_TH, self._weights_TK, self._index_TK = hidden_TH, weights_TK, index_TK
        self._hits: HitMap
        self._own_rows: tuple[int, ...] = ()  # per destination, where the host knows them at once
        self._plan: SourcePlan | None = None
        self._packed: torch.Tensor | None = None
        self._early: EarlyRows | None = None
        self._handles: list[ExchangeHandle] = []
        self._received: torch.Tensor | None = None
        if context.overlap and context.exchange.size == 2:
            self._early = context.head_start.begin(context.waves, form.stride)

    @ranged("plan")
    def count(self, status: int, form: CallForm, offsets: torch.Tensor) -> Reading:
        """Count the rows and send every peer its counts, with what must be equal; what will read the peers'.

        `offsets` is where the kernels write `offsets_E` of the own pairs.
        """
        context, exchange = self.context, self.context.exchange
        serial = not context.overlap
        hits = count_rows(
            self._index_TK,
            context.num_local_experts,
            exchange.size,
            skip_rank=None if serial else exchange.rank,
            parts=route_parts(exchange.size, context.waves, serial),
            weights_TK=self._weights_TK,
            words=form.words,
            offsets=offsets,
        )
        self._hits = hits
        if not hits.from_kernels:
            self._own_rows = tuple(hits.counts_2PC[0, :, 0].tolist())  # on a GPU the host waits for it
        if status != GOOD:
            hits.counts_2PC[0, :, 0] = -status
        ones = [1] * exchange.size
        sent, received = hits.counts_2PC.unbind(0)
        handle = exchange.all_to_all(received, sent, ones, ones)
        return exchange.start_reading(hits.counts_2PC, handle)

    def pack(self) -> bool:
        """Pack the rows and post those that were promised; whether all this was queued without the host waiting."""
        early = self._early
        self._packed = self._pack_most() if self._hits.from_kernels else self._pack()
        if early is not None:
            exchange, form = self.context.exchange, self._format
            exchange.at(self.context.name, "forward dispatch")
            device = self._packed.device
            padding = self.context.head_start.padding(self.context.waves, form.stride)
            if padding != (0, 0):
                post_between_two(
                    exchange, 0, *(torch.empty(size, dtype=torch.uint8, device=device) for size in padding)
                )
            self._received = form.new_rows(max(early.capacity, early.received), device)
            ways = self._packed[: early.sent], self._received[: early.received]
            self._handles = [post_between_two(exchange, 0, *ways)]
            exchange.at(self.context.name, "forward counts")
        return self._hits.from_kernels

    def own_pairs(self) -> PairPlan | None:
        """Plan of the rank's own pairs, with places for T * K; sorted while the counts travel."""
        local, exchange = self.context.num_local_experts, self.context.exchange
        if self._hits.own_pairs is not None or not self.context.overlap:
            return self._hits.own_pairs
        return make_pair_plan(self._index_TK, local, self._index_TK.numel(), exchange.rank * local)

    @ranged("plan")
    def read(self, reading: Reading) -> tuple[SourcePlan, RowRoute, int]:
        """Wait for the peers' counts: the plan, the route, and the number of pairs that stay here.

        Raises:
            PeerError, RankMismatchError, RoutingError: as `PeerExchange.read_counts`.
        """
        context, exchange, early = self.context, self.context.exchange, self._early
        try:
            counts_2PC = exchange.read_counts(reading, context.name)
        except (RankMismatchError, RoutingError):
            context.head_start.forget()  # it is raised on every rank of the group
            raise
        rows, received = tuple(counts[0] for counts in counts_2PC[0]), counts_2PC[1]
        received[exchange.rank] = counts_2PC[0][exchange.rank]  # need not have travelled
        if early is not None:
            peer = 1 - exchange.rank
            context.head_start.promise(context.waves, self._format.stride, rows[peer], received[peer][0])
        serial = not context.overlap
        route = make_route(exchange, context.waves, serial, rows, received, early)
        own = rows[exchange.rank] if serial else 0
        context.stats.add_dispatch(self._index_TK.shape[0], route.num_sent - own)
        plan = self._plan if self._plan is not None else place_rows(self._hits, rows)
        return plan, route, 0 if serial else received[exchange.rank][1]

    def buffer(self, route: RowRoute) -> torch.Tensor:
        """Where the rows arrive: at least [Q, bytes]."""
        early, buffer, rows = self._early, self._received, route.num_received
        if buffer is None or early is None:
            self._received = self._format.new_rows(rows, self._hidden_TH.device)
        elif rows > buffer.shape[0]:  # many more than in the call before
            self._handles[0].wait()
            self._received = self._format.new_rows(rows, buffer.device)
            self._received[: early.received].copy_(buffer[: early.received])
        assert self._received is not None
        return self._received

    def post(self, route: RowRoute) -> list[ExchangeHandle]:
        """Post the messages that are not posted yet; all of them, in order."""
        assert self._packed is not None and self._received is not None
        sent = self._packed[: route.num_sent] if route.serial else self._packed
        for message in range(len(self._handles), route.num_messages):
            self._handles.append(route.post_dispatch(message, sent, self._received))
        return self._handles

    def _pack_most(self) -> torch.Tensor:
        """Into a buffer for the most rows there can be, or for those that were promised."""
        sort_kernels, wire_kernels = kernel_module("sort_kernels"), kernel_module("wire_kernels")
        index_TK, size = self._index_TK.contiguous(), self.context.exchange.size
        most = sort_kernels.most_rows(index_TK.shape[0], index_TK.shape[1], size)
        inputs = (self._hidden_TH, self._weights_TK.contiguous(), index_TK, self._hits.position_TP)
        places = max(most, self._early.sent if self._early is not None else 0)
        return wire_kernels.pack_rows(*inputs, most, places, self._format, self.context.num_local_experts)

    def _pack(self) -> torch.Tensor:
        form, plan = self._format, place_rows(self._hits, self._own_rows)
        self._plan = plan
        assert plan.row_token_R is not None and plan.row_rank_R is not None
        rows, promised = sum(plan.rows), self._early.sent if self._early is not None else 0
        packed = form.new_rows(max(rows, promised), self._hidden_TH.device)
        sent = packed[:rows]
        form.hidden_of(sent).copy_(self._hidden_TH.index_select(0, plan.row_token_R))
        ids = local_expert_ids(self._index_TK[plan.row_token_R], self.context.num_local_experts, plan.row_rank_R)
        form.ids_of(sent).copy_(ids)
        form.weights_of(sent).copy_(self._weights_TK.index_select(0, plan.row_token_R))
        return packed
