"""Memory of a small model's training step on one rank of a sequence-parallel group.

The ranks of the group are a mirror link's, which this process plays the first of; each holds as much as any other, as
every rank computes attention for as many heads of as many tokens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fluid_hf.bench.mirror import init_mirror
from fluid_hf.comm.peer_exchange import PeerExchange
from fluid_hf.config import FluidConfig
from fluid_hf.patching import patch_model

__all__ = ["MEMORY_MODELS", "StepMemory", "measure_step", "memory_table"]

MIB = 2**20
MEMORY_MODELS: dict[str, dict[str, int]] = {
    "small": {
        "hidden_size": 1024,
        "moe_intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 8192,
    },
    "tiny": {
        "hidden_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 96,
    },
}


@dataclass(frozen=True)
class StepMemory:
    """What one rank holds, in MiB.

    Attributes:
        model: one of `MEMORY_MODELS`.
        sp_size: ranks that share the sequence.
        tokens: tokens of the whole sequence.
        held: weights, gradients and optimizer states: the same on every group size.
        activations: the most that forward, loss and backward hold besides; 0 on a CPU, where nobody counts it.
        saved: what autograd keeps from forward for backward, without the weights.
    """

    model: str
    sp_size: int
    tokens: int
    held: float
    activations: float
    saved: float


def measure_step(name: str, sp_size: int, tokens: int, device: torch.device) -> StepMemory:
    """One rank's memory in a training step of one sequence, in bfloat16 on a GPU and float32 on a CPU."""
    if sp_size > 1:
        init_mirror(sp_size)
    try:
        model = _build(name, tokens, device)
        patch_model(model, FluidConfig(ep_size=1, sp_size=sp_size))
        if sp_size > 1:
            model.fluid.sequence.gather = functools.partial(_whole_positions, tokens)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
        ids = torch.randint(1, MEMORY_MODELS[name]["vocab_size"], (1, tokens), device=device)
        _backward(model, ids)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # held from now on: what comes on top is the step's own
        held = sum(parameter.nbytes for parameter in model.parameters()) * 2
        held += sum(s.nbytes for state in optimizer.state.values() for s in state.values() if torch.is_tensor(s))
        activations = 0.0
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            _backward(model, ids)
            torch.cuda.synchronize()
            activations = (torch.cuda.max_memory_allocated() - before) / MIB
        saved = _saved_bytes(model, ids) / MIB
    finally:
        if sp_size > 1:
            dist.destroy_process_group()
    return StepMemory(name, sp_size, tokens, held / MIB, activations, saved)


def memory_table(report: dict[str, Any]) -> str:
    """One line per length and group size; at its end how many times less than in the first group, ideally `sp_size`."""
    heads = ["model", "tokens", "sp_size", "tokens per rank", "held", "activations", "saved", "times less"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    first: dict[Any, Any] = {}
    for cell in report["cells"]:
        base = first.setdefault((cell["model"], cell["tokens"]), cell)
        ratios = (f"{base[key] / cell[key]:.2f}" if cell[key] else "-" for key in ("activations", "saved"))
        numbers = (f"{cell[key]:.1f} MiB" if cell[key] else "-" for key in ("held", "activations", "saved"))
        columns = [cell["model"], str(cell["tokens"]), str(cell["sp_size"]), str(cell["tokens"] // cell["sp_size"])]
        lines.append("| " + " | ".join([*columns, *numbers, " / ".join(ratios)]) + " |")
    return "\n".join(lines)


def _build(name: str, tokens: int, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(**MEMORY_MODELS[name], max_position_embeddings=tokens, use_cache=False)  # type: ignore[arg-type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    return model.train()


def _whole_positions(tokens: int, piece: torch.Tensor, exchange: PeerExchange) -> torch.Tensor:
    """What a real group's ranks would hold together; a mirror's all hold this rank's piece."""
    return torch.arange(tokens, device=piece.device, dtype=piece.dtype).expand(piece.shape[0], -1)


def _loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    shard = model.fluid.shard_batch({"input_ids": ids, "labels": ids})
    loss: torch.Tensor = model.fluid.sequence_loss(model(**shard).logits, shard["shift_labels"])
    return loss


def _backward(model: Any, ids: torch.Tensor) -> None:
    _loss(model, ids).backward()
    model.fluid.finish_batch()


def _saved_bytes(model: nn.Module, ids: torch.Tensor) -> int:
    """Bytes of the storages that autograd keeps, each counted once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = _loss(model, ids)
    total = sum(kept.values())
    loss.backward()
    model.fluid.finish_batch()  # type: ignore[operator, union-attr]
    return total
