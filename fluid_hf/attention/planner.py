"""How many pieces the heads of an attention layer are cut into, from numbers that are equal on all ranks."""

from __future__ import annotations

__all__ = ["SERIAL", "choose_head_chunks"]

SERIAL = 0
# Measured on an H100 with a link of 44 GB/s each way: below, a chunk costs the host more than the overlap hides (18 to
# 73 MB: slower than plain all-to-alls), above it pays (151 MB: 1.2 times as fast); more than two chunks gain nothing.
MIN_BYTES = 96 << 20
MIN_BYTES_PER_CHUNK = 64 << 20
MAX_CHUNKS = 2


def choose_head_chunks(num_bytes: int, *, on_gpu: bool) -> int:
    """Pieces that the heads of a sequence-parallel attention layer are cut into; `SERIAL` for plain all-to-alls.

    Args:
        num_bytes: what a rank sends in a forward pass; equal on all ranks, as pieces of sequences are.
        on_gpu: whether the host queues kernels; on a CPU a chunk costs nothing extra.
    """
    if on_gpu and num_bytes < MIN_BYTES:
        return SERIAL
    return max(1, min(num_bytes // MIN_BYTES_PER_CHUNK, MAX_CHUNKS))
