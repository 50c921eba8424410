"""Launching Triton kernels at the cost of the driver call.

Triton's own launch path looks at every argument anew (20 us a launch where the driver needs 5, measured on an H100
host). Here the compiled kernel is kept by what it was compiled for, and launched directly.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = [
    "RAGGED",
    "Kernel",
    "blocks_of",
    "can_describe",
    "describe",
    "describe_ragged",
    "distance_between",
    "new_int32",
    "power_of_two",
    "together",
]

RAGGED = tl.constexpr(2**30)  # see `describe_ragged`

# Versions whose compiled kernels take (grid, stream, function, metadata, hooks, arguments); others are launched through
# the public `compiled[grid](...)`, at twice the time.
DIRECT_VERSIONS = ("3.3", "3.4", "3.5", "3.6")
# Versions whose C launcher takes (grid, stream, function, flags, scratch memory, metadata, hooks, arguments).
NATIVE_VERSIONS = ("3.6",)
_ADDRESS_OF, _TYPE_OF = torch.Tensor.data_ptr, operator.attrgetter("dtype")


Grid = tuple[int, int, int]
Launch = Callable[[Grid, Any, list[Any], tuple[int, ...]], None]


def blocks_of(size: int, block: int) -> int:
    """Blocks that cover `size`."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << max(0, size - 1).bit_length()


@functools.cache
def _has_described_blocks(device: int | None) -> bool:
    return device is None or not torch.cuda.is_available() or torch.cuda.get_device_capability(device) == (9, 0)


def can_describe(tensor: torch.Tensor) -> bool:
    """Whether the copy engine can load and store blocks of a contiguous tensor, by a `TensorDescriptor`.

    Rows then start at multiples of 16 bytes, on the devices where the kernels that use it were measured. Float32 is
    left to the kernels that are exact in small tiles.
    """
    if tensor.dtype == torch.float32 or not _has_described_blocks(tensor.device.index):
        return False
    return (tensor.data_ptr() | tensor.shape[-1] * tensor.element_size()) & 15 == 0


def describe(
    base: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...]
) -> TensorDescriptor:
    """Describes blocks of a tensor that `can_describe`; Triton checks the numbers (plain ones) once for all tensors."""
    made: TensorDescriptor = object.__new__(TensorDescriptor)
    vars(made).update(_checked_fields(base.dtype, shape, strides, block), base=base)
    return made


def describe_ragged(tensor_SN: torch.Tensor, rows: int, columns: int, distance: int | None = None) -> TensorDescriptor:
    """Descriptor of the rows before any `end`, in blocks; what is read behind it is zero.

    Its first two places are `RAGGED` and `end`, its third counts rows from `RAGGED` before `end`: the strides bring
    `RAGGED` twice to nothing, as addresses wrap at 2**64, and the bound of the third place is the bound of the rows.
    The way of Triton's `ragged_tma`. With `distance` a second tensor lies so many elements behind; a place before the
    others says which one is read.
    """
    stride, most = tensor_SN.stride(0), 0x7FFF0000
    # The launcher takes nothing but plain integers.
    shape, strides = (most, most, RAGGED.value, tensor_SN.shape[1]), (2**34 - stride, stride, stride, 1)
    if distance is None:
        return describe(tensor_SN, shape, strides, (1, 1, rows, columns))
    return describe(tensor_SN, (2, *shape), (distance, *strides), (1, 1, 1, rows, columns))


def distance_between(first: torch.Tensor, second: torch.Tensor) -> int | None:
    """Elements from one tensor to another, where a descriptor can take it as a stride, which has 40 bits of bytes."""
    apart = second.data_ptr() - first.data_ptr()
    return apart // first.element_size() if abs(apart) < 2**40 else None


@functools.lru_cache(maxsize=256)
def _checked_fields(dtype: torch.dtype, *sizes: tuple[int, ...]) -> dict[str, Any]:
    return vars(TensorDescriptor(torch.empty(0, dtype=dtype, device="cpu"), *map(list, sizes)))


Layout = tuple[int, list[tuple[tuple[int, ...], tuple[int, ...], int]]]


def together(scratch: int, *shapes: tuple[int, ...]) -> Layout:
    """How vectors and tables lie behind `scratch` numbers that are none of theirs, for `new_int32`."""
    places, end = [], (scratch + 3) & -4
    for shape in shapes:
        places.append((shape, (*shape[1:], 1), end))  # the stride of a row is the number of columns; a vector has none
        end += (math.prod(shape) + 3) & -4
    return end, places


def new_int32(device: torch.device, layout: Layout) -> list[torch.Tensor]:
    """Vectors and tables in one allocation, which costs the host less than one each; aligned to 16 bytes.

    First comes the allocation itself, which begins with the scratch numbers.
    """
    room = torch.empty(layout[0], dtype=torch.int32, device=device)
    return [room, *[room.as_strided(*place) for place in layout[1]]]


class Kernel:
    """A Triton kernel whose parameters are ordered: pointers, descriptors, integers known at run time only, constants.

    The run-time integers must be declared `do_not_specialize`, so that one compiled kernel serves all their values.

    Args:
        function: the `triton.jit` function.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._compiled: dict[Any, Launch] = {}
        version = ".".join(triton.__version__.split(".")[:2])
        self._direct, self._native = version in DIRECT_VERSIONS, version in NATIVE_VERSIONS

    def __call__(
        self,
        grid: Grid,
        pointers: tuple[torch.Tensor, ...],
        integers: tuple[int, ...],
        constants: tuple[Any, ...],
        num_warps: int = 4,
        num_stages: int = 3,
        descriptors: tuple[TensorDescriptor, ...] = (),
    ) -> None:
        """Queue the kernel on the current stream.

        Args:
            grid: programs along each axis, all at least 1.
            pointers: tensors on one CUDA device.
            integers: below 2**31.
            constants: compile-time values; each new combination compiles.
            num_stages: pipeline stages of the loops over products.
            descriptors: of tensors that the copy engine reads or writes in blocks, from `describe`.
        """
        addresses: list[Any] = [*map(_ADDRESS_OF, pointers)]
        # Triton compiles wide accesses for pointers that are multiples of 16: one test tells if all are.
        bits = functools.reduce(operator.or_, addresses)
        aligned = () if bits & 15 == 0 else tuple([address & 15 == 0 for address in addresses])
        device = pointers[0].get_device()
        if device >= 0 and device != torch._C._cuda_getDevice():  # of a model whose layers are on several devices
            with torch.cuda.device(device):
                self(grid, pointers, integers, constants, num_warps, num_stages, descriptors)
            return
        key: tuple[Any, ...] = (device, num_warps, num_stages, constants, aligned, *map(_TYPE_OF, pointers))
        places: tuple[Any, ...] = pointers
        if descriptors:
            key = (*key, *[(of.base.dtype, *of.block_shape) for of in descriptors])
            places = (*pointers, *descriptors)
            addresses += descriptors
        launch = self._compiled.get(key)
        if launch is None:
            options = {"num_warps": num_warps, "num_stages": num_stages}
            compiled = self._function[grid](*places, *integers, *constants, **options)
            if compiled is not None:  # Triton's interpreter compiles nothing
                self._compiled[key] = self._launcher(compiled, device, constants)
            return
        launch(grid, places, addresses, integers)

    def _launcher(self, compiled: Any, device: int, constants: tuple[Any, ...]) -> Launch:
        """Launches a compiled kernel by the shortest way that this version of Triton has."""
        current_stream = torch._C._cuda_getCurrentRawStream if self._direct else None
        run = getattr(compiled, "run", None)
        scratch = getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1)
        if current_stream is None or run is None:

            def public(grid: Grid, pointers: Any, addresses: list[Any], integers: tuple[int, ...]) -> None:
                compiled[grid](*pointers, *integers, *constants)

            return public
        function, metadata = compiled.function, compiled.packed_metadata
        if self._native and not scratch:
            native, flags = run.launch, (run.launch_cooperative_grid, run.launch_pdl)
            fixed = (function, *flags, None, None, metadata, None, None, None)

            def direct(grid: Grid, pointers: Any, addresses: list[Any], integers: tuple[int, ...]) -> None:
                native(*grid, current_stream(device), *fixed, *addresses, *integers, *constants)

            return direct

        def through_python(grid: Grid, pointers: Any, addresses: list[Any], integers: tuple[int, ...]) -> None:
            known = (current_stream(device), function, metadata, None, None, None)
            run(*grid, *known, *addresses, *integers, *constants)

        return through_python
