"""A batch whose sequences are cut over the ranks of a sequence-parallel group: its shards, positions and loss.

Rank s of S holds the s-th of S equal pieces of every sequence. Legend: B sequences, L tokens of each on a rank,
T = S * L tokens of the whole sequence, V vocabulary.

Gradient convention. Every rank's `backward()` gives S times its own tokens' share of the gradient of the loss over the
whole sequences. The mean over all ranks, which DeepSpeed (without an `mpu`), DistributedDataParallel and
`FluidState.reduce_gradients` take, is then the gradient that one process would have. It is what a loss gathered with
`torch.distributed.nn.functional.all_gather` gives too, as transformers' Trainer computes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from fluid_hf.attention.rotary import RotaryTables
from fluid_hf.comm.peer_exchange import PeerExchange
from fluid_hf.errors import ConfigError, RankMismatchError
from fluid_hf.process_groups import backend_of

__all__ = [
    "IGNORED_LABEL",
    "TOKENS",
    "ShardedSequence",
    "fill_up",
    "gather_sequence",
    "sequence_parallel_loss",
    "shard_batch",
]

IGNORED_LABEL = -100  # transformers' label of a token without a target
TOKENS = (
    "sequence_tokens"  # of a batch that was filled up: 1 for its tokens, 0 for padding; attention needs no such mask
)


@dataclasses.dataclass(frozen=True)
class ShardedSequence:
    """What the attention layers must know about the whole sequences of one forward pass.

    Attributes:
        position_ids: positions [B or 1, T] of all tokens, in order.
        masks: what the core attention takes as mask, by kind of layer (`full_attention`, `sliding_attention`).
        rotary: tables of the rotary embedding of all tokens; `None` if not needed.
        arguments: further keyword arguments of the core attention.
    """

    position_ids: torch.Tensor
    masks: Mapping[str, Any]
    rotary: RotaryTables | None = None
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def shard_batch(
    batch: Mapping[str, Any], exchange: PeerExchange, *, pad_token_id: int = 0, pad_to_multiple: bool = True
) -> dict[str, Any]:
    """This rank's piece of a batch that all ranks of the group hold whole. Collective over the group.

    Args:
        batch: `input_ids` [B, T] and, if wanted, `labels`, `attention_mask`, `position_ids`, other tensors [B, T, ...];
            everything else is passed on as it is. Equal on all ranks of the group.
        exchange: exchange of the sequence-parallel group.
        pad_token_id: fills up sequences whose length is not divisible by the group's size. Padding comes last, has no
            label and is seen by no other token.
        pad_to_multiple: `False` raises instead of filling up.

    Returns:
        The same keys with [B, L] tensors, `position_ids` always among them, `shift_labels` in place of `labels`
        (already shifted, since the next token may be on the next rank), and `sequence_sharded=True`.

    Raises:
        ConfigError: the length is not divisible by the group's size and must not be filled up; a tensor has another
            length than `input_ids`.
        RankMismatchError: the ranks of the group hold different batches.
    """
    if "input_ids" not in batch:
        raise ConfigError(f"batch keys ({', '.join(map(str, batch))}) must have 'input_ids' among them.")
    ids = batch["input_ids"]
    length = ids.shape[1]
    missing = -length % exchange.size
    if missing and not pad_to_multiple:
        raise ConfigError(
            f"sequence length ({length}) must be divisible by sp_size ({exchange.size}); add {missing} tokens of "
            "padding, or let shard_batch do it with pad_to_multiple=True."
        )
    _check_equal_batches(ids, exchange)
    whole = dict(batch)
    if whole.get("labels") is not None and whole["labels"].shape[:2] != ids.shape:
        raise ConfigError(
            f"labels (shape {tuple(whole['labels'].shape)}) must be the next tokens of input_ids (shape "
            f"{tuple(ids.shape)}); set sp_size 1 for other tasks."
        )
    if whole.get("labels") is not None and whole.get("shift_labels") is None:
        whole["shift_labels"] = functional.pad(whole["labels"], (0, 1), value=IGNORED_LABEL)[:, 1:]
    whole.pop("labels", None)
    piece = (length + missing) // exchange.size
    start = piece * exchange.rank
    shard = fill_up(whole, exchange.size, pad_token_id, mark_tokens=missing > 0)
    for name, value in shard.items():
        if _runs_along(value):
            shard[name] = value[:, start : start + piece].contiguous()
    shard["sequence_sharded"] = True
    return shard


def fill_up(
    batch: Mapping[str, Any], multiple: int, pad_token_id: int = 0, *, mark_tokens: bool = False
) -> dict[str, Any]:
    """The batch with `position_ids`, and with lengths that are a multiple: `input_ids` [B, T] and all that is as long.

    Padding comes last, has no label, counts positions on and is seen by no other token. With `mark_tokens` a batch
    without `attention_mask` gets `sequence_tokens` [B, T], for the balancing loss.

    Raises:
        ConfigError: a tensor has another length than `input_ids`.
    """
    ids = batch["input_ids"]
    length = ids.shape[1]
    missing = -length % multiple
    filled = dict(batch)
    if filled.get("position_ids") is None:
        filled["position_ids"] = torch.arange(length, device=ids.device).expand(ids.shape[0], -1).contiguous()
    if mark_tokens and filled.get("attention_mask") is None:
        filled[TOKENS] = torch.ones_like(ids)
    fillings = {"input_ids": pad_token_id, "labels": IGNORED_LABEL, "shift_labels": IGNORED_LABEL}
    for name, value in filled.items():
        if _runs_along(value):
            if value.shape[1] != length:
                raise ConfigError(
                    f"length of {name} ({value.shape[1]}) must equal that of input_ids ({length}); "
                    "leave out what does not run along the sequence, and shard it yourself."
                )
            filled[name] = _fill(name, value, missing, fillings.get(name, 0))
    return filled


def _runs_along(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() >= 2


def _fill(name: str, value: torch.Tensor, missing: int, filling: int) -> torch.Tensor:
    if not missing:
        return value
    if name == "position_ids":  # counts on, so that nothing looks like the start of another sample
        tail = value[:, -1:] + torch.arange(1, missing + 1, device=value.device)
        return torch.cat([value, tail.to(value.dtype)], dim=1)
    return functional.pad(value, (0, 0) * (value.dim() - 2) + (0, missing), value=filling)


def _check_equal_batches(ids: torch.Tensor, exchange: PeerExchange) -> None:
    weights = torch.arange(1, ids.numel() + 1, device=ids.device) % 8191
    checksum = (ids.reshape(-1).long() * weights).sum()
    if exchange.size == 1:
        return
    own = torch.tensor([*ids.shape, int(checksum)], device=_wire_device(ids, exchange))
    values = exchange.all_gather(own, "shard_batch")
    found = exchange.read(torch.stack(values), "shard_batch")  # host synchronisation: compared here
    shapes = [tuple(value) for value in found]
    for rank, value in enumerate(shapes):
        if value != shapes[0]:
            raise RankMismatchError(
                f"input_ids must be equal on all ranks of a sequence-parallel group: rank 0 of the group has shape "
                f"{shapes[0][:-1]}, rank {rank} has {value[:-1]}, or other tokens; give the same batch to all of them."
            )


def _wire_device(tensor: torch.Tensor, exchange: PeerExchange) -> torch.device:
    """Where a tensor must be for the group's collectives: a batch may still be on the host, unknown to NCCL."""
    if tensor.device.type == "cpu" and exchange.group is not None and not backend_of(exchange.group, "cpu"):
        return torch.device("cuda", torch.cuda.current_device())
    return tensor.device


def gather_sequence(local_BL: torch.Tensor, exchange: PeerExchange) -> torch.Tensor:
    """Pieces [B, L] of all ranks, one after the other: [B, T]. Collective over the group."""
    return torch.cat(exchange.all_gather(local_BL, "gathering the pieces of sequences"), dim=1)


class _SumOverRanks(torch.autograd.Function):
    """Sum over the group; each rank's gradient is that of the sum of the results on all ranks."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, exchange: PeerExchange) -> torch.Tensor:
        ctx.size = exchange.size
        total = value.detach().clone()
        exchange.all_reduce(total, "the loss of whole sequences")
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] * ctx.size, None


def sequence_parallel_loss(
    logits_BLV: torch.Tensor,
    shift_labels_BL: torch.Tensor,
    exchange: PeerExchange,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Mean cross-entropy over all labelled tokens of the whole sequences, equal on all ranks of the group.

    Args:
        logits_BLV: this rank's logits.
        shift_labels_BL: this rank's labels, already shifted (`shard_batch`); -100 for none.
        exchange: exchange of the sequence-parallel group. Collective over it.
        num_items_in_batch: labelled tokens to divide by instead (those of a whole step with gradient accumulation).

    Returns:
        Scalar float32. Its gradient follows the convention at the top of this module.
    """
    logits = logits_BLV.float().reshape(-1, logits_BLV.shape[-1])
    labels = shift_labels_BL.reshape(-1).to(logits.device)
    own = functional.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
    total = _SumOverRanks.apply(own, exchange)  # type: ignore[no-untyped-call]
    if num_items_in_batch is None:
        count = (labels != IGNORED_LABEL).sum()
        exchange.all_reduce(count, "the number of labels of whole sequences")
        num_items_in_batch = count.clamp(min=1)
    return total / num_items_in_batch  # type: ignore[no-any-return]
