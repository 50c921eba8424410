"""Router logits of whole sequences where each rank holds a piece: the balancing loss of one process.

transformers computes the auxiliary loss from the router logits and the attention mask that its model's forward sees. A
piece's own loss is another number (it is not linear in the tokens), and NaN for a piece of nothing but padding. While
sequences are cut, the body therefore returns the logits of all pieces, and the mask beside them is that of all pieces.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from fluid_hf.attention.sequence import TOKENS, gather_sequence
from fluid_hf.comm.peer_exchange import PeerExchange

__all__ = ["RouterGather"]


class _GatherTokens(torch.autograd.Function):
    """[B, L, E] of each rank to [B, T, E]; a rank's gradient is the sum of what all ranks have for its piece."""

    @staticmethod
    def forward(ctx: Any, logits_BLE: torch.Tensor, exchange: PeerExchange) -> torch.Tensor:
        ctx.exchange, ctx.length = exchange, logits_BLE.shape[1]
        return gather_sequence(logits_BLE, exchange)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grads[0].contiguous().clone()
        ctx.exchange.all_reduce(total, "the gradient of the balancing loss of whole sequences")
        start = ctx.exchange.rank * ctx.length
        return total[:, start : start + ctx.length].contiguous(), None


class RouterGather:
    """Hooks that hand transformers' balancing loss the router logits and the mask of the whole sequences.

    Attach it before the sequence parallel attention: its hook on the body must run first.

    Args:
        model: the model; only one around a body (`ForCausalLM`) has a loss.
        exchange: exchange of the sequence-parallel group, of size 2 or more.
    """

    def __init__(self, model: nn.Module, exchange: PeerExchange) -> None:
        self._model: Any = model
        self._exchange = exchange
        self._piece: list[Any] = []  # the piece's own mask, on its way from the model to its body
        self._sharded = False
        self._hooks: list[Any] = []

    def attach(self) -> None:
        """Hook the model and its body."""
        body = self._model.base_model
        self._hooks = [body.register_forward_pre_hook(self._narrow_mask, with_kwargs=True)]
        if body is not self._model:
            self._hooks.append(self._model.register_forward_pre_hook(self._widen_mask, with_kwargs=True))
            self._hooks.append(body.register_forward_hook(self._widen_logits))

    def detach(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.compiler.disable  # exchanges are host code, here and below: the compiled parts end there
    def _widen_mask(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = list(inspect.signature(model.forward).parameters)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        wanted = given.get("output_router_logits")
        if wanted is None:
            wanted = getattr(self._model.config, "output_router_logits", False)
        self._sharded = bool(wanted and given.get("sequence_sharded", model.training))
        mask = given.get("attention_mask")
        known = given.get(TOKENS) if mask is None else mask
        self._piece = []
        if self._sharded and isinstance(known, torch.Tensor) and known.dim() == 2:
            self._piece = [mask]
            given["attention_mask"] = gather_sequence(known, self._exchange)
        return (), given

    def _narrow_mask(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        piece, self._piece = self._piece, []
        given = {name: value for name, value in kwargs.items() if name != TOKENS}
        return args, {**given, "attention_mask": piece[0]} if piece else given

    @torch.compiler.disable
    def _widen_logits(self, body: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        sharded, self._sharded = self._sharded, False
        logits = getattr(output, "router_logits", None)
        if not sharded or not isinstance(logits, tuple):
            return
        sequences = output.last_hidden_state.shape[0]
        output.router_logits = tuple(self._gather(layer, sequences) for layer in logits)

    def _gather(self, logits: torch.Tensor, sequences: int) -> torch.Tensor:
        """One layer's logits [B * L, E] (or [B, L, E]) to those of the whole sequences, in the same form."""
        cut = logits.reshape(sequences, -1, logits.shape[-1])
        whole: torch.Tensor = _GatherTokens.apply(cut, self._exchange)  # type: ignore[no-untyped-call]
        return whole if logits.dim() == 3 else whole.reshape(-1, logits.shape[-1])
