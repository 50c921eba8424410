"""Tiny models of each family, with the same weights wherever they are built."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")
_BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}


def tiny_model(family: str, *, num_experts: int = 4, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model of two layers with random weights, equal for equal arguments."""
    torch.manual_seed(seed)
    base = {**_BASE, **overrides}
    if family == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**base, intermediate_size=48, num_local_experts=num_experts))
    if family == "qwen2_moe":
        config = Qwen2MoeConfig(
            **base, num_experts=num_experts, moe_intermediate_size=24, shared_expert_intermediate_size=40
        )
        return Qwen2MoeForCausalLM(config)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**base, num_experts=num_experts, moe_intermediate_size=24, head_dim=8))


def batch(rank: int, rows: int, length: int = 12, vocab_size: int = 96, step: int = 0) -> torch.Tensor:
    """Token ids of one rank."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(3, vocab_size, (rows, length), generator=generator)


def reloaded_losses(rank: int, world: int, folders: list[str], ids: torch.Tensor) -> dict[str, float]:
    """The loss of each folder's model, by transformers alone."""
    losses = {}
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            losses[folder] = float(model(input_ids=ids, labels=ids).loss)
    assert "fluid_hf" not in sys.modules
    return losses


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """|value - reference| / |reference|; a NaN is infinite."""
    value, reference = value.detach().double(), reference.detach().double()
    error = float((value - reference).norm() / reference.norm().clamp(min=1e-12))
    return error if error == error else float("inf")


def errors_by_name(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative error of each gradient; one below a thousandth of all together, which may be nothing but roundings (of
    queries and keys, where the only token that has a loss sees itself alone), against that."""
    least = 1e-3 * float(torch.stack([gradient.norm() for gradient in wanted.values()]).norm())
    return {
        name: float((found[name] - gradient).norm() / gradient.norm().clamp(min=least))
        for name, gradient in wanted.items()
    }
