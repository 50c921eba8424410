"""Every model folder of transformers with experts: its tiny text model, built from its own configuration class."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fluid_hf.models.registry import has_experts

MODELS = Path(transformers.__file__).parent / "models"

# Sizes by the names that configurations use; only names that a configuration has are set.
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "sliding_window": 8,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "index_head_dim": 16,
    "index_topk": 4,
    "index_n_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# What a family's configuration asks for beyond that.
SPECIAL: dict[str, dict[str, Any]] = {
    "cohere2_moe": {"num_shared_experts": 1},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [24, 16],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "flint": {"mlp_only_layers": []},
    "gemma4": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
        "vocab_size_per_layer_input": 96,
        "hidden_size_per_layer_input": 8,
    },
    "glm4v_moe": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}},
    "glm5_next": {"index_kpool": 2, "qk_rope_head_dim": 0, "linear_head_dim": 8, "linear_num_heads": 2},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 4,
        "mamba_d_state": 8,
        "mamba_d_head": 16,
        "mamba_chunk_size": 8,
    },
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
    "longcat_flash": {
        "num_layers": 2,
        "head_dim": 8,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 24,
        "zero_expert_num": 2,
    },
    # By default a layer pads to 128 positions for 128 heads: 5 GB and a minute a test in transformers 5.17.
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 8,
    },
    "unlimited_ocr": {"num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


# Folders whose experts are served without `use_experts_implementation`.
UNDECORATED = ("dbrx", "llama4", "longcat_flash", "step3p7")


def folders() -> list[str]:
    """Model folders whose modeling file has experts under `use_experts_implementation`."""
    found = MODELS.glob("*/modeling_*.py")
    decorated = [path.parent.name for path in found if "@use_experts_implementation" in path.read_text("utf-8")]
    return sorted([*decorated, *(folder for folder in UNDECORATED if (MODELS / folder).is_dir())])


def model_classes(folder: str) -> list[type[PreTrainedModel]]:
    """Model classes of a folder: causal language models first, then text models, then the others."""
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == module.__name__
        and inspect.isclass(getattr(value, "config_class", None))
        and not value.__name__.endswith("PreTrainedModel")
    ]
    order = ("ForCausalLM", "TextModel", "Model", "")
    return sorted(classes, key=lambda c: next(i for i, end in enumerate(order) if c.__name__.endswith(end)))


def tiny_config(folder: str, config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The configuration with small sizes."""
    known = set(inspect.signature(config_class).parameters) | set(config_class.attribute_map)
    sizes = {name: value for name, value in SMALL.items() if name in known}
    if "kv_lora_rank" in known:  # latent attention: as many key heads as heads, and head sizes of its own
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    if "mlp_layer_types" in known:
        sizes["mlp_layer_types"] = ["sparse"] * sizes["num_hidden_layers"]
    config = config_class(**{**sizes, **SPECIAL.get(folder, {})})
    config._attn_implementation = "eager"
    config.use_cache = False
    config._experts_implementation = "eager"
    return config


def tiny_model(folder: str, seed: int = 0) -> PreTrainedModel:
    """The first class of a folder that has experts, with random weights, equal for equal arguments."""
    errors = []
    for model_class in model_classes(folder):
        try:
            config = tiny_config(folder, model_class.config_class)
            probe = _probe(model_class, config)
        except Exception as error:
            errors.append(f"{model_class.__name__}: {type(error).__name__}: {error}")
            continue
        if not has_experts(probe):
            errors.append(f"{model_class.__name__}: no experts")
        else:
            size = sum(parameter.numel() for parameter in probe.parameters())
            assert size < 3_000_000, (
                f"{model_class.__name__} has {size} parameters: name its sizes in SPECIAL; {errors}"
            )
            torch.manual_seed(seed)
            model = model_class._from_config(config)
            randomise(model)
            return model.eval()  # no jitter, no sampling in routers
    raise RuntimeError(f"{folder}: no model with experts: " + "; ".join(errors))


def _probe(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The model without memory for its weights."""
    try:
        with torch.device("meta"):
            return model_class._from_config(config)
    except RuntimeError:  # its constructor reads values
        return model_class._from_config(config)


def randomise(model: nn.Module) -> None:
    """Weights that let every part of the model matter; some classes start with zeros or uninitialised memory."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.dim() > 1 or "bias" in name:
                parameter.normal_(std=0.2)
            else:
                parameter.uniform_(0.5, 1.5)
        for name, table in [*model.named_buffers(), *model.named_parameters()]:
            if name.endswith("tid2eid"):  # experts by token id: distinct within a token
                first = torch.arange(table.shape[0])[:, None]
                table.copy_((first + torch.arange(table.shape[1])) % 4)
