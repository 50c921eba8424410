"""Wire format of a dispatched row: hidden state, local expert ids and routing weights side by side in one message.

Legend: R rows, H hidden size, K experts per token. A row is `stride` bytes: H elements, padding to 8 bytes,
K expert ids (int16, -1 for "not here"), padding to 8 bytes, K routing weights (float32, or float64 for float64 rows),
padding to 16 bytes. A returning row of gradients has the same layout without ids.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

__all__ = ["RowFormat", "row_format"]


Whole = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # one buffer in the types of hidden states, ids, weights


def _align(size: int, to: int) -> int:
    return -(-size // to) * to


@dataclass(frozen=True)
class RowFormat:
    """Byte layout of one row.

    Args:
        hidden: H.
        top_k: K.
        dtype: element type of the hidden state.
    """

    hidden: int
    top_k: int
    dtype: torch.dtype

    @functools.cached_property
    def weight_dtype(self) -> torch.dtype:
        """Type of the routing weights and their gradients on the wire."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @functools.cached_property
    def _ids_at(self) -> int:
        return _align(self.hidden * self.dtype.itemsize, 8)

    @functools.cached_property
    def _weights_at(self) -> int:
        return _align(self._ids_at + self.top_k * 2, 8)

    @functools.cached_property
    def stride(self) -> int:
        """Bytes of one dispatched row."""
        return _align(self._weights_at + self.top_k * self.weight_dtype.itemsize, 16)

    @functools.cached_property
    def gradient_stride(self) -> int:
        """Bytes of one returning row: gradient of the hidden state, then of the routing weights."""
        return _align(self._ids_at + self.top_k * self.weight_dtype.itemsize, 16)

    @functools.cached_property
    def places(self) -> tuple[int, int, int, int, int]:
        """For kernels: row stride of hidden states, ids and weights, and where ids and weights begin, in elements."""
        size, weight = self.stride, self.weight_dtype.itemsize
        return size // self.dtype.itemsize, size // 2, size // weight, self._ids_at // 2, self._weights_at // weight

    def new_rows(self, rows: int, device: torch.device) -> torch.Tensor:
        """Buffer for dispatched rows, uint8 [R, stride], not initialised."""
        return torch.empty(rows, self.stride, dtype=torch.uint8, device=device)

    def new_gradient_rows(self, rows: int, device: torch.device) -> torch.Tensor:
        """Buffer for returning rows, uint8 [R, gradient_stride], not initialised."""
        return torch.empty(rows, self.gradient_stride, dtype=torch.uint8, device=device)

    def columns_of(self, whole: Whole, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states [R, H], routing weights and local expert ids [R, K] of dispatched rows [low, high)."""
        ids_at, weights_at = self.places[3:]
        hidden, ids, weights = whole
        return (
            _cut(hidden, 0, self.hidden, low, high),
            _cut(weights, weights_at, self.top_k, low, high),
            _cut(ids, ids_at, self.top_k, low, high),
        )

    def gradients_of(self, whole: tuple[torch.Tensor, ...], low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of hidden states [R, H] and routing weights [R, K] of returning rows [low, high)."""
        at = self._ids_at // self.weight_dtype.itemsize
        return _cut(whole[0], 0, self.hidden, low, high), _cut(whole[1], at, self.top_k, low, high)

    def whole_gradients_of(self, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returning rows as they are, in the types of the two gradients."""
        return buffer.view(self.dtype), buffer.view(self.weight_dtype)

    def whole_of(self, buffer: torch.Tensor) -> Whole:
        """Dispatched rows as they are, in the types of the hidden states, the ids and the routing weights."""
        return buffer.view(self.dtype), buffer.view(torch.int16), buffer.view(self.weight_dtype)

    def hidden_of(self, buffer: torch.Tensor) -> torch.Tensor:
        """View [R, H] of the hidden states (or their gradients) in a buffer of either kind."""
        return _part(buffer, self.dtype, 0, self.hidden)

    def ids_of(self, buffer: torch.Tensor) -> torch.Tensor:
        """View int16 [R, K] of the local expert ids in a buffer of dispatched rows."""
        return _part(buffer, torch.int16, self._ids_at, self.top_k)

    def weights_of(self, buffer: torch.Tensor) -> torch.Tensor:
        """View [R, K] of the routing weights in a buffer of dispatched rows."""
        return _part(buffer, self.weight_dtype, self._weights_at, self.top_k)

    def weight_gradients_of(self, buffer: torch.Tensor) -> torch.Tensor:
        """View [R, K] of the routing-weight gradients in a buffer of returning rows."""
        return _part(buffer, self.weight_dtype, self._ids_at, self.top_k)


def _part(buffer: torch.Tensor, dtype: torch.dtype, at: int, width: int) -> torch.Tensor:
    """`width` columns of type `dtype` that start `at` bytes into each row; cheaper for the host than a slice."""
    return _cut(buffer.view(dtype), at // dtype.itemsize, width, 0, buffer.shape[0])


def _cut(typed: torch.Tensor, at: int, width: int, low: int, high: int) -> torch.Tensor:
    """Columns from `at` on of rows [low, high)."""
    stride = typed.stride(0)
    return typed.as_strided((high - low, width), (stride, 1), typed.storage_offset() + low * stride + at)


@functools.lru_cache(maxsize=64)
def row_format(hidden: int, top_k: int, dtype: torch.dtype) -> RowFormat:
    """The layout, made once for all calls with the same sizes: its numbers are worked out once too."""
    return RowFormat(hidden, top_k, dtype)
