"""How many pieces the heads of an attention layer are cut into, from numbers that are equal on all ranks."""

from __future__ import annotations

__all__ = ["choose_head_chunks", "travels_in_pieces"]

# Measured on an H200 (41 to 50 GB/s on the link), milliseconds forward / both ways with one, two and three chunks:
#
#     sent, layer, ranks            one            two            three
#     18 MiB  mixtral, 8        1.18 /  2.9    1.44 /  3.5    1.78 /  5.2
#     18 MiB  qwen3, 8          1.11 /  3.1    1.42 /  3.9    1.98 /  4.8
#     36 MiB  qwen3, 2          1.89 /  4.7    1.58 /  4.4    (two key/value heads)
#     40 MiB  mixtral, 2        1.96 /  4.9    1.69 /  4.7    1.60 /  5.0
#     70 MiB  mixtral, 8        4.23 / 11.5    3.80 / 10.6    3.67 / 10.4
#     70 MiB  qwen3, 8          4.11 / 11.0    3.66 / 10.1    3.58 /  9.9
#     144 MiB qwen3, 2          10.6 / 35.3    9.79 / 33.5    (two key/value heads)
#     160 MiB mixtral, 2        11.4 / 37.6    10.7 / 36.3    10.4 / 35.6
#
# Each chunk costs the host about as much as the first one, whatever the link: below that a call waits for the host. So
# what counts is how long the bytes take. More than two ranks were not measured between 18 and 70 MiB; there a straight
# line crosses at about 40. Heads that cannot be cut in three are cut in two. Over NVLink between two H200s (270 GB/s)
# 36 MiB take 0.14 ms: two chunks lost 1.4 ms of 8.0 in two layers of Qwen3-30B against one all-to-all.
USUAL_SPEED = 46e9  # bytes per second of the table, and of a link that nobody measured
MIN_SECONDS, CHUNKS = (48 << 20) / USUAL_SPEED, 3
MIN_SECONDS_OF_TWO_RANKS = (32 << 20) / USUAL_SPEED

# With one chunk no core hides an exchange: between two ranks projections and weight gradients then hide what they can,
# for 10 host calls more forward and 16 backward. Computed, not measured alone, for 36 to 40 MiB: 0.09 to 0.17 ms less
# forward, 0.2 to 0.5 both ways; two chunks gain more where heads can be cut. With much less the host is what a call
# waits for.
MIN_SECONDS_IN_PIECES = (24 << 20) / USUAL_SPEED


def choose_head_chunks(num_bytes: int, size: int, speed: float | None = None) -> int:
    """Pieces that the heads of a sequence-parallel attention layer are cut into, at most.

    Args:
        num_bytes: what a rank sends in a forward pass; equal on all ranks, as pieces of sequences are.
        size: ranks.
        speed: of the link, in bytes per second and direction, equal on all ranks; `None` if it was not measured.
    """
    seconds = num_bytes / (speed or USUAL_SPEED)
    if seconds >= MIN_SECONDS:
        return CHUNKS
    return 2 if size == 2 and seconds >= MIN_SECONDS_OF_TWO_RANKS else 1


def travels_in_pieces(num_bytes: int, chunks: int, size: int, speed: float | None = None) -> bool:
    """Whether messages travel in two pieces of tokens, and own heads' gradients are used while others travel.

    Args:
        num_bytes: what a rank sends in a forward pass; equal on all ranks.
        chunks: of heads.
        size: ranks.
        speed: as for `choose_head_chunks`.
    """
    return size == 2 and chunks == 1 and num_bytes / (speed or USUAL_SPEED) >= MIN_SECONDS_IN_PIECES
