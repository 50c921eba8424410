"""One forward (and backward) of one expert-parallel layer: the work behind the four autograd nodes.

Legend: T tokens here, H hidden, K experts per token, P ranks, R rows sent, Q rows received, S pairs.

    forward    dispatch: rows R -> wire -> Q     experts: own tokens T and Q, wave by wave     combine: Q -> wire -> R
    backward   combine: dOut R -> wire -> Q      experts: dX of T and Q, wave by wave          dispatch: Q -> wire -> R

The methods run in the order of `fluid_hf.moe.expert_parallel`, which holds the schedule.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from fluid_hf.comm.call_form import call_form
from fluid_hf.comm.faults import GOOD, input_status, routing_error
from fluid_hf.comm.gradients import check_versions
from fluid_hf.comm.peer_exchange import ExchangeHandle
from fluid_hf.comm.row_route import RowRoute, route_waves
from fluid_hf.moe.expert_math import ExpertGradients, ExpertMath, GatedMath
from fluid_hf.moe.experts import Piece
from fluid_hf.moe.layer_context import LayerContext
from fluid_hf.moe.outgoing import Outgoing
from fluid_hf.moe.own_tokens import OwnTokens
from fluid_hf.moe.permutation import gather_weight_grads, make_pair_plan, reduce_rows, spread_rows
from fluid_hf.moe.rows import row_format
from fluid_hf.ranges import ranged, span

__all__ = ["LayerCall"]

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # hidden states, routing weights, expert ids
Places = tuple[torch.Tensor | None, torch.Tensor | None]  # `row_token_R` and `token_row_TP` of a `SourcePlan`


class LayerCall:
    """State of one call; shared by its autograd nodes, never kept by the layer.

    Args:
        context: the layer's context.
        read_parameters: returns the weights of the experts held here, as they are at the time of the call (ZeRO-3
            gathers them again for backward).
        parameters: what it returns in forward.
        hidden_TH, weights_TK: inputs, for their shapes and types only.
        dtype: type the experts compute in and rows travel in.
    """

    def __init__(
        self,
        context: LayerContext,
        read_parameters: Callable[[], dict[str, torch.Tensor]],
        parameters: dict[str, torch.Tensor],
        hidden_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        dtype: torch.dtype,
    ) -> None:
        self.context = context
        exchange = context.exchange
        self.math: ExpertMath = context.math or GatedMath(context.act, exchange.shares_processors, exchange.size > 1)
        self._read_parameters = read_parameters
        self._parameters: dict[str, torch.Tensor] | None = parameters
        self.format = row_format(hidden_TH.shape[1], weights_TK.shape[1], dtype)
        self.dtype = dtype
        self.out_dtype, self._weights_dtype = hidden_TH.dtype, weights_TK.dtype
        self.device = hidden_TH.device
        self.needs_input_grad = hidden_TH.requires_grad or weights_TK.requires_grad
        gradient = 1 + self.needs_input_grad if torch.is_grad_enabled() else 0
        self._form = call_form(dtype, self.format.top_k, self.format.hidden, context.waves, gradient)
        self.route: RowRoute | None = None
        self.places: Places = (None, None)
        self._inputs: Inputs | None = None
        self._offsets: tuple[torch.Tensor, ...] = ()  # `offsets_E` of the pieces
        self.num_own_pairs = 0
        self._handles: list[ExchangeHandle] = []
        self._rows: torch.Tensor | None = None
        self._own: torch.Tensor | None = None
        self._own_weights: torch.Tensor | None = None
        self._keep = torch.is_grad_enabled() and not context.recompute
        self._own_tokens = OwnTokens(self.math, self._keep)
        self._held_weights: Any = None
        self._versions: list[int] | None = None
        self.returns_in_flight = self.output_grads_in_flight = False

    # -- forward --------------------------------------------------------------------------------------------------
    @ranged("forward dispatch")
    def dispatch(
        self, hidden_TH: torch.Tensor, weights_TK: torch.Tensor, index_TK: torch.Tensor, status: int = GOOD
    ) -> Places:
        """Plan the rows, tell every peer how many come, and post all waves of the dispatch; the rows' `places`.

        With a `status` the peers are told that in place of it, and every rank raises.
        """
        if hidden_TH.dtype != self.dtype:
            hidden_TH = hidden_TH.to(self.dtype)
        hidden_TH, index_TK = _side_by_side(hidden_TH), _side_by_side(index_TK)
        self._inputs = hidden_TH, weights_TK, index_TK
        context, exchange = self.context, self.context.exchange
        if status == GOOD and index_TK.device.type == "cpu":
            status = input_status(weights_TK, index_TK, context.num_experts)
        if exchange.size == 1:
            if status != GOOD:
                raise routing_error({dist.get_rank() if dist.is_initialized() else 0: status}, context.name)
            context.late_status.check(context.name)
            self.num_own_pairs = index_TK.numel()
            return self.places
        exchange.drain()
        exchange.at(context.name, "forward counts")
        if status != GOOD:  # told to the peers in place of the counts, which they wait for
            index_TK = torch.zeros_like(index_TK)  # the call ends when the counts are read
        outgoing = Outgoing(context, self.format, hidden_TH, weights_TK, index_TK)
        # One tensor for the pieces of the call, own tokens first: backward reads them together.
        pieces = 1 + route_waves(exchange, context.waves, not context.overlap)
        offsets = torch.empty(pieces, context.num_local_experts, dtype=torch.int32, device=self.device)
        self._offsets = offsets.unbind(0)
        reading = outgoing.count(status, self._form, self._offsets[0])
        # Packed while the counts travel, and what was promised sent.
        queued = outgoing.pack()
        exchange.side_stream.mark(self.device)
        self._own_tokens.plan = outgoing.own_pairs()
        early = queued and context.overlap
        if early:
            with span(f"{context.name}::own tokens"):
                weights, share = self._forward_weights(), context.own_share or 1 / exchange.size
                with exchange.beside():
                    early = self._own_tokens.start_early(hidden_TH, weights_TK, weights, share)
        plan, self.route, self.num_own_pairs = outgoing.read(reading)
        if context.overlap:
            context.own_share = self.num_own_pairs / max(1, index_TK.numel())
        exchange.at(context.name, "forward dispatch")
        # When a buffer is allocated here, no memory that was used after the mark has been given back.
        self._rows = outgoing.buffer(self.route)
        # The rows go behind the mark, not behind the own tokens' projections: these come first unless they were queued.
        if queued and not early:
            self._start_own(hidden_TH, weights_TK, index_TK)
        with exchange.side_stream.posting():
            self._handles = outgoing.post(self.route)
        context.event("post dispatch")
        self.places = plan.row_token_R, plan.token_row_TP
        return self.places

    @ranged("own tokens")
    def _start_own(self, hidden_TH: torch.Tensor, weights_TK: torch.Tensor, index_TK: torch.Tensor) -> None:
        """Queue the projections of the own tokens, unless all rows travel alike."""
        if self.route is not None and self.route.serial:
            return
        local, pairs = self.context.num_local_experts, self.num_own_pairs
        flag = self.context.late_status.flag(self.device) if self.route is None else None
        make_plan = functools.partial(make_pair_plan, index_TK, local, pairs, flag=flag)
        weights = self._forward_weights()
        with self.context.exchange.beside():
            self._own_tokens.start(hidden_TH, weights_TK, weights, make_plan, pairs)

    @ranged("forward experts")
    def run_experts(self) -> tuple[list[Piece], list[tuple[torch.Tensor, ...]]]:
        """Compute own tokens and every wave as it arrives; post each wave's combine at once.

        Own tokens fill both ends: their projections run before the first wave is waited for, the rest after the last
        combine was posted. The projections that backward needs are returned too.
        """
        context, route, keep = self.context, self.route, self._keep
        assert self._inputs is not None
        inputs, self._inputs = self._inputs, None
        weights = self._forward_weights()
        if not self._own_tokens.ready:
            self._start_own(*inputs)
        self._held_weights = None
        pieces: list[Piece] = []
        projections: list[tuple[torch.Tensor, ...]] = []
        own = self._own_tokens.take()
        if own is not None:
            pieces.append(own[0])
            projections += [own[1].kept] if keep else []
        context.exchange.at(context.name, "forward combine")
        combine: list[ExchangeHandle] = []
        returned = self._new_hidden(route.num_sent) if route is not None else None
        whole = self.format.whole_of(self._rows) if self._rows is not None else None
        arriving = iter(self._handles)
        arrived = 0
        for wave, needed in enumerate(route.needed() if route is not None else []):
            assert route is not None and whole is not None and returned is not None
            for handle in itertools.islice(arriving, needed - arrived):
                handle.wait()
            arrived = needed
            context.event(f"wait dispatch {wave}")
            low, high = route.wave_bounds(wave)
            piece = self._wave_piece(whole, low, high, route.wave_pairs(wave), wave)
            out_QH = self._new_hidden(high - low)
            with context.exchange.beside():
                first = self.math.project(piece, weights, keep)
                self.math.finish(piece, first, weights, out_QH)
            combine.append(route.post_back(wave, out_QH, returned))
            context.event(f"post combine {wave}")
            pieces.append(piece)
            projections += [first.kept] if keep else []
        self._own = None
        if own is not None:
            self._own = self._new_hidden(inputs[0].shape[0])
            with context.exchange.beside():
                self.math.finish(*own, weights, self._own)
        context.stats.add_load([piece.plan.offsets_E for piece in pieces], self.format.top_k)
        self._handles, self._rows, self._offsets = combine, returned, ()
        return pieces, projections

    @ranged("forward combine")
    def combine(self) -> torch.Tensor:
        """Wait for the returning rows and sum them per token: [T, H] in the type of the input."""
        token_row_TP, self.places = self.places[1], (None, None)
        for wave, handle in enumerate(self._handles):
            handle.wait()
            self.context.event(f"wait combine {wave}")
        own, rows = self._own, self._rows
        self._handles, self._rows, self._own = [], None, None
        if rows is None or token_row_TP is None:
            assert own is not None
            return own if own.dtype == self.out_dtype else own.to(self.out_dtype)
        return reduce_rows(own, rows, token_row_TP, self.out_dtype)

    # -- backward -------------------------------------------------------------------------------------------------
    @ranged("backward combine")
    def post_output_grad(
        self, grad_TH: torch.Tensor, row_token_R: torch.Tensor | None, token_row_TP: torch.Tensor | None
    ) -> None:
        """Send each row's output gradient to the rank that computed it."""
        self._own = (grad_TH if grad_TH.dtype == self.dtype else grad_TH.to(self.dtype)).contiguous()
        if self.route is None or token_row_TP is None:
            return
        self.context.exchange.drain()
        self.context.exchange.at(self.context.name, "backward output gradients")
        sent = spread_rows(self._own, row_token_R, token_row_TP, self.route.num_sent)
        self._rows = self._new_hidden(self.route.num_received)
        waves = range(self.route.num_waves)
        self._handles = [self.route.post_out(wave, sent, self._rows) for wave in waves]
        self.context.event("post output grad")
        self.output_grads_in_flight = True

    @ranged("backward experts")
    def backward_experts(
        self, pieces: Sequence[Piece], projections: Sequence[tuple[torch.Tensor, ...]], defer: bool
    ) -> ExpertGradients:
        """Input gradients of own tokens, then of every wave as it arrives, each sent back as soon as it is ready.

        With `defer` all waves are sent at once; otherwise the last one is left for `post_last_return`, so that the
        caller computes the weight gradients first.
        """
        context, route, weights = self.context, self.route, self._weights()
        grads = self.math.gradients(pieces)
        own, self._own = self._own, None
        assert own is not None
        if route is None or not route.serial:
            self._own = torch.empty_like(own)
            self._own_weights = own.new_empty(own.shape[0], self.format.top_k, dtype=self.format.weight_dtype)
            with context.exchange.beside():
                first = self._projections(pieces[0], projections, 0, weights)
                grads.backward(first, own, weights, (self._own, self._own_weights))
            context.event("dgrad own")
        context.exchange.at(context.name, "backward input gradients")
        self._returns: list[Callable[[], ExchangeHandle]] = []
        arriving, self._handles, self.output_grads_in_flight = self._handles, [], False
        rows, self._rows = self._rows, None
        if route is not None:
            self._rows = self.format.new_gradient_rows(route.num_sent, self.device)
            buffers = self.format.new_gradient_rows(route.num_received, self.device)  # one for all waves
            whole = self.format.whole_gradients_of(buffers)
        for wave, handle in enumerate(arriving):
            assert route is not None and rows is not None
            handle.wait()
            context.event(f"wait output grad {wave}")
            low, high = route.wave_bounds(wave)
            buffer = buffers[low:high]
            out = self.format.gradients_of(whole, low, high)
            index = wave if route.serial else wave + 1
            with context.exchange.beside():
                first = self._projections(pieces[index], projections, index, weights)
                grads.backward(first, rows[low:high], weights, out)
            context.event(f"dgrad {wave}")
            if self.needs_input_grad and (defer or wave < len(arriving) - 1):
                self._post_return(wave, buffer)
            elif self.needs_input_grad:
                self._returns.append(lambda wave=wave, buffer=buffer: self._post_return(wave, buffer))  # type: ignore[misc]
        return grads

    @ranged("backward return")
    def post_last_return(self) -> None:
        """Send the wave that `backward_experts` left."""
        for post in self._returns:
            post()
        self._returns = []

    @ranged("backward dispatch")
    def finish_input_grad(
        self, index_TK: torch.Tensor, token_row_TP: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Wait for the returning gradients and sum them per token: gradients of hidden states and routing weights."""
        for wave, handle in enumerate(self._handles):
            handle.wait()
            self.context.event(f"wait return {wave}")
        own, own_weights, rows = self._own, self._own_weights, self._rows
        self._handles, self._rows, self._own, self._own_weights = [], None, None, None
        self.returns_in_flight = False
        if rows is None or token_row_TP is None:
            assert own is not None and own_weights is not None
            return own.to(self.out_dtype), own_weights.to(self._weights_dtype)
        grad_TH = reduce_rows(own, self.format.hidden_of(rows), token_row_TP, self.out_dtype)
        returned, local = self.format.weight_gradients_of(rows), self.context.num_local_experts
        rank, dtype = self.context.exchange.rank, self._weights_dtype
        return grad_TH, gather_weight_grads(own_weights, returned, token_row_TP, index_TK, local, rank, dtype)

    # -- shared ---------------------------------------------------------------------------------------------------
    def _post_return(self, wave: int, buffer: torch.Tensor) -> ExchangeHandle:
        assert self.route is not None and self._rows is not None
        handle = self.route.post_back(wave, buffer, self._rows)
        self._handles.append(handle)
        self.returns_in_flight = True
        self.context.event(f"post return {wave}")
        return handle

    def _forward_weights(self) -> Any:
        """Held from first use to last: no copy in another type is given back before `received` is allocated."""
        if self._held_weights is None:
            self._held_weights = self._weights()
        return self._held_weights

    def _weights(self) -> Any:
        parameters, self._parameters = self._parameters, None
        if parameters is None:
            parameters = self._read_parameters()
        self._versions = check_versions(self._versions, parameters.values(), self.context.name)
        return self.math.read(parameters, self.dtype)

    def _new_hidden(self, rows: int) -> torch.Tensor:
        return torch.empty(rows, self.format.hidden, dtype=self.dtype, device=self.device)

    def _wave_piece(self, whole: Inputs, low: int, high: int, num_pairs: int, wave: int) -> Piece:
        hidden_QH, weights_QK, ids_QK = self.format.columns_of(whole, low, high)
        plan = make_pair_plan(ids_QK, self.context.num_local_experts, num_pairs, offsets=self._offsets[1 + wave])
        return Piece(hidden_QH, weights_QK, plan)

    def _projections(
        self, piece: Piece, kept: Sequence[tuple[torch.Tensor, ...]], index: int, weights: Any
    ) -> tuple[torch.Tensor, ...]:
        return kept[index] if kept else self.math.project(piece, weights, True).kept


def _side_by_side(rows: torch.Tensor) -> torch.Tensor:
    """The same, the elements of a row side by side: kernels take any distance between rows, and none inside them."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()
