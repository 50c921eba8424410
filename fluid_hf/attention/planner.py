"""How many pieces the heads of an attention layer are cut into, from numbers that are equal on all ranks."""

from __future__ import annotations

__all__ = ["choose_head_chunks"]

# A second chunk costs the host some 35 calls (0.3 to 0.5 ms on the H100 host of the README) and hides about half of
# what crosses the link: at 44 GB/s that is as long from 16 MiB a chunk on. Computed, not measured. More than two chunks
# gained nothing (measured with 32k tokens on 2 and 8 ranks).
MIN_BYTES_PER_CHUNK = 16 << 20
MAX_CHUNKS = 2


def choose_head_chunks(num_bytes: int) -> int:
    """Pieces that the heads of a sequence-parallel attention layer are cut into.

    Args:
        num_bytes: what a rank sends in a forward pass; equal on all ranks, as pieces of sequences are.
    """
    return max(1, min(num_bytes // MIN_BYTES_PER_CHUNK, MAX_CHUNKS))
