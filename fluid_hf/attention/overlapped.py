"""Sequence-parallel attention as autograd nodes. Their order of creation is the schedule of the backward pass.

The heads are cut into chunks; chunk c of every rank's heads travels together. The autograd engine runs ready nodes in
the reverse order of their creation:

| created           | forward                                       | backward                                        |
|-------------------|-----------------------------------------------|-------------------------------------------------|
| q, k, v tokens    | nothing                                       | their weight gradients                          |
| Scatter           | projects, posts chunk after chunk, own last   | waits per chunk, sums the input gradients       |
| o token           | nothing                                       | its weight gradient, while the returns travel   |
| per chunk: Arrive | waits, rotary embedding                       | rotary embedding back, posts the return         |
| ... the core      | the model's own attention function            | its backward                                    |
| ... PostResults   | posts the results to the tokens' owners       | waits for the result gradients                  |
| Gather            | waits per chunk, multiplies with o_proj       | posts the result gradients, last chunk first    |

So while one chunk is in the core, the next one's heads, and the results of the one before, are on the wire. Norms and
rotary embedding run after arrival: what leaves a projection is sent as it is, and a rank still treats as many
(token, head) pairs. Tensors between the nodes that are not the core's are empty: they only carry the order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fluid_hf.attention.attention_call import AttentionCall, AttentionContext
from fluid_hf.attention.fused_projection import Projections
from fluid_hf.attention.rotary import RotaryTables, rotate, rotate_back
from fluid_hf.attention.ulysses import CoreAttention
from fluid_hf.overlap.wgrad import WgradWork, wgrad_token

__all__ = ["HeadNorm", "overlapped_attention"]

HeadNorm = Callable[[torch.Tensor], torch.Tensor]
Works = dict[str, list[WgradWork]]
QKV = ("q", "k", "v", "q.bias", "k.bias", "v.bias")
OUTPUT = ("o", "o.bias")


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, call: AttentionCall, works: Works, names: list[str], *tokens: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.call, ctx.works, ctx.names, ctx.num_tokens = call, works, names, len(tokens)
        ctx.save_for_backward(hidden)
        call.scatter(hidden.flatten(0, 1).to(call.dtype))
        return tuple(hidden.new_empty(0) for _ in range(call.num_chunks))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        call: AttentionCall = ctx.call
        scheduler, x = call.context.scheduler, hidden.flatten(0, 1).to(call.dtype)
        new = torch.empty_like if call.complete else torch.zeros_like
        projections = call.projections()
        into = {name: new(_parameter(projections, name)) for name in ctx.names}
        done: set[int] = set()

        def early(packed: dict[int, torch.Tensor]) -> None:
            if into and scheduler.defers:
                work = WgradWork({"early": lambda: _computed(call, packed, x, into)}, 0, lambda: call.returns_in_flight)
                scheduler.add(work)
                scheduler.take(work, "early")
                call.context.event("wgrad early")
                done.update(packed)

        grad, packed = call.finish_input_grad(ctx.needs_input_grad[0], early)
        if into:
            left = {index: gradient for index, gradient in packed.items() if index not in done}
            work = _qkv_work(call, left, x, into)
            for name in into:
                ctx.works[name].append(work)
            scheduler.add(work)
        if grad is not None:
            grad = grad.view_as(hidden).to(hidden.dtype)
        return grad, None, None, None, *([hidden.new_empty(0)] * ctx.num_tokens)


class _Arrive(torch.autograd.Function):
    """Heads as they were projected, for layers that norm them: queries, and keys and values if the chunk has any."""

    @staticmethod
    def forward(ctx: Any, link: torch.Tensor, call: AttentionCall, index: int) -> tuple[torch.Tensor, ...]:
        ctx.call, ctx.index = call, index
        return _split(call, index, call.arrive(index))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if ctx.needs_input_grad[0]:
            buffer, view = _new_heads(ctx.call, ctx.index, grads[0])
            for part, grad in zip(_split(ctx.call, ctx.index, view), grads, strict=True):
                part.copy_(grad)
            ctx.call.post_return(ctx.index, buffer)
        return grads[0].new_empty(0), None, None


class _Rotate(torch.autograd.Function):
    """Rotary embedding from [B, S, L, n, D] to [B, n, T, D]."""

    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, tables: RotaryTables) -> torch.Tensor:
        ctx.tables, ctx.shape = tables, heads.shape
        return rotate(heads, tables).flatten(1, 2).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grads[0].new_empty(ctx.shape)
        rotate_back(grads[0].transpose(1, 2).unflatten(1, ctx.shape[1:3]), ctx.tables, grad)
        return grad, None


class _ArriveRotated(torch.autograd.Function):
    """`_Arrive` and `_Rotate` at once, for layers without norms on their heads."""

    @staticmethod
    def forward(
        ctx: Any, link: torch.Tensor, tables: RotaryTables, call: AttentionCall, index: int
    ) -> tuple[torch.Tensor, ...]:
        ctx.tables, ctx.call, ctx.index = tables, call, index
        heads, chunk = call.arrive(index), call.fused[index].chunk
        if not chunk.num_kv:
            return (rotate(heads, tables).flatten(1, 2).transpose(1, 2),)
        q_k, v = heads.split([chunk.num_q + chunk.num_kv, chunk.num_kv], dim=3)
        q, k = rotate(q_k, tables).flatten(1, 2).transpose(1, 2).split([chunk.num_q, chunk.num_kv], dim=1)
        return q, k, v.flatten(1, 2).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.needs_input_grad[0]:
            buffer, view = _new_heads(ctx.call, ctx.index, grads[0])
            ranks, chunk = view.shape[1:3], ctx.call.fused[ctx.index].chunk
            if chunk.num_kv:
                q_k, v = view.split([chunk.num_q + chunk.num_kv, chunk.num_kv], dim=3)
                grad = torch.cat(grads[:2], dim=1)
                v.copy_(grads[2].transpose(1, 2).unflatten(1, ranks))
            else:
                q_k, grad = view, grads[0]
            rotate_back(grad.transpose(1, 2).unflatten(1, ranks), ctx.tables, q_k)
            ctx.call.post_return(ctx.index, buffer)
        return grads[0].new_empty(0), None, None, None


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
        ctx: Any, call: AttentionCall, works: Works, names: list[str], num_links: int, *links_and_tokens: torch.Tensor
    ) -> torch.Tensor:
        output, full = call.gather()
        ctx.call, ctx.works, ctx.names, ctx.num_links = call, works, names, num_links
        ctx.num_inputs = len(links_and_tokens)
        ctx.save_for_backward(full)
        return output.unflatten(0, (call.batch, call.length))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call: AttentionCall = ctx.call
        (full,) = ctx.saved_tensors
        grad = grads[0].flatten(0, 1).to(call.dtype).contiguous()
        if any(ctx.needs_input_grad[4 : 4 + ctx.num_links]):
            call.post_result_grads(grad)
        if ctx.names:
            work = call.output_work(grad, full)
            work.compute = {name: work.compute[name] for name in ctx.names}
            for name in ctx.names:
                ctx.works[name].append(work)
            call.context.scheduler.add(work)
        return None, None, None, None, *([grad.new_empty(0)] * ctx.num_inputs)


def overlapped_attention(
    hidden_BLH: torch.Tensor,
    context: AttentionContext,
    read: Callable[[], Projections],
    chunks: int,
    rotary: RotaryTables,
    core: CoreAttention,
    norms: tuple[HeadNorm, HeadNorm] | None = None,
) -> torch.Tensor:
    """Attention with projections over whole sequences for this rank's tokens. Collective over the group.

    Args:
        hidden_BLH: this rank's piece of the sequences.
        context: settings of the layer.
        read: returns the projections' parameters as they are now. Called in forward and again in backward.
        chunks: pieces the heads are cut into at most, equal on all ranks.
        rotary: tables of the rotary embedding of all tokens.
        core: attention of [B, n, T, D] queries, keys, values; returns [B, T, n, D].
        norms: applied to queries and to keys along D.

    Returns:
        [B, L, H] in the type the projections compute in (autocast's where it is on, else the weights').
    """
    device = hidden_BLH.device.type
    parameters = read()
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else parameters.weights["q"].dtype
    call = AttentionCall(context, read, hidden_BLH.shape, chunks, dtype)
    works: Works = {}
    rotary = rotary.to(dtype)
    plain = torch.autocast(device, enabled=False)
    with plain:
        qkv = _tokens(parameters, QKV, works, context)
        links = _Scatter.apply(hidden_BLH, call, works, list(qkv), *qkv.values())  # type: ignore[no-untyped-call]
        output_tokens = _tokens(parameters, OUTPUT, works, context)
    keys: tuple[torch.Tensor, ...] = ()
    results = []
    for index, link in enumerate(links):
        with plain:
            q, *new = _arrived(link, call, index, rotary, norms)
        keys = tuple(new) or keys
        output = core(q, *keys)
        with plain:
            results.append(_PostResults.apply(output, call, index))  # type: ignore[no-untyped-call]
    with plain:
        return _Gather.apply(  # type: ignore[no-any-return, no-untyped-call]
            call, works, list(output_tokens), len(results), *results, *output_tokens.values()
        )


def _arrived(
    link: torch.Tensor,
    call: AttentionCall,
    index: int,
    rotary: RotaryTables,
    norms: tuple[HeadNorm, HeadNorm] | None,
) -> tuple[torch.Tensor, ...]:
    """Queries, and keys and values if the chunk has any, as the core takes them: [B, n, T, D]."""
    if norms is None:
        return _ArriveRotated.apply(link, rotary, call, index)  # type: ignore[no-any-return, no-untyped-call]
    q, *kv = _Arrive.apply(link, call, index)  # type: ignore[no-untyped-call]
    if not kv:
        return (_Rotate.apply(norms[0](q), rotary),)  # type: ignore[no-untyped-call]
    num_q = q.shape[3]
    q_k = _Rotate.apply(torch.cat([norms[0](q), norms[1](kv[0])], dim=3), rotary)  # type: ignore[no-untyped-call]
    return q_k[:, :num_q], q_k[:, num_q:], kv[1].flatten(1, 2).transpose(1, 2)


def _split(call: AttentionCall, index: int, heads: torch.Tensor) -> tuple[torch.Tensor, ...]:
    chunk = call.fused[index].chunk
    if not chunk.num_kv:
        return (heads,)
    return heads.split([chunk.num_q, chunk.num_kv, chunk.num_kv], dim=3)


def _new_heads(call: AttentionCall, index: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer [S, M, C] for the wire, and the same as [B, S, L, heads, D]."""
    fused, size = call.fused[index], call.context.layout.sp_size
    buffer = like.new_empty(size, call.batch * call.length, fused.columns, dtype=call.dtype)
    return buffer, buffer.view(size, call.batch, call.length, fused.heads, -1).transpose(0, 1)


def _parameter(projections: Projections, name: str) -> torch.Tensor:
    base, _, kind = name.partition(".")
    found = projections.biases[base] if kind else projections.weights[base]
    assert found is not None
    return found


def _tokens(
    parameters: Projections, names: tuple[str, ...], works: Works, context: AttentionContext
) -> dict[str, torch.Tensor]:
    """One token per trainable parameter; the last one created is the first to run in backward."""
    if not torch.is_grad_enabled():
        return {}
    found = {}
    for name in names:
        base, _, kind = name.partition(".")
        weight = parameters.biases[base] if kind else parameters.weights[base]
        if weight is None or not weight.requires_grad:
            continue
        works[name] = []

        def take(name: str = name, dtype: torch.dtype = weight.dtype) -> torch.Tensor:
            gradient = context.scheduler.take(works[name].pop(), name).to(dtype)
            context.event(f"wgrad {name}")
            return gradient

        found[name] = wgrad_token(weight, take)
    return found


def _computed(
    call: AttentionCall, packed: dict[int, torch.Tensor], x: torch.Tensor, into: dict[str, torch.Tensor]
) -> torch.Tensor:
    call.unpack(packed, x, into)
    return x.new_empty(0)


def _qkv_work(
    call: AttentionCall, left: dict[int, torch.Tensor], x: torch.Tensor, into: dict[str, torch.Tensor]
) -> WgradWork:
    """Weight gradients of q, k and v: all come from the same products, computed when the first is asked for."""

    def gradient(name: str) -> torch.Tensor:
        if left:
            call.unpack(left, x, into)
            left.clear()
        return into[name]

    held = x.numel() * x.element_size() + sum(g.numel() * g.element_size() for g in left.values())
    compute = {name: (lambda name=name: gradient(name)) for name in into}  # type: ignore[misc]
    return WgradWork(compute, held, lambda: call.returns_in_flight)
