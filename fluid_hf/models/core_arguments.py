"""What transformers' attention functions see of whole sequences and their layer, besides the masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

__all__ = ["CoreLayer", "core_arguments"]


class CoreLayer:
    """The layer as the core attention sees it: its own config, and as many heads (and sinks) as there are here."""

    def __init__(self, module: nn.Module, config: Any, group: int | None, sinks: Any = None) -> None:
        self._module, self.config = module, config
        if group is not None:
            self.num_key_value_groups = group
        if sinks is not None:
            self.sinks = sinks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def core_arguments(implementation: str, positions: torch.Tensor, batch: int) -> dict[str, Any]:
    """Keyword arguments of the core attention, the same for all layers of a forward pass.

    Flash attention tells packed samples apart by their lengths. transformers reads these from the positions in every
    layer, and the device is waited for each time; here once. As in transformers, samples packed into several sequences
    of a batch are not told apart by flash attention.

    Args:
        implementation: name of the attention function.
        positions: [B or 1, T] of the whole sequences.
        batch: B.
    """
    if not implementation.startswith("flash_attention"):
        return {"position_ids": positions}
    packed = batch == 1 and bool((positions.diff() != 1).any())  # host synchronisation, once per forward pass
    if not packed:
        return {"position_ids": None}
    lengths, longest = prepare_fa_kwargs_from_position_ids(positions)
    most = int(longest[0])  # host synchronisation, once per forward pass with packed samples
    return {
        "position_ids": None,
        "cu_seq_lens_q": lengths[0],
        "cu_seq_lens_k": lengths[1],
        "max_length_q": most,
        "max_length_k": most,
    }
