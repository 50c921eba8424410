"""The attention a user has without fluid_hf, unmodified: transformers' layers, and DeepSpeed's UlyssesSPAttentionHF."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fluid_hf.models.sequence_parallel import take_interface

__all__ = ["ATTENTION_SHAPES", "AttentionLayer", "AttentionShape", "deepspeed_layer", "new_layer", "plain_layer"]

AttentionLayer = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one attention layer, and whose code it runs."""

    family: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int


ATTENTION_SHAPES = {
    "mixtral-8x7b": AttentionShape("mixtral", 4096, 32, 8, 128),
    "qwen3-30b-a3b": AttentionShape("qwen3_moe", 2048, 32, 4, 128),
    "qwen3-235b-a22b": AttentionShape("qwen3_moe", 4096, 64, 4, 128),
    "tiny": AttentionShape("mixtral", 32, 8, 4, 8),
    "tiny-normed": AttentionShape("qwen3_moe", 32, 8, 2, 8),
}


def new_layer(shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> Any:
    """transformers' attention layer with fixed random weights, equal for equal arguments."""
    from transformers import MixtralConfig, Qwen3MoeConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralAttention
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

    sizes = {"hidden_size": shape.hidden, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads}
    kinds: dict[str, tuple[Any, Any]] = {
        "mixtral": (MixtralConfig, MixtralAttention),
        "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeAttention),
    }
    config_class, layer_class = kinds[shape.family]
    config = config_class(**sizes, head_dim=shape.head_dim, sliding_window=None, attn_implementation="sdpa")
    layer = layer_class(config, 0).to(device, dtype)
    generator = torch.Generator(device=device).manual_seed(1)
    for weight in layer.parameters():
        if weight.dim() > 1:
            weight.data.copy_(torch.randn(weight.shape, device=device, generator=generator) * shape.hidden**-0.5)
    return layer


def plain_layer(shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> Any:
    """The layer alone on whole sequences."""
    return new_layer(shape, device, dtype)


class _Ulysses:
    """Hands a layer's queries, keys and values to DeepSpeed's module, as its registration with transformers does."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def run(self, module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
        """The attention interface."""
        return self._module(module, q, k, v, mask, **kwargs)


def deepspeed_layer(shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> Any:
    """The layer with DeepSpeed's UlyssesSPAttentionHF around the same core, over the default group."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from fluid_hf.integrations.deepspeed import init_communication

    if not deepspeed.comm.is_initialized():
        init_communication()
    layer = new_layer(shape, device, dtype)
    ulysses = UlyssesSPAttentionHF(
        attn=sdpa_attention_forward,
        batch_size=1,
        attn_head_count=shape.heads,
        attn_head_size=shape.head_dim,
        kv_head_count=shape.kv_heads,
        num_hidden_layers=1,
        process_group=dist.group.WORLD,
        seq_length_is_variable=True,
    )
    take_interface(layer, _Ulysses(ulysses))
    return layer
