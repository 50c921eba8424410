"""How many waves an exchange is cut into, from numbers that are equal on all ranks."""

from __future__ import annotations

from fluid_hf.comm.tournament import num_rounds

__all__ = ["choose_waves"]

# Below this many pairs per expert and wave, small GEMMs cost more than the overlap gains (measured on an H100).
MIN_PAIRS_PER_EXPERT = 256
MAX_WAVES = 4


def choose_waves(*, expected_tokens: int, top_k: int, num_experts: int, ep_size: int) -> int:
    """Number of waves for one layer.

    Every rank must pass the same numbers: waves that differ between ranks would not match.

    Args:
        expected_tokens: tokens per rank the choice is made for.
        top_k: experts per token.
        num_experts: experts of the whole layer.
        ep_size: ranks that share them.
    """
    if ep_size < 2:
        return 1
    arriving = expected_tokens * top_k * (ep_size - 1) / num_experts  # pairs from other ranks per local expert
    fitting = int(arriving // MIN_PAIRS_PER_EXPERT)
    # Never more waves than rounds: cutting one peer's rows costs more launches than it hides (measured at ep_size 2).
    return max(1, min(fitting, MAX_WAVES, num_rounds(ep_size)))
