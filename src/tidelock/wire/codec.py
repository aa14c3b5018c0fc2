"""Tensors as raw little-endian bytes in parts of at most 1 MiB, written and read with every length checked.

A reader always knows beforehand which tensor comes next; `TensorReader` takes memory for that one and refuses
anything else. May import errors, `wire` and libraries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch

from tidelock.errors import WireError
from tidelock.wire import tidelock_pb2 as pb
from tidelock.wire.limits import PART_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

# How a tensor may be written on the wire, by the name that options use.
WIRE_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

_DTYPE_OF_PB = {pb.FP32: torch.float32, pb.BF16: torch.bfloat16}
_PB_OF_DTYPE = {dtype: number for number, dtype in _DTYPE_OF_PB.items()}


def dtype_to_pb(dtype: torch.dtype) -> pb.DType:
    """Return the wire's number for a dtype that may cross."""
    return _PB_OF_DTYPE[dtype]


def dtype_from_pb(number: int) -> torch.dtype:
    """Return the dtype for a number read from the wire.

    Raises:
        WireError: No dtype has this number.
    """
    for known, dtype in _DTYPE_OF_PB.items():
        if known == number:
            return dtype
    msg = f"Wire dtype: expected one of {sorted(_DTYPE_OF_PB)}, got {number}. Use the same version on both sides."
    raise WireError(msg)


@final
@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a tensor on the wire: a `TensorPart` whose data is not copied.

    Attributes:
        block: The site's block, where the tensor belongs to a site.
        dtype: The dtype's number, in the first part only, else 0.
        shape: The tensor's shape, in the first part only, else empty.
        data: At most `PART_BYTES` bytes.
    """

    block: int
    dtype: int
    shape: tuple[int, ...]
    data: memoryview


def write_parts(tensor: Tensor, dtype: torch.dtype, *, block: int = 0) -> Iterator[Part]:
    """Yield a tensor as parts, in order.

    Args:
        tensor: Of any floating dtype, on any device.
        dtype: How its numbers are written.
        block: The site's block, where the tensor belongs to a site.
    """
    flat = tensor.detach().to("cpu", dtype).contiguous().view(-1)
    data = flat.view(torch.uint8).numpy().data
    yield Part(block, dtype_to_pb(dtype), tuple(tensor.shape), data[:PART_BYTES])
    for offset in range(PART_BYTES, len(data), PART_BYTES):
        yield Part(block, 0, (), data[offset : offset + PART_BYTES])


@final
class TensorReader:
    """Puts the parts of one expected tensor together.

    Args:
        what: Its name in error messages.
        shape: What the protocol says that it must have.
        dtype: Likewise.
        block: The site's block that every part must name.
    """

    def __init__(self, what: str, shape: tuple[int, ...], dtype: torch.dtype, *, block: int = 0) -> None:
        self._what = what
        self._shape = shape
        self._dtype = dtype
        self._block = block
        self._size = math.prod(shape) * dtype.itemsize
        self._buffer: bytearray | None = None
        self._filled = 0

    @property
    def complete(self) -> bool:
        """Whether all parts have come."""
        return self._buffer is not None and self._filled == self._size

    def add(self, part: Part) -> None:
        """Take the next part.

        Raises:
            WireError: It belongs to another tensor, has another shape or dtype, is too long, or brings nothing.
        """
        if part.block != self._block:
            self._refuse(f"block {self._block}", f"block {part.block}")
        if self._buffer is None:
            dtype, shape = dtype_from_pb(part.dtype), tuple(part.shape)
            if (dtype, shape) != (self._dtype, self._shape):
                self._refuse(f"{self._dtype} of shape {self._shape}", f"{dtype} of shape {shape[:8]}")
        elif part.shape or part.dtype:
            self._refuse("a further part of the same tensor", "the first part of another")
        data = part.data
        expected = min(PART_BYTES, self._size - self._filled)
        if len(data) != expected:
            self._refuse(f"a part of {expected} bytes", f"{len(data)} bytes")
        if self._buffer is None:
            self._buffer = bytearray(self._size)
        self._buffer[self._filled : self._filled + expected] = data
        self._filled += expected

    def tensor(self) -> Tensor:
        """Return the finished tensor, on the CPU.

        Raises:
            WireError: Some parts have not come.
        """
        if self._buffer is None or not self.complete:
            self._refuse(f"{self._size} bytes", f"{self._filled} bytes")
        if not self._size:
            return torch.empty(self._shape, dtype=self._dtype)
        return torch.frombuffer(self._buffer, dtype=self._dtype).view(self._shape)

    def _refuse(self, expected: str, got: str) -> None:
        msg = f"Reading {self._what}: expected {expected}, got {got}. Use the same version on both sides."
        raise WireError(msg)
