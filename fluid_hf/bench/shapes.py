"""Shapes of known models, by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluid_hf.errors import ConfigError
from fluid_hf.overlap.cost_model import LayerSizes, expected_rows

__all__ = ["SHAPES", "LayerShape", "shape_of"]


@dataclass(frozen=True)
class LayerShape:
    """Sizes of the routed experts of one layer: H, I, E, K."""

    hidden: int
    inner: int
    experts: int
    top_k: int

    def expected_rows(self, tokens: int, ep_size: int) -> float:
        """Rows a rank sends with uniform routing: unique (token, other rank) pairs."""
        return expected_rows(tokens, self.top_k, self.experts, ep_size)

    def sizes(self, tokens: int, ep_size: int, element_bytes: int) -> LayerSizes:
        """As the cost model takes them."""
        return LayerSizes(tokens, self.top_k, self.experts, ep_size, self.hidden, self.inner, element_bytes)


SHAPES = {
    "mixtral-8x7b": LayerShape(4096, 14336, 8, 2),
    "qwen1.5-moe-a2.7b": LayerShape(2048, 1408, 60, 4),
    "qwen2-57b-a14b": LayerShape(3584, 2560, 64, 8),
    "qwen3-30b-a3b": LayerShape(2048, 768, 128, 8),
    "qwen3-235b-a22b": LayerShape(4096, 1536, 128, 8),
    "small": LayerShape(1024, 512, 16, 4),
    "tiny": LayerShape(64, 32, 16, 4),
}

# What configurations of transformers call the sizes, the first that is there.
_FIELDS = {
    "hidden": ("hidden_size",),
    "inner": ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"),
}


def shape_of(name: str) -> LayerShape:
    """The shape of a model by its name in `SHAPES`, or by the configuration of a Hugging Face model.

    Args:
        name: a key of `SHAPES`, a model's folder, or its `config.json`.

    Raises:
        ConfigError: neither is found, or the configuration lacks a size; says which.
    """
    if name in SHAPES:
        return SHAPES[name]
    from transformers import AutoConfig

    try:
        if not Path(name).exists() and ("/" not in name or name.startswith(("/", ".", "~"))):
            raise OSError("no such file or folder")  # the Hub would be asked several times for a misspelt name
        config: Any = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"shape ({name!r}) must be one of {', '.join(sorted(SHAPES))}, or the folder or config.json of a model "
            f"({str(error).splitlines()[0]})."
        ) from error
    config = config.get_text_config()
    sizes = {}
    for size, fields in _FIELDS.items():
        found = [value for value in (getattr(config, field, None) for field in fields) if isinstance(value, int)]
        if not found:
            raise ConfigError(f"configuration ({name}, {config.model_type}) must have one of {', '.join(fields)}.")
        sizes[size] = found[0]
    return LayerShape(**sizes)
