"""Tiny mixture-of-experts models with random weights, one for each family that the example knows by name."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

_SHARED: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": True,
    # The load-balancing loss, which experts need that start from random weights; strong, as training is short.
    "output_router_logits": True,
    "router_aux_loss_coef": 0.02,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 256, "head_dim": 32, "norm_topk_prob": True},
    "qwen2_moe": {"num_experts": 8, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256},
    "mixtral": {"num_local_experts": 8, "intermediate_size": 256},
}


def build_model(name: str, tokenizer: PreTrainedTokenizerBase, *, seq_len: int, bf16: bool) -> PreTrainedModel:
    """A tiny model if `name` is a family of `FAMILIES`, else the pretrained model `name`."""
    if name not in FAMILIES:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16 if bf16 else torch.float32)
    config = AutoConfig.for_model(
        name,
        **_SHARED,
        **FAMILIES[name],
        vocab_size=len(tokenizer),
        max_position_embeddings=max(1024, seq_len),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config)
