"""The expert-parallel layer as autograd nodes. Their order of creation is the schedule of the backward pass.

The autograd engine runs ready nodes in the reverse order of their creation, so this table is the whole schedule:

| created  | forward                                      | backward                                                   |
|----------|----------------------------------------------|------------------------------------------------------------|
| Dispatch | packs rows, posts dispatch                   | waits for the returning input gradients, sums them         |
| tokens   | nothing                                      | weight gradients, while the input gradients travel         |
| Experts  | waits per wave, computes, posts combine      | waits for output gradients per wave, dgrad, posts returns  |
| (shared) | a shared expert, while combine is in flight  | while output gradients are in flight                       |
| Combine  | waits for combine, sums rows per token       | posts the output gradients                                 |

Tensors between the nodes are empty: they only carry the order. The rows travel through the `LayerCall`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

from fluid_hf.comm.faults import MALFORMED
from fluid_hf.comm.gradients import refuse_second_derivatives, refuse_transforms
from fluid_hf.errors import FluidError
from fluid_hf.moe.expert_math import ExpertGradients
from fluid_hf.moe.layer_call import LayerCall
from fluid_hf.moe.layer_context import LayerContext
from fluid_hf.moe.saved_pieces import pack_pieces, unpack_pieces
from fluid_hf.nodes import apart, apply_inner
from fluid_hf.overlap.wgrad import WgradWork, wgrad_token
from fluid_hf.ranges import span

__all__ = ["expert_parallel", "tell_malformed"]

Tensors = tuple[torch.Tensor | None, ...]
_AS_IT_IS = contextlib.nullcontext()


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weights: torch.Tensor, index: torch.Tensor, call: LayerCall
    ) -> torch.Tensor:
        ctx.call = call
        _, token_row = call.dispatch(hidden.detach(), weights.detach(), index)
        ctx.save_for_backward(index, token_row)
        return hidden.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Tensors:
        return *ctx.call.finish_input_grad(*ctx.saved_tensors), None, None


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        dispatched: torch.Tensor,
        call: LayerCall,
        works: list[WgradWork],
        names: list[str],
        *tokens: torch.Tensor,
    ) -> torch.Tensor:
        pieces, projections = call.run_experts()
        ctx.call, ctx.works, ctx.names, ctx.num_tokens = call, works, names, len(tokens)
        ctx.num_projections = len(projections[0]) if projections else 0
        ctx.save_for_backward(*pack_pieces(pieces, projections))
        return dispatched.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Tensors:
        call: LayerCall = ctx.call
        scheduler = call.context.scheduler
        pieces, projections = unpack_pieces(ctx.saved_tensors, ctx.num_projections)
        piece_grads = call.backward_experts(pieces, projections, defer=scheduler.defers)
        if ctx.names:
            work = _wgrad_work(call, ctx.names, piece_grads)
            ctx.works.append(work)
            scheduler.add(work)
        call.post_last_return()
        empty = grads[0].new_empty(0)
        return empty, None, None, None, *([empty] * ctx.num_tokens)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, computed: torch.Tensor, call: LayerCall) -> torch.Tensor:
        ctx.call = call
        ctx.save_for_backward(*call.places)
        return call.combine()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Tensors:
        refuse_second_derivatives(ctx.call.context.name)
        ctx.call.post_output_grad(grads[0], *ctx.saved_tensors)
        return grads[0].new_empty(0), None


def expert_parallel(
    hidden_TH: torch.Tensor,
    top_k_index_TK: torch.Tensor,
    top_k_weights_TK: torch.Tensor,
    read_parameters: Callable[[], dict[str, torch.Tensor]],
    context: LayerContext,
    between: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of each token's experts, wherever in the group they live. The functional form of the layer.

    Every rank of the group calls it the same number of times in the same order; token counts may differ and be zero.

    Args:
        hidden_TH: tokens of this rank [T, H], floating point.
        top_k_index_TK: global ids of the chosen experts [T, K], int64, distinct within a token.
        top_k_weights_TK: routing weights [T, K], floating point.
        read_parameters: returns the weights of the experts held here: `gate_up` [E, 2I, H] or `gate` and `up`
            [E, I, H] each, and `down` [E, H, I] last; or those of `context.math`. Called in forward and in backward.
        context: settings and state of the layer.
        between: computed after the experts and before the result is waited for (a shared expert).

    Returns:
        [T, H] in the type of `hidden_TH`; with `between`, also its result.

    Raises:
        RankMismatchError, RoutingError, PeerError: see `fluid_hf.errors`; the first two on all ranks of the group.
        GradientError: inside `torch.func` transforms, or in backward with `create_graph` or changed weights.
    """
    refuse_transforms(context.name)
    parameters = read_parameters()
    dtype = _compute_dtype(hidden_TH, parameters["down"])
    call = LayerCall(context, read_parameters, parameters, hidden_TH, top_k_weights_TK, dtype)
    if context.windows is not None:
        context.windows.withdraw()
    if not torch.is_grad_enabled():
        return _infer(call, hidden_TH, top_k_index_TK, top_k_weights_TK, between)
    with apart(), _without_autocast(hidden_TH.device.type):
        dispatched = _Dispatch.apply(hidden_TH, top_k_weights_TK, top_k_index_TK, call)  # type: ignore[no-untyped-call]
        _offer_window(call, parameters, 1)
        works: list[WgradWork] = []
        names, tokens = _wgrad_tokens(parameters, works, context)
        computed = apply_inner(_Experts, dispatched, call, works, names, *tokens)
        _offer_window(call, parameters, 0)
    shared = _compute_between(between, context.name)
    with apart(), _without_autocast(hidden_TH.device.type):
        output: torch.Tensor = apply_inner(_Combine, computed, call)
    return output if shared is None else (output, shared)


def tell_malformed(
    no_hidden: torch.Tensor,
    top_k: int,
    read_parameters: Callable[[], dict[str, torch.Tensor]],
    context: LayerContext,
) -> None:
    """Take part in a call that this rank's arguments do not allow: without a token, and telling the others why.

    They raise `RankMismatchError`. What this rank finds out about them meanwhile is not raised: its own error is the
    cause, or one of them.

    Args:
        no_hidden: [0, H] in the type and on the device of the weights.
        top_k: K of another call, or 1.
        read_parameters, context: as for `expert_parallel`.
    """
    no_weights = no_hidden.new_empty(0, top_k)
    no_index = torch.empty_like(no_weights, dtype=torch.int64)
    with torch.no_grad(), _without_autocast(no_hidden.device.type), contextlib.suppress(FluidError):
        call = LayerCall(context, read_parameters, read_parameters(), no_hidden, no_weights, no_hidden.dtype)
        call.dispatch(no_hidden, no_weights, no_index, MALFORMED)


def _infer(
    call: LayerCall,
    hidden_TH: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    between: Callable[[], torch.Tensor] | None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The forward pass alone, without the cost of autograd nodes."""
    with _without_autocast(hidden_TH.device.type):
        call.dispatch(hidden_TH, weights_TK, index_TK)
        call.run_experts()
    shared = _compute_between(between, call.context.name)
    with _without_autocast(hidden_TH.device.type):
        output = call.combine()
    return output if shared is None else (output, shared)


def _compute_between(between: Callable[[], torch.Tensor] | None, layer: str) -> torch.Tensor | None:
    if between is None:
        return None
    with span(f"{layer}::shared expert"):
        return between()


def _without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """No context where there is nothing to switch off: entering one costs the host as much as a launch."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _AS_IT_IS


def _wgrad_tokens(
    parameters: dict[str, torch.Tensor], works: list[WgradWork], context: LayerContext
) -> tuple[list[str], list[torch.Tensor]]:
    """One token per trainable weight; the last one created (`down`) is the first to run in backward."""
    names = [name for name, weight in parameters.items() if weight.requires_grad]

    def take(name: str) -> torch.Tensor:
        gradient = context.scheduler.take(works[-1], name)
        context.event(f"wgrad {name}")
        if not works[-1].compute and not works[-1].ready:
            works.pop()
        return gradient

    tokens = [wgrad_token(parameters[name], lambda name=name: take(name)) for name in names]  # type: ignore[misc]
    return names, tokens


def _offer_window(call: LayerCall, parameters: dict[str, torch.Tensor], window: int) -> None:
    """Create the tokens of the layers after this one whose weight gradients are to run in a window of this one."""
    context = call.context
    if context.windows is None or call.route is None:
        return
    per_token = call.format.top_k * sum(p.numel() for p in parameters.values()) / context.num_local_experts
    own = 0.0 if call.route.serial else per_token / context.exchange.size
    context.windows.arrange(own, per_token)
    in_flight = lambda: call.returns_in_flight or call.output_grads_in_flight  # noqa: E731
    context.windows.offer(window, context.name, in_flight, context.event)


def _wgrad_work(call: LayerCall, names: list[str], grads: ExpertGradients) -> WgradWork:
    def compute(name: str) -> torch.Tensor:
        with span(f"{call.context.name}::wgrad {name}"), call.context.exchange.beside():
            return grads.weight_gradient(name)

    work = {name: functools.partial(compute, name) for name in names}
    return WgradWork(work, grads.held_bytes, lambda: call.returns_in_flight)


def _compute_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """Autocast's type where it is on, else the weights' type (as transformers' grouped experts)."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
