"""Finds the attention layers of a Hugging Face model and checks that they can run sequence parallel.

A layer qualifies by its interface, not by its family: projections q_proj, k_proj, v_proj and o_proj, and transformers'
attention interface (`ALL_ATTENTION_FUNCTIONS`) for the core.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fluid_hf.attention.heads import HeadLayout, plan_heads
from fluid_hf.errors import ConfigError, UnsupportedModelError
from fluid_hf.models.mask_code import read_mask_code

__all__ = ["AttentionSite", "find_attention"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
KINDS = ("full_attention", "sliding_attention")
# Ends of the names of classes whose heads do not predict the next token.
WHOLE_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")
# Rotary embeddings that do not depend on the longest position of the batch, which a rank's piece would not show.
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional")


@dataclass(frozen=True)
class AttentionSite:
    """One attention layer.

    Attributes:
        name: module name.
        module: the layer.
        layout: heads over the ranks.
        kind: which of the model's masks it uses.
    """

    name: str
    module: nn.Module
    layout: HeadLayout
    kind: str


def find_attention(model: nn.Module, sp_size: int) -> list[AttentionSite]:
    """All attention layers of a model, checked for `sp_size` ranks.

    Raises:
        UnsupportedModelError: the model mixes tokens along the sequence in a way that cannot be split; names it.
        ConfigError: the number of heads is not divisible by `sp_size`.
    """
    config: Any = _text_config(model)
    body: Any = model.base_model
    windowed = read_mask_code(body).windowed
    sites = []
    for name, module in model.named_modules():
        if all(isinstance(getattr(module, projection, None), nn.Module) for projection in PROJECTIONS):
            sites.append(_site(name, module, sp_size, windowed))
    layers = getattr(config, "num_hidden_layers", None)
    if not sites or len(sites) != layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has {len(sites)} attention layers with {', '.join(PROJECTIONS)} in "
            f"num_hidden_layers ({layers}); sequence parallelism needs one in each layer: set sp_size 1."
        )
    return sites


def _text_config(model: Any) -> Any:
    name = type(model).__name__
    config = model.config
    if getattr(config, "is_encoder_decoder", False) or config.get_text_config() is not config:
        raise UnsupportedModelError(f"{name} is no decoder-only language model; set sp_size 1.")
    heads = [kind.__name__ for kind in type(model).__mro__ if kind.__name__.endswith(WHOLE_HEADS)]
    if heads:
        raise UnsupportedModelError(
            f"{name} has the head of {heads[0]}, which looks for the last token of whole sequences, or takes labels "
            "that are not the next tokens, and a rank has a piece of them; set sp_size 1."
        )
    if getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision"):  # it leaves text causal
        raise UnsupportedModelError(
            f"use_bidirectional_attention ({config.use_bidirectional_attention!r}) must be off with sequence "
            "parallelism, which serves causal attention; set sp_size 1."
        )
    if not getattr(type(model), "_supports_attention_backend", False):
        raise UnsupportedModelError(f"{name} does not use transformers' attention interface; set sp_size 1.")
    implementation = config._attn_implementation
    if implementation not in IMPLEMENTATIONS:
        raise UnsupportedModelError(
            f"attn_implementation ({implementation!r}) must be one of {', '.join(IMPLEMENTATIONS)} with sequence "
            "parallelism; load the model with one of these."
        )
    core = ALL_ATTENTION_FUNCTIONS.get(implementation)
    if implementation != "eager" and not getattr(core, "__module__", "").startswith("transformers."):
        raise ConfigError(
            f"attention function {implementation!r} ({getattr(core, '__module__', core)}) must be transformers' own: "
            "something has replaced it, such as DeepSpeed's Ulysses; call patch_model before that, and give another "
            "model, as a second Trainer with sp_size over 1, a process of its own."
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {values.get("rope_type", "default") for values in (rope, *rope.values()) if isinstance(values, dict)}
    if not kinds <= set(ROPE_TYPES):
        raise UnsupportedModelError(
            f"{name} has rope_type {', '.join(sorted(kinds - set(ROPE_TYPES)))}, which depends on the length of the "
            f"batch; sequence parallelism supports {', '.join(ROPE_TYPES)}: set sp_size 1."
        )
    return config


def _site(name: str, module: Any, sp_size: int, windowed: bool) -> AttentionSite:
    where = f"{type(module).__name__} ({name})"
    config = getattr(module, "config", None)
    if config is None or not hasattr(module, "head_dim") or not getattr(module, "is_causal", False):
        raise UnsupportedModelError(f"{where} must have config, head_dim and is_causal (true); set sp_size 1.")
    index = getattr(module, "layer_idx", None)
    types = getattr(config, "layer_types", None)
    if types is not None and index is not None:
        kind = types[index]
    else:
        cut = windowed and getattr(config, "sliding_window", None) is not None
        kind = "sliding_attention" if cut else "full_attention"
    if kind not in KINDS:
        raise UnsupportedModelError(
            f"{where} has layer type {kind!r}; sequence parallelism supports {', '.join(KINDS)}."
        )
    return AttentionSite(name, module, plan_heads(*_heads(where, module), sp_size), kind)


def _heads(where: str, module: Any) -> tuple[int, int]:
    """Query and key/value heads of a layer: its own; MiMo-V2 and Laguna have layers with others than the config's."""
    config = module.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    columns, group = getattr(module.k_proj, "out_features", None), getattr(module, "num_key_value_groups", None)
    if columns is None or group is None:
        return heads, kv_heads
    if columns % module.head_dim:
        raise UnsupportedModelError(
            f"{where} has k_proj of {columns} features, which are no heads of head_dim ({module.head_dim}); "
            "set sp_size 1."
        )
    kv_heads = columns // module.head_dim
    return kv_heads * group, kv_heads
