"""Which attention heads go to which rank. Pure functions on integers.

Query heads are split evenly and in order. A rank gets the key/value heads its query heads use: with at least as many
key/value heads as ranks these are split too, with fewer they are replicated (grouped-query attention).
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

from fluid_hf.errors import ConfigError

__all__ = ["HeadChunk", "HeadLayout", "heads_at", "plan_heads", "wide_steps"]

VECTOR = 8  # elements of one wide access of a kernel


@dataclass(frozen=True)
class HeadChunk:
    """Heads that travel together: the same positions within every rank's share.

    Attributes:
        q: first and last-plus-one of a rank's own query heads.
        kv: first and last-plus-one of a rank's own key/value heads that travel with them.
        used: those that the query heads use; a chunk may use key/value heads that came with an earlier one.
    """

    q: tuple[int, int]
    kv: tuple[int, int]
    used: tuple[int, int]

    @functools.cached_property
    def num_q(self) -> int:
        """Query heads of the chunk on one rank."""
        return self.q[1] - self.q[0]

    @functools.cached_property
    def num_kv(self) -> int:
        """Key/value heads that travel with the chunk to one rank."""
        return self.kv[1] - self.kv[0]


@dataclass(frozen=True)
class HeadLayout:
    """Heads of one attention layer over the ranks of a sequence-parallel group.

    Attributes:
        num_heads, num_kv_heads: heads of the layer.
        sp_size: ranks.
        kv_heads: for each rank, the key/value heads it gets, in order.
    """

    num_heads: int
    num_kv_heads: int
    sp_size: int
    kv_heads: tuple[tuple[int, ...], ...]

    @functools.cached_property
    def local_q(self) -> int:
        """Query heads per rank."""
        return self.num_heads // self.sp_size

    @functools.cached_property
    def local_kv(self) -> int:
        """Key/value heads per rank, replicas included."""
        return len(self.kv_heads[0])

    @functools.cached_property
    def group(self) -> int:
        """Query heads that share one key/value head on a rank."""
        return self.local_q // self.local_kv

    @functools.cached_property
    def replicated(self) -> bool:
        """Whether a key/value head goes to more than one place."""
        return self.sp_size * self.local_kv != self.num_kv_heads

    def bytes_sent(self, tokens: int, head_dim: int, element_size: int) -> int:
        """Bytes that a rank with `tokens` tokens sends in a forward pass: queries, keys, values, and results back."""
        return (self.sp_size - 1) * tokens * 2 * (self.local_q + self.local_kv) * head_dim * element_size

    def kv_index(self) -> list[int]:
        """The key/value heads in the order in which they travel: by rank."""
        return [head for heads in self.kv_heads for head in heads]

    def chunks(self, wanted: int) -> tuple[HeadChunk, ...]:
        """Cut every rank's heads into at most `wanted` chunks: equal ones, or three of which the middle is the largest.

        What the first chunk takes to arrive and the last one's results to return is hidden by no other chunk's core, so
        of three chunks the ends are a quarter or less. With several key/value heads per rank each chunk has its own;
        with one, it travels with the first chunk. Several per rank that are replicas stay together.
        """
        heads = self.local_q if self.local_kv == 1 else 1 if self.replicated else self.local_kv
        ends = [0]
        if wanted == 3 and heads >= 3:
            edge = max(1, heads // 4)
            ends += [edge, heads - edge, heads]
        else:
            count = max(n for n in range(1, max(1, wanted) + 1) if heads % n == 0)
            ends += [(index + 1) * heads // count for index in range(count)]
        each, chunks = self.local_q // heads, []
        for first, last in itertools.pairwise(ends):
            if self.local_kv > 1:
                kv = used = (0, self.local_kv) if heads == 1 else (first, last)
            else:
                kv, used = ((0, 1) if first == 0 else (1, 1)), (0, 1)
            chunks.append(HeadChunk((first * each, last * each), kv, used))
        return tuple(chunks)


def plan_heads(num_heads: int, num_kv_heads: int, sp_size: int) -> HeadLayout:
    """The layout for a layer.

    Raises:
        ConfigError: `num_heads` is not divisible by `sp_size`; names the sizes that fit.
    """
    if num_heads % sp_size:
        fitting = [n for n in range(2, num_heads + 1) if num_heads % n == 0]
        raise ConfigError(
            f"num_attention_heads ({num_heads}) must be divisible by sp_size ({sp_size}); "
            f"use sp_size {' or '.join(map(str, fitting))}."
        )
    local_q, group = num_heads // sp_size, num_heads // num_kv_heads
    per_q = [tuple(head // group for head in range(r * local_q, (r + 1) * local_q)) for r in range(sp_size)]
    distinct = [tuple(sorted(set(heads))) for heads in per_q]
    count = len(distinct[0])
    even = all(
        len(heads) == count and local_q % count == 0 and per_q[r] == _repeat(heads, local_q // count)
        for r, heads in enumerate(distinct)
    )
    # Where a rank's query heads do not share key/value heads evenly, each query head gets a replica of its own.
    return HeadLayout(num_heads, num_kv_heads, sp_size, tuple(distinct if even else per_q))


@functools.lru_cache(maxsize=256)
def heads_at(
    batch: int, tokens: int, columns: int, dim: int, num_q: int, num_kv: int
) -> tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...]:
    """Sizes, strides and first element of a chunk's queries, keys and values on the wire, as the core takes them.

    Args:
        columns: of a chunk for one rank.
        dim: of a head.
    """
    counts, starts = (num_q, num_kv, num_kv), (0, num_q, num_q + num_kv)
    strides = (tokens * columns, dim, columns, 1)
    found = [((batch, n, tokens, dim), strides, start * dim) for n, start in zip(counts, starts, strict=True)]
    return tuple(found if num_kv else found[:1])


@functools.lru_cache(maxsize=256)
def wide_steps(dim: int, *strides: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Divisor of gradients' strides, and those of sequences, heads and tokens divided by it; 0 if heads are no vectors.

    Triton loads wide what it knows to be aligned; the steps are run-time values, so it is told their divisor.
    """
    if any(of[3] != 1 for of in strides):
        return 0, ()
    steps = [step for of in strides for step in of[:3]]
    unit = VECTOR if dim % (2 * VECTOR) == 0 and all(step % VECTOR == 0 for step in steps) else 1
    return unit, tuple(step // unit for step in steps)


def _repeat(heads: tuple[int, ...], times: int) -> tuple[int, ...]:
    return tuple(head for head in heads for _ in range(times))
