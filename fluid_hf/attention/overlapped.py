"""Sequence-parallel attention as autograd nodes. Their order of creation is the schedule of the backward pass.

The heads are cut into chunks; chunk c of every rank's heads travels together. The autograd engine runs ready nodes in
the reverse order of their creation:

| created           | forward                                       | backward                                        |
|-------------------|-----------------------------------------------|-------------------------------------------------|
| Scatter           | projects, posts chunk after chunk             | waits per chunk, computes the input gradient;   |
|                   |                                               | of two ranks with one chunk, own heads first;   |
|                   |                                               | then the weight gradients of q, k and v         |
| o token           | nothing                                       | its weight gradient, while the returns travel   |
| Arrive            | waits for chunk 0; norms, rotary embedding    | their gradients, posts the return of chunk 0    |
| ... the core      | the model's own attention function            | its backward                                    |
| ... Turn          | posts the results of a chunk; as Arrive, for  | as Arrive, for the next chunk; waits for the    |
|                   | the next one                                  | result gradients of its own                     |
| ... the core      | the model's own attention function            | its backward                                    |
| Gather            | posts the last results, waits per chunk,      | posts the result gradients, last chunk first;   |
|                   | multiplies with o_proj                        | waits for those of the last chunk               |

So while one chunk is in the core, the next one's heads, and the results of the one before, are on the wire. Norms and
rotary embedding run after arrival: what leaves a projection is sent as it is, and a rank still treats as many
(token, head) pairs. One node stands between two cores, and what orders nodes only is one empty tensor, without a
gradient: on short sequences the host's calls take longer than the device's work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fluid_hf.attention.attention_call import AttentionCall
from fluid_hf.attention.attention_context import AttentionContext
from fluid_hf.attention.fused_projection import Projections
from fluid_hf.attention.head_layouts import HeadNorms, NormSums, heads_from_wire, heads_to_wire
from fluid_hf.attention.products import in_type
from fluid_hf.attention.rotary import RotaryTables
from fluid_hf.attention.ulysses import CoreAttention
from fluid_hf.comm.gradients import refuse_second_derivatives, refuse_transforms
from fluid_hf.nodes import apart, apply_or_run
from fluid_hf.overlap.wgrad import WgradWork, wgrad_tokens

__all__ = ["overlapped_attention"]

QKV, OUTPUT = ("q", "k", "v"), ("o",)


class _Trained:
    """The trainable ones of some projections' parameters, and the work that gives their gradients.

    Args:
        parameters: the projections.
        names: of those whose weights and biases may be among them.
        context: the layer's context.
    """

    def __init__(self, parameters: Projections, names: tuple[str, ...], context: AttentionContext) -> None:
        self.names: list[str] = []
        self.tensors: list[torch.Tensor] = []
        self.work: WgradWork | None = None
        self._context = context
        if not torch.is_grad_enabled():
            return
        weights, biases = parameters.weights, parameters.biases
        found: list[tuple[str, torch.Tensor | None]] = [(name, weights[name]) for name in names]
        found += [(f"{name}.bias", biases[name]) for name in names]
        trained = [(name, tensor) for name, tensor in found if tensor is not None and tensor.requires_grad]
        self.names = [name for name, _ in trained]
        self.tensors = [tensor for _, tensor in trained]
        self._dtypes = [tensor.dtype for tensor in self.tensors]

    def leave(self, work: WgradWork) -> None:
        """Leave the gradients to the node that takes them, or compute them now, as the scheduler says."""
        self.work = work
        self._context.scheduler.add(work)

    def token(self) -> tuple[torch.Tensor, ...]:
        """A token whose node takes the gradients, if there are any to take."""
        return (wgrad_tokens(self.tensors, self.take),) if self.tensors else ()

    def take(self) -> list[torch.Tensor]:
        """The gradients, in order."""
        work, self.work = self.work, None
        assert work is not None, "backward of the layer runs before its weight gradients"
        found = []
        for name, dtype in zip(self.names, self._dtypes, strict=True):
            found.append(in_type(self._context.scheduler.take(work, name), dtype))
            self._context.event(f"wgrad {name}")
        return found


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, call: AttentionCall, trained: _Trained, *weights: torch.Tensor
    ) -> torch.Tensor:
        # `weights` get their gradients here, and are read from the layer.
        ctx.set_materialize_grads(False)  # the link's gradient is nothing but a sign that the rest is done
        ctx.call, ctx.trained = call, trained
        ctx.save_for_backward(hidden)
        call.scatter(_rows(hidden, call))
        return hidden.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        call: AttentionCall = ctx.call
        trained: _Trained = ctx.trained
        x = _rows(hidden, call) if trained.names else None
        now = call.context.scheduler.defers and any(["." not in name for name in trained.names])
        grad, gradients = call.finish_input_grad(ctx.needs_input_grad[0], x if now else None)
        if grad is not None:
            grad = in_type(grad.view(hidden.shape), hidden.dtype)
        if x is None:
            return grad, None, None
        trained.leave(call.input_work(gradients, x, trained.names))
        return grad, None, None, *trained.take()


@dataclass(slots=True)
class _Arrival:
    """A chunk on its way from the wire to the core, and its gradients back."""

    call: AttentionCall
    index: int
    tables: RotaryTables
    norms: HeadNorms | None

    def heads(self, ctx: Any) -> tuple[torch.Tensor, ...]:
        """Wait; queries, and keys and values if the chunk has any, as the core takes them."""
        received = self.call.arrive(self.index)
        if self.norms is not None:
            ctx.save_for_backward(received)
        chunk = self.call.plan.chunks[self.index]
        return heads_from_wire(received, self.call.batch, chunk, self.tables, self.norms)

    def send_back(self, ctx: Any, grads: tuple[torch.Tensor, ...]) -> None:
        """Post the gradients of the heads, if wanted; what they give for the norms' weights stays in the call."""
        call, norms = self.call, self.norms
        chunk, buffer = call.plan.chunks[self.index], call.new_return(self.index)
        raw = None
        if norms is not None:
            (raw,) = ctx.saved_tensors
            call.norm_sums = call.norm_sums or NormSums(call.context.layout, buffer, call.context.head_dim)
        heads_to_wire(grads, call.batch, chunk, self.tables, norms, raw, buffer, call.norm_sums)
        if call.returns_wanted:
            call.post_return(self.index, buffer)


class _Arrive(torch.autograd.Function):
    """The norms' weights are this node's alone: its backward is the last one of all chunks."""

    @staticmethod
    def forward(ctx: Any, link: torch.Tensor, arrival: _Arrival, *norm_weights: torch.Tensor) -> Any:
        ctx.arrival = arrival
        return arrival.heads(ctx)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        arrival: _Arrival = ctx.arrival
        arrival.send_back(ctx, grads)
        sums, arrival.call.norm_sums = arrival.call.norm_sums, None
        if arrival.norms is None or sums is None:
            return None, None
        return None, None, *sums.total(arrival.norms)


class _Turn(torch.autograd.Function):
    """Between the cores of two chunks: the results of one leave, the heads of the next one come in."""

    @staticmethod
    def forward(ctx: Any, context: torch.Tensor, arrival: _Arrival) -> Any:
        ctx.arrival, ctx.dtype = arrival, context.dtype
        arrival.call.post_context(arrival.index - 1, in_type(context, arrival.call.dtype))
        return arrival.heads(ctx)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        arrival: _Arrival = ctx.arrival
        arrival.send_back(ctx, grads)
        return in_type(arrival.call.arrive_grad(arrival.index - 1), ctx.dtype), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, context: torch.Tensor, call: AttentionCall, trained: _Trained, *tokens: torch.Tensor
    ) -> torch.Tensor:
        ctx.call, ctx.trained, ctx.dtype, ctx.num_tokens = call, trained, context.dtype, len(tokens)
        call.post_context(call.num_chunks - 1, in_type(context, call.dtype))
        output, results = call.gather()
        ctx.save_for_backward(*results)
        return output.view(call.batch, call.length, -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call: AttentionCall = ctx.call
        refuse_second_derivatives(call.context.name)
        trained: _Trained = ctx.trained
        grad = in_type(grads[0].flatten(0, 1), call.dtype).contiguous()
        wanted = ctx.needs_input_grad[0]
        if wanted:
            call.post_result_grads(grad)
        if trained.names:
            trained.leave(call.output_work(grad, ctx.saved_tensors, trained.names))
        arrived = in_type(call.arrive_grad(call.num_chunks - 1), ctx.dtype) if wanted else None
        return arrived, None, None, *([None] * ctx.num_tokens)


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
    weights = () if norms is None else (norms.q, norms.k)
    arrivals = [_Arrival(call, index, rotary, norms) for index in range(call.num_chunks)]
    with apart(), plain:
        qkv, output_weights = _Trained(parameters, QKV, context), _Trained(parameters, OUTPUT, context)
        link = apply_or_run(_Scatter, hidden_BLH, call, qkv, *qkv.tensors)
        call.returns_wanted = link.requires_grad
        token = output_weights.token()
        arrived = apply_or_run(_Arrive, link, arrivals[0], *weights)
    keys = arrived[1:]
    for arrival in arrivals[1:]:
        output = core(arrived[0], *keys)
        with apart(), plain:
            arrived = apply_or_run(_Turn, output, arrival)
        keys = arrived[1:] or keys
    output = core(arrived[0], *keys)
    with apart(), plain:
        return apply_or_run(_Gather, output, call, output_weights, *token)  # type: ignore[no-any-return]


def _rows(hidden: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    return in_type(hidden.reshape(-1, call.hidden), call.dtype)
