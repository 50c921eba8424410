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

    def new_rows(self, rows: int, device: torch.device) -> torch.Tensor:
        """Buffer for dispatched rows, uint8 [R, stride], not initialised."""
        return torch.empty(rows, self.stride, dtype=torch.uint8, device=device)

    def new_gradient_rows(self, rows: int, device: torch.device) -> torch.Tensor:
        """Buffer for returning rows, uint8 [R, gradient_stride], not initialised."""
        return torch.empty(rows, self.gradient_stride, dtype=torch.uint8, device=device)

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
    typed = buffer.view(dtype)
    start = typed.storage_offset() + at // dtype.itemsize
    return typed.as_strided((typed.shape[0], width), (typed.stride(0), 1), start)


@functools.lru_cache(maxsize=64)
def row_format(hidden: int, top_k: int, dtype: torch.dtype) -> RowFormat:
    """The layout, made once for all calls with the same sizes: its numbers are worked out once too."""
    return RowFormat(hidden, top_k, dtype)
