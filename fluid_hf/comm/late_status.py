"""What kernels find wrong where the host waits for nothing: it is told in host memory and looked at later."""

from __future__ import annotations

import torch
import torch.distributed as dist

from fluid_hf.comm.faults import GOOD, routing_error

__all__ = ["LateStatus"]


class LateStatus:
    """Status of one layer's router output where nothing is exchanged, so that no counts carry it.

    A kernel that reads the expert ids anyway writes to pinned memory, only if one is out of range. It costs no launch,
    no copy and no synchronisation; the error comes with the next call, or the end of the batch, that finds it written.
    """

    def __init__(self) -> None:
        self._flag: torch.Tensor | None = None

    def flag(self, device: torch.device) -> torch.Tensor:
        """Where the kernel writes: int32 [1], in host memory that a CUDA device can write."""
        if self._flag is None:
            with torch.inference_mode(False):  # kept: written and cleared in and outside of torch.inference_mode
                self._flag = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        return self._flag

    def check(self, layer: str) -> None:
        """Look at what the calls so far have left, as far as the device has come.

        Raises:
            RoutingError: on this rank; names it and the layer. Once.
        """
        if self._flag is None:
            return
        status = int(self._flag.item())  # host memory: waits for nothing
        if status != GOOD:
            self._flag.zero_()
            rank = dist.get_rank() if dist.is_initialized() else 0
            raise routing_error({rank: status}, layer, late=True)
