"""Wire format of a dispatched row: hidden state, local expert ids and routing weights side by side in one message.

Legend: R rows, H hidden size, K experts per token. A row is `stride` bytes: H elements, padding to 8 bytes,
K expert ids (int16, -1 for "not here"), padding to 8 bytes, K routing weights (float32, or float64 for float64 rows),
padding to 16 bytes. A returning row of gradients has the same layout without ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["RowFormat"]


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

    @property
    def weight_dtype(self) -> torch.dtype:
        """Type of the routing weights and their gradients on the wire."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def _ids_at(self) -> int:
        return _align(self.hidden * self.dtype.itemsize, 8)

    @property
    def _weights_at(self) -> int:
        return _align(self._ids_at + self.top_k * 2, 8)

    @property
    def stride(self) -> int:
        """Bytes of one dispatched row."""
        return _align(self._weights_at + self.top_k * self.weight_dtype.itemsize, 16)

    @property
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
        return buffer.view(self.dtype)[:, : self.hidden]

    def ids_of(self, buffer: torch.Tensor) -> torch.Tensor:
        """View int16 [R, K] of the local expert ids in a buffer of dispatched rows."""
        start = self._ids_at // 2
        return buffer.view(torch.int16)[:, start : start + self.top_k]

    def weights_of(self, buffer: torch.Tensor) -> torch.Tensor:
        """View [R, K] of the routing weights in a buffer of dispatched rows."""
        return self._trailing(buffer, self._weights_at)

    def weight_gradients_of(self, buffer: torch.Tensor) -> torch.Tensor:
        """View [R, K] of the routing-weight gradients in a buffer of returning rows."""
        return self._trailing(buffer, self._ids_at)

    def _trailing(self, buffer: torch.Tensor, at: int) -> torch.Tensor:
        start = at // self.weight_dtype.itemsize
        return buffer.view(self.weight_dtype)[:, start : start + self.top_k]
