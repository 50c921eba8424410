"""Metrics of a patched model: load of experts and ranks, and floating point operations per token."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fluid_hf.moe.layer import ExpertParallelLayer

__all__ = ["global_load", "imbalance", "model_flops_per_token", "peak_tflops", "read_loads"]

# Dense bf16 TFLOP/s of the data sheets, by words of the device's name; the first match counts.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H200": 989.4,
    "GH200": 989.4,
    "B200": 2250.0,
    "A100": 311.9,
    "A800": 311.9,
    "L40S": 362.0,
    "A10": 125.0,
}


def read_loads(layers: Mapping[str, ExpertParallelLayer]) -> dict[str, list[int]]:
    """(token, expert) pairs of each expert held here, by layer; waits for the device once if all layers are on one."""
    ends = {name: layer.context.stats.ends for name, layer in layers.items() if layer.context.stats.ends}
    loads = {name: [0] * layer.num_local_experts for name, layer in layers.items()}
    for name, sums in zip(ends, _sums(list(ends.values())), strict=True):
        loads[name] = [end - start for start, end in zip([0, *sums[:-1]], sums, strict=True)]
    return loads


def _sums(vectors: Sequence[Sequence[torch.Tensor]]) -> list[list[int]]:
    """Sum of the vectors of each list; in a launch or two where all are alike, as they mostly are."""
    if len({(len(some), some[0].shape, some[0].device) for some in vectors}) == 1:
        every = torch.stack([vector for some in vectors for vector in some])
        return list(every.view(len(vectors), -1, every.shape[1]).sum(1).tolist())
    sums = [torch.stack(list(some)).sum(0) for some in vectors]
    if len({vector.device for vector in sums}) != 1:
        return [vector.tolist() for vector in sums]
    flat = iter(torch.cat(sums).tolist())  # host synchronisation, one for all
    return [list(itertools.islice(flat, len(vector))) for vector in sums]


def global_load(gathered: Sequence[Mapping[str, list[int]]], name: str, ep_size: int) -> list[int]:
    """Pairs of every expert of a layer, from the loads of all ranks in rank order."""
    held = len(gathered[0][name])
    total = [0] * (held * ep_size)
    for rank, loads in enumerate(gathered):
        start = (rank % ep_size) * held
        for index, load in enumerate(loads[name]):
            total[start + index] += load
    return total


def imbalance(load: Sequence[float]) -> float:
    """The largest over the mean: 1 is balanced; 0 if there is no load."""
    mean = sum(load) / len(load) if load else 0.0
    return max(load) / mean if mean else 0.0


def model_flops_per_token(model: nn.Module, layers: Mapping[str, ExpertParallelLayer], seq_len: int) -> float:
    """Floating point operations of forward and backward for one token, as in the PaLM paper (appendix B).

    Six for each trainable weight a token meets and four for each frozen one (no weight gradient): of the routed experts
    its top-k, of the embeddings only the output's. Attention's scores are counted for a causal mask. What activation
    checkpointing computes again does not count.

    Args:
        model: a patched Hugging Face model.
        layers: its expert-parallel layers.
        seq_len: tokens of a whole sequence.
    """
    config: Any = getattr(model, "config", None)
    tied = getattr(config, "tie_word_embeddings", False)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    known = getattr(config, "num_experts_per_tok", 1)  # before a layer was called; families differ in the name
    experts = {id(weight): layer for layer in layers.values() for weight in layer.parameters()}
    find: Any = getattr(model, "get_input_embeddings", None)
    inputs = find() if find is not None else None
    skipped = set() if inputs is None or tied else {id(weight) for weight in inputs.parameters()}
    total = 0.0
    for weight in model.parameters():
        if id(weight) in skipped or (getattr(weight, "ds_shape", weight.shape)[1:] == torch.Size([])):
            continue  # looked up, or a vector: no matrix product
        size = float(getattr(weight, "ds_numel", weight.numel()))
        layer = experts.get(id(weight))
        if layer is not None:
            size *= layer.ep_size * (layer.last_top_k or known) / layer.num_experts
        total += size * (6 if weight.requires_grad else 4)
    heads = getattr(config, "num_attention_heads", 0)
    head_dim = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", 0) // max(1, heads))
    return total + 6.0 * getattr(config, "num_hidden_layers", 0) * heads * head_dim * seq_len


def peak_tflops() -> float | None:
    """Dense bf16 TFLOP/s of this GPU from its data sheet; `None` on a CPU or an unknown one."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", name)), None)
