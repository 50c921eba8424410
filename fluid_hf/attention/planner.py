"""How many pieces the heads of an attention layer are cut into, from numbers that are equal on all ranks."""

from __future__ import annotations

__all__ = ["choose_head_chunks", "travels_in_pieces"]

# Measured on an H200 (50 GB/s on the link; 32 host calls forward and 36 backward with one chunk, about 20 more with
# two), milliseconds forward / both ways with one, two and three chunks:
#
#     sent, layer, ranks            one            two            three
#     18 MiB  mixtral, 8        1.33 /  3.1    1.28 /  4.3    1.57 /  5.3
#     18 MiB  qwen3, 8          1.13 /  2.9    1.14 /  3.8    1.81 /  5.3
#     36 MiB  qwen3, 2          1.97 /  4.9    2.37 /  5.5    (two key/value heads)
#     40 MiB  mixtral, 2        2.20 /  5.4    2.33 /  5.4    2.36 /  5.6
#     70 MiB  mixtral, 8        4.37 / 11.6    3.85 / 10.6    3.70 / 10.5
#     70 MiB  qwen3, 8          4.09 / 10.9    3.64 / 10.0    3.53 /  9.8
#     144 MiB qwen3, 2          11.2 / 36.2    9.93 / 33.6    (two key/value heads)
#     160 MiB mixtral, 2        11.9 / 39.4    10.8 / 36.7    10.5 / 35.5
#
# Three are best wherever two are better than one; heads that cannot be cut in three are cut in two.
MIN_BYTES = 48 << 20
CHUNKS = 3

# With one chunk no core hides an exchange: between two ranks projections and weight gradients then hide what they can,
# for 10 host calls more forward and 16 backward. Computed, not measured, for 36 to 40 MiB: 0.09 to 0.17 ms less of 2.0
# to 2.2 forward, 0.2 to 0.5 of 4.9 to 5.4 both ways. With much less the host is what a call waits for.
MIN_BYTES_IN_PIECES = 24 << 20


def choose_head_chunks(num_bytes: int) -> int:
    """Pieces that the heads of a sequence-parallel attention layer are cut into, at most.

    Args:
        num_bytes: what a rank sends in a forward pass; equal on all ranks, as pieces of sequences are.
    """
    return CHUNKS if num_bytes >= MIN_BYTES else 1


def travels_in_pieces(num_bytes: int, chunks: int, size: int) -> bool:
    """Whether messages travel in two pieces of tokens, and own heads' gradients are used while others travel.

    Args:
        num_bytes: what a rank sends in a forward pass; equal on all ranks.
        chunks: of heads.
        size: ranks.
    """
    return size == 2 and chunks == 1 and num_bytes >= MIN_BYTES_IN_PIECES
