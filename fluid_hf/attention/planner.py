"""How many pieces the heads of an attention layer are cut into, from numbers that are equal on all ranks."""

from __future__ import annotations

__all__ = ["choose_head_chunks"]

# A chunk costs the host about as long as this takes on a link of 50 GB/s (an estimate).
MIN_BYTES_PER_CHUNK = 16 << 20
MAX_CHUNKS = 4


def choose_head_chunks(num_bytes: int) -> int:
    """Pieces that the heads of a sequence-parallel attention layer are cut into.

    Args:
        num_bytes: what a rank sends in a forward pass; equal on all ranks, as pieces of sequences are.
    """
    return max(1, min(num_bytes // MIN_BYTES_PER_CHUNK, MAX_CHUNKS))
