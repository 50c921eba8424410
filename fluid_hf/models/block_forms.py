"""Forwards of transformers' MoE blocks with a shared expert: HF's text, and the same calls with the shared expert in
the communication window. The text names what it was taken from; `fluid_hf.models.shared_experts` compares it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - the name in HF's text

from fluid_hf.models.put_off import CARRIED, carries, put_off, take
from fluid_hf.models.shared_experts import register_form, run_between

__all__: list[str] = []


# Qwen2-MoE, Qwen3-Next, Qwen3.5-MoE, Qwen3-Omni-MoE (talker), Qwen4
@register_form("""
def forward(self, hidden_states):
    batch_size, sequence_length, hidden_dim = hidden_states.shape
    hidden_states_reshaped = hidden_states.view(-1, hidden_dim)
    shared_expert_output = self.shared_expert(hidden_states_reshaped)
    _, routing_weights, selected_experts = self.gate(hidden_states_reshaped)
    expert_output = self.experts(hidden_states_reshaped, selected_experts, routing_weights)
    shared_expert_output = F.sigmoid(self.shared_expert_gate(hidden_states_reshaped)) * shared_expert_output
    expert_output = expert_output + shared_expert_output
    expert_output = expert_output.reshape(batch_size, sequence_length, hidden_dim)
    return expert_output
""")
def gated_shared_expert(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Shared expert scaled by a sigmoid gate."""
    flat = hidden_states.view(-1, hidden_states.shape[-1])
    _, weights, index = self.gate(flat)
    routed, shared = run_between(
        self, flat, index, weights, lambda: self.shared_expert(flat) * F.sigmoid(self.shared_expert_gate(flat))
    )
    return (routed + shared).reshape(hidden_states.shape)


# DeepSeek-V2/V3/V3.2, GLM-4-MoE, Dots1, EXAONE-MoE, Kimi-Linear, Mistral 4, Solar-Open and others
@register_form("""
def forward(self, hidden_states):
    residuals = hidden_states
    orig_shape = hidden_states.shape
    _, topk_weights, topk_indices = self.gate(hidden_states)
    hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
    hidden_states = self.experts(hidden_states, topk_indices, topk_weights).view(*orig_shape)
    hidden_states = hidden_states + self.shared_experts(residuals)
    return hidden_states
""")
def added_shared_experts(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Shared experts added to the routed ones."""
    _, weights, index = self.gate(hidden_states)
    flat = hidden_states.view(-1, hidden_states.shape[-1])
    routed, shared = run_between(self, flat, index, weights, lambda: self.shared_experts(hidden_states))
    return routed.view(*hidden_states.shape) + shared


# A.X K1
@register_form("""
def forward(self, hidden_states):
    residuals = hidden_states
    orig_shape = hidden_states.shape
    _, topk_weights, topk_indices = self.gate(hidden_states)
    hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
    hidden_states = self.experts(hidden_states, topk_indices, topk_weights).view(*orig_shape)
    hidden_states = hidden_states + self.shared_experts(residuals)
    return self.post_mlp_layernorm(hidden_states)
""")
def normed_shared_experts(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Shared experts added, then a norm."""
    return self.post_mlp_layernorm(added_shared_experts(self, hidden_states))


# Inkling
@register_form("""
def forward(self, hidden_states):
    residuals = hidden_states
    input_shape = hidden_states.shape
    _, topk_weights, topk_indices, shared_gammas = self.gate(hidden_states)
    hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
    hidden_states = self.experts(hidden_states, topk_indices, topk_weights).view(*input_shape)
    hidden_states = hidden_states + self.shared_experts(residuals, gammas=shared_gammas)
    return hidden_states
""")
def routed_shared_experts(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Shared experts scaled by the router."""
    _, weights, index, gammas = self.gate(hidden_states)
    flat = hidden_states.view(-1, hidden_states.shape[-1])
    routed, shared = run_between(self, flat, index, weights, lambda: self.shared_experts(hidden_states, gammas=gammas))
    return routed.view(*hidden_states.shape) + shared


# Nemotron-H
@register_form("""
def forward(self, hidden_states):
    residuals = hidden_states
    orig_shape = hidden_states.shape
    _, topk_weights, topk_indices = self.gate(hidden_states)
    hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
    hidden_states = self.fc1_latent_proj(hidden_states)
    hidden_states = self.experts(hidden_states, topk_indices, topk_weights)
    hidden_states = self.fc2_latent_proj(hidden_states)
    hidden_states = hidden_states.view(*orig_shape)
    hidden_states = hidden_states + self.shared_experts(residuals)
    return hidden_states
""")
def latent_experts(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Routed experts in a latent space, shared experts outside it."""
    _, weights, index = self.gate(hidden_states)
    latent = self.fc1_latent_proj(hidden_states.view(-1, hidden_states.shape[-1]))
    routed, shared = run_between(self, latent, index, weights, lambda: self.shared_experts(hidden_states))
    return self.fc2_latent_proj(routed).view(*hidden_states.shape) + shared


# AFMoE
@register_form("""
def forward(self, hidden_states):
    batch_size, seq_len, hidden_dim = hidden_states.shape
    hidden_states_flat = hidden_states.view(-1, hidden_dim)
    _, top_scores, selected_experts = self.router(hidden_states, self.expert_bias)
    shared_output = self.shared_experts(hidden_states_flat).view(batch_size, seq_len, hidden_dim)
    routed_output = self.experts(hidden_states_flat, selected_experts, top_scores).view(batch_size, seq_len, hidden_dim)
    return shared_output + routed_output
""")
def afmoe(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Router with a selection bias."""
    flat = hidden_states.view(-1, hidden_states.shape[-1])
    _, weights, index = self.router(hidden_states, self.expert_bias)
    routed, shared = run_between(self, flat, index, weights, lambda: self.shared_experts(flat))
    return shared.view(*hidden_states.shape) + routed.view(*hidden_states.shape)


# Aria
@register_form("""
def forward(self, hidden_states):
    original_shape = hidden_states.shape
    hidden_states = hidden_states.view(-1, hidden_states.size(-1))
    _, top_k_weights, top_k_index = self.router(hidden_states)
    expert_output = self.experts(hidden_states, top_k_index, top_k_weights).view(original_shape)
    shared_expert_output = self.shared_experts(hidden_states.view(original_shape))
    return expert_output + shared_expert_output
""")
def aria(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Shared experts on the block's shape."""
    flat = hidden_states.view(-1, hidden_states.size(-1))
    _, weights, index = self.router(flat)
    routed, shared = run_between(self, flat, index, weights, lambda: self.shared_experts(hidden_states))
    return routed.view(hidden_states.shape) + shared


# Cohere2-MoE
@register_form("""
def forward(self, hidden_states):
    batch_size, sequence_length, hidden_dim = hidden_states.shape
    hidden_states_flat = hidden_states.view(-1, hidden_dim)
    _, router_scores, selected_experts = self.gate(hidden_states_flat)
    final_hidden_states = self.experts(hidden_states_flat, selected_experts, router_scores)
    if self.num_shared_experts > 0:
        shared_expert_output = self.shared_experts(hidden_states_flat)
        if self.shared_expert_combination_strategy == 'sum':
            final_hidden_states = final_hidden_states + shared_expert_output
        elif self.shared_expert_combination_strategy == 'average':
            final_hidden_states = (final_hidden_states + shared_expert_output) / 2
        else:
            raise ValueError('`shared_expert_combination_strategy` can only be `sum` or `average`')
    return final_hidden_states.reshape(batch_size, sequence_length, hidden_dim)
""")
def cohere2(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Sum or average with the shared experts, if there are any."""
    strategy = self.shared_expert_combination_strategy
    if self.num_shared_experts <= 0 or strategy not in ("sum", "average"):
        return type(self).forward(self, hidden_states)
    flat = hidden_states.view(-1, hidden_states.shape[-1])
    _, weights, index = self.gate(flat)
    routed, shared = run_between(self, flat, index, weights, lambda: self.shared_experts(flat))
    total = routed + shared if strategy == "sum" else (routed + shared) / 2
    return total.reshape(hidden_states.shape)


# DeepSeek-V4
@register_form("""
def forward(self, hidden_states, input_ids=None):
    batch, seq_len, hidden_dim = hidden_states.shape
    residual = hidden_states
    flat = hidden_states.view(-1, hidden_dim)
    if self.is_hash:
        _, weights, indices = self.gate(hidden_states, input_ids)
    else:
        _, weights, indices = self.gate(hidden_states)
    routed = self.experts(flat, indices, weights).view(batch, seq_len, hidden_dim)
    return routed + self.shared_experts(residual)
""")
def hash_or_learned_router(
    self: Any, hidden_states: torch.Tensor, input_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Router by token id in the first layers."""
    gate_arguments = (hidden_states, input_ids) if self.is_hash else (hidden_states,)
    _, weights, index = self.gate(*gate_arguments)
    flat = hidden_states.view(-1, hidden_states.shape[-1])
    routed, shared = run_between(self, flat, index, weights, lambda: self.shared_experts(hidden_states))
    return routed.view(*hidden_states.shape) + shared


# ERNIE 4.5
@register_form("""
def forward(self, hidden_states):
    batch_size, sequence_length, _ = hidden_states.shape
    hidden_states = hidden_states.view(-1, self.hidden_dim)
    if self.shared_experts is not None:
        shared_output = self.shared_experts(hidden_states)
    _, top_k_weights, top_k_index = self.gate(hidden_states)
    final_hidden_states = self.experts(hidden_states, top_k_index, top_k_weights)
    if self.shared_experts is not None:
        final_hidden_states = final_hidden_states + shared_output
    final_hidden_states = final_hidden_states.reshape(batch_size, sequence_length, self.hidden_dim)
    return final_hidden_states.to(hidden_states.dtype)
""")
def ernie(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Shared experts, if there are any."""
    if self.shared_experts is None:
        return type(self).forward(self, hidden_states)
    flat = hidden_states.view(-1, self.hidden_dim)
    _, weights, index = self.gate(flat)
    routed, shared = run_between(self, flat, index, weights, lambda: self.shared_experts(flat))
    return (routed + shared).reshape(hidden_states.shape).to(flat.dtype)


# Flint
@register_form("""
def forward(self, hidden_states):
    batch_size, sequence_length, hidden_dim = hidden_states.shape
    hidden_states = hidden_states.view(-1, hidden_dim)
    _, routing_weights, selected_experts = self.gate(hidden_states)
    final_hidden_states = self.experts(hidden_states, selected_experts, routing_weights)
    final_hidden_states = final_hidden_states + self.shared_expert(hidden_states)
    return final_hidden_states.reshape(batch_size, sequence_length, hidden_dim)
""")
def flint(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """One shared expert, not gated."""
    flat = hidden_states.view(-1, hidden_states.shape[-1])
    _, weights, index = self.gate(flat)
    routed, shared = run_between(self, flat, index, weights, lambda: self.shared_expert(flat))
    return (routed + shared).reshape(hidden_states.shape)


# HunYuan-MoE
@register_form("""
def forward(self, hidden_states):
    batch_size, sequence_length, hidden_dim = hidden_states.shape
    hidden_states_mlp = self.shared_mlp(hidden_states)
    hidden_states = hidden_states.view(-1, hidden_dim)
    _, routing_weights, selected_experts = self.gate(hidden_states)
    final_hidden_states = self.experts(hidden_states, selected_experts, routing_weights).reshape(
        batch_size, sequence_length, hidden_dim
    )
    return final_hidden_states + hidden_states_mlp
""")
def hunyuan(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """A shared MLP on the block's shape."""
    flat = hidden_states.view(-1, hidden_states.shape[-1])
    _, weights, index = self.gate(flat)
    routed, shared = run_between(self, flat, index, weights, lambda: self.shared_mlp(hidden_states))
    return routed.reshape(hidden_states.shape) + shared


# HunYuan V3
@register_form("""
def forward(self, hidden_states):
    batch_size, seq_len, hidden_dim = hidden_states.shape
    hidden_states = hidden_states.view(-1, hidden_dim)
    _, top_k_weights, top_k_index = self.gate(hidden_states, self.e_score_correction_bias)
    routed_output = self.experts(hidden_states, top_k_index, top_k_weights)
    if self.enable_moe_fp32_combine:
        hidden_states = (routed_output.float() + self.shared_experts(hidden_states).float()).to(hidden_states.dtype)
    else:
        hidden_states = routed_output + self.shared_experts(hidden_states)
    return hidden_states.reshape(batch_size, seq_len, hidden_dim)
""")
def hunyuan_v3(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """The sum in float32, if asked for."""
    flat = hidden_states.view(-1, hidden_states.shape[-1])
    _, weights, index = self.gate(flat, self.e_score_correction_bias)
    routed, shared = run_between(self, flat, index, weights, lambda: self.shared_experts(flat))
    if self.enable_moe_fp32_combine:
        return (routed.float() + shared.float()).to(flat.dtype).reshape(hidden_states.shape)
    return (routed + shared).reshape(hidden_states.shape)


# Laguna, MiniMax-M3
@register_form("""
def forward(self, hidden_states):
    batch_size, sequence_length, hidden_dim = hidden_states.shape
    hidden_states = hidden_states.view(-1, hidden_dim)
    shared_output = self.shared_experts(hidden_states)
    _, routing_weights, selected_experts = self.gate(hidden_states)
    hidden_states = self.experts(hidden_states, selected_experts, routing_weights)
    hidden_states = hidden_states * self.routed_scaling_factor
    hidden_states = hidden_states + shared_output
    hidden_states = hidden_states.reshape(batch_size, sequence_length, hidden_dim)
    return hidden_states
""")
def scaled_routed_experts(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Routed experts scaled, shared experts not."""
    flat = hidden_states.view(-1, hidden_states.shape[-1])
    _, weights, index = self.gate(flat)
    routed, shared = run_between(self, flat, index, weights, lambda: self.shared_experts(flat))
    return (routed * self.routed_scaling_factor + shared).reshape(hidden_states.shape)


# ERNIE 4.5 VL: experts for text and others for images. HF leaves out the latter where a batch has no image; ranks would
# then wait for each other's exchanges, so both are always called here, with no tokens if there are none.
@register_form("""
def forward(self, hidden_states, moe_mm_token_type_ids=None):
    batch_size, sequence_length, hidden_dim = hidden_states.shape
    if self.shared_experts is not None:
        shared_output = self.shared_experts(hidden_states)
    if moe_mm_token_type_ids is not None and moe_mm_token_type_ids.any():
        final_hidden_states = torch.zeros_like(hidden_states)
        router_logits = torch.zeros(
            size=(batch_size * sequence_length, self.num_experts),
            device=final_hidden_states.device,
            dtype=torch.float,
        )
        moe_mm_token_type_ids = moe_mm_token_type_ids.bool()
        token_type_ids_router = moe_mm_token_type_ids.reshape(-1)[:, None].expand(-1, self.num_experts)
        token_type_ids_states = moe_mm_token_type_ids[..., None].expand(-1, -1, hidden_dim)
        final_hidden_states[~token_type_ids_states], router_logits[~token_type_ids_router] = self.text_moe(
            hidden_states[~token_type_ids_states]
        )
        final_hidden_states[token_type_ids_states], router_logits[token_type_ids_router] = self.vision_moe(
            hidden_states[token_type_ids_states]
        )
    else:
        final_hidden_states, router_logits = self.text_moe(hidden_states)
        final_hidden_states = final_hidden_states.reshape(batch_size, sequence_length, hidden_dim)
        router_logits = router_logits.reshape(-1, self.num_experts)
    if self.shared_experts is not None:
        final_hidden_states = final_hidden_states + shared_output
    return (final_hidden_states, router_logits)
""")
def ernie_vl(
    self: Any, hidden_states: torch.Tensor, moe_mm_token_type_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Text tokens to the text experts, image tokens to the image experts; the shared experts in the window of the
    former."""
    run = put_off(self.shared_experts, hidden_states) if self.shared_experts is not None else None
    if moe_mm_token_type_ids is None:
        moe_mm_token_type_ids = hidden_states.new_zeros(hidden_states.shape[:2])
    is_image = moe_mm_token_type_ids.bool()
    output = torch.zeros_like(hidden_states)
    logits = torch.zeros(is_image.numel(), self.num_experts, device=output.device, dtype=torch.float)
    for experts, mask in ((self.text_moe, ~is_image), (self.vision_moe, is_image)):
        carried = {CARRIED: run} if carries(experts.forward) else {}
        flat, flat_logits = experts(hidden_states[mask], **carried)
        output[mask] = flat.reshape(-1, hidden_states.shape[-1])
        logits[mask.reshape(-1)] = flat_logits.reshape(-1, self.num_experts).to(logits.dtype)
    return output if run is None else output + take(run), logits


# Llama 4: HF gives every expert every token, scaled by its routing weight, which is zero for those not chosen.
@register_form("""
def forward(self, hidden_states):
    hidden_states = hidden_states.reshape(-1, self.hidden_dim)
    router_scores, router_logits = self.router(hidden_states)
    routed_in = hidden_states.repeat(router_scores.shape[1], 1)
    routed_in = routed_in * router_scores.transpose(0, 1).reshape(-1, 1)
    routed_out = self.experts(routed_in)
    out = self.shared_expert(hidden_states)
    out.add_(routed_out.reshape(router_scores.shape[1], -1, routed_out.shape[-1]).sum(dim=0))
    return (out, router_logits)
""")
def llama4(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The chosen experts only."""
    flat = hidden_states.reshape(-1, self.hidden_dim)
    scores, logits = self.router(flat)
    index = torch.topk(logits, self.top_k, dim=1).indices
    routed, shared = run_between(self, flat, index, scores.gather(1, index), lambda: self.shared_expert(flat))
    return shared + routed, logits
