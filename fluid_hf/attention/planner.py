"""How many pieces the heads of an attention layer are cut into, from numbers that are equal on all ranks."""

from __future__ import annotations

__all__ = ["choose_head_chunks"]

# Below this many tokens the launches of a second chunk of attention heads cost more than it hides (an estimate).
MIN_TOKENS_PER_CHUNK = 4096
MAX_CHUNKS = 4


def choose_head_chunks(tokens: int) -> int:
    """Pieces that the heads of a sequence-parallel attention layer are cut into.

    Args:
        tokens: tokens of the whole sequences, equal on all ranks.
    """
    return 1 if tokens < MIN_TOKENS_PER_CHUNK else 2 if tokens < 4 * MIN_TOKENS_PER_CHUNK else MAX_CHUNKS
