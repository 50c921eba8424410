"""Experts of transformers that are stored and called in a way of their own, known by the text of their code.

DBRX             2-D weights of all experts one below the other; a block that gives them three dimensions
LongCat-Flash    numbers beyond the experts with weights stand for identity experts; `gate_up_proj` has rows for
                 them, too, that nothing reads
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fluid_hf.errors import UnsupportedModelError
from fluid_hf.models.shared_experts import canonical_text
from fluid_hf.models.stored_experts import StoredExperts

__all__ = ["OTHER_EXPERTS", "read_other_experts"]

DBRX_EXPERTS = """
def forward(self, hidden_states, top_k_index, top_k_weights):
    batch_size = hidden_states.shape[0]
    hidden_states = hidden_states.reshape(-1, self.hidden_size)
    next_states = torch.zeros_like(hidden_states, dtype=hidden_states.dtype, device=hidden_states.device)
    with torch.no_grad():
        expert_mask = torch.nn.functional.one_hot(top_k_index, num_classes=self.num_experts + 1)
        expert_mask = expert_mask.permute(2, 1, 0)
        expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
    split_expert_shape = (-1, self.ffn_hidden_size, self.hidden_size)
    for expert_idx in expert_hit:
        expert_idx = expert_idx[0]
        with torch.no_grad():
            idx, token_idx = torch.where(expert_mask[expert_idx])
        v1 = self.mlp.v1.view(split_expert_shape)[expert_idx]
        w1 = self.mlp.w1.view(split_expert_shape)[expert_idx]
        w2 = self.mlp.w2.view(split_expert_shape)[expert_idx]
        states = self.mlp(hidden_states[token_idx], w1, v1, w2)
        states = states.view(-1, self.hidden_size) * top_k_weights[token_idx, idx, None]
        next_states.index_add_(0, token_idx, states)
    next_states = next_states.view(batch_size, -1, self.hidden_size)
    return next_states
"""
DBRX_EXPERT = """
def forward(self, x, expert_w1, expert_v1, expert_w2):
    gate_proj = x.matmul(expert_w1.T)
    up_proj = x.matmul(expert_v1.T)
    gate_proj = self.activation_fn(gate_proj)
    intermediate_states = gate_proj * up_proj
    down_proj = intermediate_states.matmul(expert_w2)
    return down_proj
"""
DBRX_BLOCK = """
def forward(self, hidden_states):
    router_logits = self.router(hidden_states)
    top_k_weights, top_k_index = self.route_tokens_to_experts(router_logits)
    output = self.experts(hidden_states, top_k_index, top_k_weights)
    return output
"""
LONGCAT_EXPERTS = """
def forward(self, hidden_states, top_k_index, top_k_weights):
    final_hidden_states = torch.zeros_like(hidden_states)
    if top_k_index.numel() == 0:
        return final_hidden_states
    expert_mask = torch.nn.functional.one_hot(top_k_index, num_classes=self.total_experts).permute(2, 1, 0)
    expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero(as_tuple=False)
    for expert_idx_tensor in expert_hit:
        expert_idx = int(expert_idx_tensor.item())
        selection_idx, token_idx = torch.where(expert_mask[expert_idx].squeeze(0))
        if token_idx.numel() == 0:
            continue
        current_state = hidden_states[token_idx]
        if expert_idx >= self.num_routed_experts or self.gate_up_proj is None:
            current_hidden_states = self.identity_expert(current_state)
        else:
            gate, up = F.linear(current_state, self.gate_up_proj[expert_idx]).chunk(2, dim=-1)
            current_hidden_states = self.act_fn(gate) * up
            current_hidden_states = F.linear(current_hidden_states, self.down_proj[expert_idx])
        current_hidden_states = current_hidden_states * top_k_weights[token_idx, selection_idx, None]
        final_hidden_states.index_add_(0, token_idx, current_hidden_states.to(hidden_states.dtype))
    return final_hidden_states
"""
LONGCAT_BLOCK = """
def forward(self, hidden_states):
    orig_shape = hidden_states.shape
    _, topk_weights, topk_indices = self.router(hidden_states)
    hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
    hidden_states = self.experts(hidden_states, topk_indices, topk_weights).view(*orig_shape)
    return hidden_states
"""


class DbrxStored(StoredExperts):
    """`mlp.w1` (gate), `mlp.v1` (up) and `mlp.w2` (down, inputs first), each [E * I, H]."""

    parts = {"gate_up_proj": ("w1", "v1"), "down_proj": ("w2",)}

    def __init__(self, module: Any) -> None:
        super().__init__(module, tuple(self.parts), module.mlp.activation_fn)
        self._sizes = (module.num_experts, module.ffn_hidden_size, module.hidden_size)

    def parameters(self, name: str) -> list[nn.Parameter]:
        return [self.module.get_parameter(f"mlp.{part}") for part in self.parts[name]]

    def shape(self, name: str) -> tuple[int, ...]:
        experts, inner, hidden = self._sizes
        return (experts, 2 * inner, hidden) if name == "gate_up_proj" else (experts, hidden, inner)

    def take(self, name: str, held: slice) -> torch.Tensor:
        values = [parameter.data for parameter in self.parameters(name)]
        return self.stack(name, {f"mlp.{part}": v for part, v in zip(self.parts[name], values, strict=True)}, held)

    def stack(self, name: str, stored: Mapping[str, torch.Tensor], held: slice) -> torch.Tensor:
        parts = [stored[f"mlp.{part}"].view(self._sizes)[held] for part in self.parts[name]]
        return torch.cat(parts, dim=1) if name == "gate_up_proj" else parts[0].transpose(1, 2).contiguous()

    def unstack(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = weight.chunk(2, dim=1) if name == "gate_up_proj" else [weight.transpose(1, 2)]
        rows = [part.reshape(-1, self._sizes[2]) for part in parts]
        return {f"mlp.{part}": value for part, value in zip(self.parts[name], rows, strict=True)}


class LongcatStored(StoredExperts):
    """`gate_up_proj` and `down_proj`; the rows of the first for identity experts are kept as they are."""

    def __init__(self, module: Any) -> None:
        super().__init__(module, ("gate_up_proj", "down_proj"), module.act_fn)
        self._experts = int(module.num_routed_experts)
        self._unused: torch.Tensor | None = None

    def parameters(self, name: str) -> list[nn.Parameter]:
        return [self.module.get_parameter(name)]

    def shape(self, name: str) -> tuple[int, ...]:
        parameter = self.module.get_parameter(name)
        return (self._experts, *getattr(parameter, "ds_shape", parameter.shape)[1:])

    def take(self, name: str, held: slice) -> torch.Tensor:
        return self.stack(name, {name: self.module.get_parameter(name).data}, held)

    def stack(self, name: str, stored: Mapping[str, torch.Tensor], held: slice) -> torch.Tensor:
        if name == "gate_up_proj":
            self._unused = stored[name][self._experts :].clone()
        return stored[name][held].clone()

    def unstack(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        if name == "down_proj" or self._unused is None or weight.shape[0] > self._experts:  # stored so already
            return {name: weight}
        return {name: torch.cat([weight, self._unused.to(weight)])}


def dbrx_block(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Tokens in one dimension."""
    weights, index = self.route_tokens_to_experts(self.router(hidden_states))
    return self.experts(hidden_states.reshape(-1, hidden_states.shape[-1]), index, weights).view(hidden_states.shape)


def longcat_block(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Identity experts are computed where the token is: their weights times the token.

    In their places the token's first expert with weights is named once more, with weight zero: no row is sent for it.
    """
    *_, weights, index = self.router(hidden_states)
    flat = hidden_states.view(-1, hidden_states.shape[-1])
    num_experts = self.experts.num_experts
    is_identity = index >= num_experts
    first = index.gather(1, is_identity.to(torch.int8).argmin(1, keepdim=True)) % num_experts
    routed = self.experts(flat, torch.where(is_identity, first, index), weights.masked_fill(is_identity, 0))
    kept = flat * weights.masked_fill(~is_identity, 0).sum(1, keepdim=True)
    return (routed + kept.to(routed.dtype)).view(hidden_states.shape)


# Wordings of transformers 5.17.
EARLIER = (
    ("num_classes=self.num_experts + 1", "num_classes=self.num_experts"),
    ("_, topk_weights, topk", "topk_weights, topk"),
)
# By class: how the experts are stored, the text of the code that this is true of (by attribute), the block's forward.
OTHER_EXPERTS: dict[str, tuple[type[Any], dict[str, str], Callable[..., Any]]] = {
    "DbrxExperts": (DbrxStored, {"": DBRX_EXPERTS, "mlp": DBRX_EXPERT, "block": DBRX_BLOCK}, dbrx_block),
    "LongcatFlashExperts": (LongcatStored, {"": LONGCAT_EXPERTS, "block": LONGCAT_BLOCK}, longcat_block),
}


def read_other_experts(
    module: nn.Module, block: nn.Module, where: str
) -> tuple[StoredExperts, dict[str, Callable[..., Any]]]:
    """Such experts, and the method of their block that calls them.

    Raises:
        UnsupportedModelError: their code, or the block's, is not that which is known.
    """
    stored, texts, forward = OTHER_EXPERTS[type(module).__name__]
    for attribute, text in texts.items():
        owner = block if attribute == "block" else module.get_submodule(attribute)
        try:
            own = canonical_text(inspect.getsource(type(owner).forward))
        except (OSError, TypeError, SyntaxError):
            own = None
        known = {canonical_text(text.replace(*wording)) for wording in (("", ""), *EARLIER)}
        if own not in known or "forward" in vars(owner):
            raise UnsupportedModelError(
                f"{where}: the forward of {type(owner).__name__} is not that of transformers 5.17 to 5.23, so its "
                "experts cannot be taken apart."
            )
    if not any(True for _ in module.parameters(recurse=True)):
        raise UnsupportedModelError(f"{where} has identity experts only: nothing to split over ranks.")
    return stored(module), {"forward": forward}
