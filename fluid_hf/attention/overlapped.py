"""Sequence-parallel attention as autograd nodes. Their order of creation is the schedule of the backward pass.

The heads are cut into chunks; chunk c of every rank's heads travels together. The autograd engine runs ready nodes in
the reverse order of their creation:

| created           | forward                                       | backward                                        |
|-------------------|-----------------------------------------------|-------------------------------------------------|
| q, k, v token     | nothing                                       | their weight gradients                          |
| Scatter           | projects, posts chunk after chunk             | waits per chunk, computes the input gradient    |
| o token           | nothing                                       | its weight gradient, while the returns travel   |
| per chunk: Arrive | waits, norms, rotary embedding                | their gradients, posts the return               |
| ... the core      | the model's own attention function            | its backward                                    |
| ... PostResults   | posts the results to the tokens' owners       | waits for the result gradients                  |
| Gather            | waits per chunk, multiplies with o_proj       | posts the result gradients, last chunk first    |

So while one chunk is in the core, the next one's heads, and the results of the one before, are on the wire. Norms and
rotary embedding run after arrival: what leaves a projection is sent as it is, and a rank still treats as many
(token, head) pairs. Tensors between the nodes that are not the core's are empty: they only carry the order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from fluid_hf.attention.attention_call import AttentionCall, AttentionContext
from fluid_hf.attention.fused_projection import Projections
from fluid_hf.attention.head_layouts import HeadNorms, heads_from_wire, heads_to_wire
from fluid_hf.attention.rotary import RotaryTables
from fluid_hf.attention.ulysses import CoreAttention
from fluid_hf.comm.gradients import refuse_second_derivatives, refuse_transforms
from fluid_hf.overlap.wgrad import WgradWork, wgrad_tokens

__all__ = ["overlapped_attention"]

QKV = ("q", "k", "v", "q.bias", "k.bias", "v.bias")
OUTPUT = ("o", "o.bias")


class _Token:
    """One token for some of the projections' parameters, and what its backward is to compute.

    Args:
        parameters: the projections.
        names: of those that the token may be for; it is for the trainable ones.
        context: the layer's context.
    """

    def __init__(self, parameters: Projections, names: tuple[str, ...], context: AttentionContext) -> None:
        self.names: list[str] = []
        self.inputs: tuple[torch.Tensor, ...] = ()
        self.work: WgradWork | None = None
        self._context = context
        if not torch.is_grad_enabled():
            return
        weights = {}
        for name in names:
            weight = parameters.biases[name[0]] if "." in name else parameters.weights[name]
            if weight is not None and weight.requires_grad:
                weights[name] = weight
        self.names, self._dtypes = list(weights), [weight.dtype for weight in weights.values()]
        if weights:
            self.inputs = (wgrad_tokens(list(weights.values()), self._take),)

    def leave(self, work: WgradWork) -> None:
        """Leave the gradients to the token's node, or compute them now, as the scheduler says."""
        self.work = work
        self._context.scheduler.add(work)

    def _take(self) -> list[torch.Tensor]:
        work, self.work = self.work, None
        assert work is not None, "backward of the layer runs before its weight gradients"
        found = []
        for name, dtype in zip(self.names, self._dtypes, strict=True):
            found.append(self._context.scheduler.take(work, name).to(dtype))
            self._context.event(f"wgrad {name}")
        return found


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, call: AttentionCall, token: _Token, *tokens: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.call, ctx.token, ctx.num_tokens = call, token, len(tokens)
        ctx.save_for_backward(hidden)
        call.scatter(_rows(hidden, call))
        return tuple(hidden.new_empty(0) for _ in range(call.num_chunks))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        call: AttentionCall = ctx.call
        token: _Token = ctx.token
        grad, packed = call.finish_input_grad(ctx.needs_input_grad[0])
        if token.names:
            token.leave(call.input_work(packed, _rows(hidden, call), token.names))
        if grad is not None:
            grad = grad.view_as(hidden).to(hidden.dtype)
        return grad, None, None, *([hidden.new_empty(0)] * ctx.num_tokens)


class _Arrive(torch.autograd.Function):
    """What arrived, as the core takes it: queries, and keys and values if the chunk has any."""

    @staticmethod
    def forward(
        ctx: Any,
        link: torch.Tensor,
        call: AttentionCall,
        index: int,
        tables: RotaryTables,
        norms: HeadNorms | None,
        *norm_weights: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.tables, ctx.norms, ctx.call, ctx.index = tables, norms, call, index
        received = call.arrive(index)
        if norms is not None:
            ctx.save_for_backward(received)
        return heads_from_wire(received, call.batch, call.plan.chunks[index], tables, norms)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call: AttentionCall = ctx.call
        norms: HeadNorms | None = ctx.norms
        norm_grads: tuple[torch.Tensor, ...] = ()
        if any(ctx.needs_input_grad):
            chunk, buffer = call.plan.chunks[ctx.index], call.new_return(ctx.index)
            raw = ctx.saved_tensors[0] if norms is not None else None
            found = heads_to_wire(grads, call.batch, chunk, ctx.tables, norms, raw, buffer)
            if ctx.needs_input_grad[0]:
                call.post_return(ctx.index, buffer)
            if norms is not None and found is not None:
                norm_grads = (found[0].to(norms.q.dtype), found[1].to(norms.k.dtype))
        return grads[0].new_empty(0), None, None, None, None, *norm_grads


class _PostResults(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, context: torch.Tensor, call: AttentionCall, index: int) -> torch.Tensor:
        ctx.call, ctx.index, ctx.dtype = call, index, context.dtype
        call.post_context(index, context.to(call.dtype))
        return context.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.call.arrive_grad(ctx.index).to(ctx.dtype), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: AttentionCall, token: _Token, num_links: int, *links_and_tokens: torch.Tensor
    ) -> torch.Tensor:
        output, full = call.gather()
        ctx.call, ctx.token, ctx.num_links, ctx.num_inputs = call, token, num_links, len(links_and_tokens)
        ctx.save_for_backward(full)
        return output.view(call.batch, call.length, -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call: AttentionCall = ctx.call
        refuse_second_derivatives(call.context.name)
        token: _Token = ctx.token
        (full,) = ctx.saved_tensors
        grad = grads[0].flatten(0, 1).to(call.dtype).contiguous()
        if any(ctx.needs_input_grad[3 : 3 + ctx.num_links]):
            call.post_result_grads(grad)
        if token.names:
            token.leave(call.output_work(grad, full, token.names))
        return None, None, None, *([grad.new_empty(0)] * ctx.num_inputs)


def overlapped_attention(
    hidden_BLH: torch.Tensor,
    context: AttentionContext,
    read: Callable[[], Projections],
    chunks: int,
    rotary: RotaryTables,
    core: CoreAttention,
    norms: HeadNorms | None = None,
) -> torch.Tensor:
    """Attention with projections over whole sequences for this rank's tokens. Collective over the group.

    Args:
        hidden_BLH: this rank's piece of the sequences.
        context: settings of the layer.
        read: returns the projections' parameters as they are now. Called in forward and again in backward.
        chunks: pieces the heads are cut into at most, equal on all ranks.
        rotary: tables of the rotary embedding of all tokens.
        core: attention of [B, n, T, D] queries, keys, values; returns [B, T, n, D].
        norms: of queries and of keys along D.

    Returns:
        [B, L, H] in the type the projections compute in (autocast's where it is on, else the weights').
    """
    refuse_transforms(context.name)
    device = hidden_BLH.device.type
    parameters = read()
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else parameters.weights["q"].dtype
    plain = torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext()
    call = AttentionCall(context, read, hidden_BLH.shape, chunks, dtype)
    rotary = rotary.to(dtype)
    norm_weights = () if norms is None else (norms.q, norms.k)
    with plain:
        qkv = _Token(parameters, QKV, context)
        links = _Scatter.apply(hidden_BLH, call, qkv, *qkv.inputs)  # type: ignore[no-untyped-call]
        output_token = _Token(parameters, OUTPUT, context)
    keys: tuple[torch.Tensor, ...] = ()
    results = []
    for index, link in enumerate(links):
        with plain:
            arrived = _Arrive.apply(link, call, index, rotary, norms, *norm_weights)  # type: ignore[no-untyped-call]
        keys = arrived[1:] or keys
        output = core(arrived[0], *keys)
        with plain:
            results.append(_PostResults.apply(output, call, index))  # type: ignore[no-untyped-call]
    with plain:
        return _Gather.apply(  # type: ignore[no-any-return, no-untyped-call]
            call, output_token, len(results), *results, *output_token.inputs
        )


def _rows(hidden: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    return hidden.reshape(-1, call.hidden).to(call.dtype)
