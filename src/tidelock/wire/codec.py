"""Tensors as bytes in parts of at most 1 MiB, written and read with every length checked.

A `Codec` says how the numbers of a tensor become bytes: as they are, or as integers with a scale a row, which is a
token. A reader always knows beforehand which tensor comes next; `TensorReader` takes memory for that one and refuses
anything else. May import errors, `wire` and libraries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, cast, final

import torch

from tidelock.errors import ConfigError, WireError
from tidelock.wire import tidelock_pb2 as pb
from tidelock.wire.limits import PART_BYTES
from tidelock.wire.quantise import Quantiser

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor


class Codec(Enum):
    """How the numbers of a tensor are written, by the name that options use; docs/protocol.md has the bytes."""

    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"

    @classmethod
    def from_pb(cls, number: int) -> Codec:
        """Return the codec for a number read from the wire.

        Raises:
            WireError: No codec has this number.
        """
        for codec in cls:
            if codec.to_pb() == number:
                return codec
        known = sorted(codec.to_pb() for codec in cls)
        msg = f"Wire codec: expected one of {known}, got {number}. Use the same version on both sides."
        raise WireError(msg)

    def to_pb(self) -> pb.Codec:
        """Return the wire's number for this codec."""
        return cast("pb.Codec", pb.Codec.Value(self.name))

    @property
    def is_integer(self) -> bool:
        """Whether numbers are written as integers, which can be rounded stochastically."""
        return self in _QUANTISERS

    def size_bytes(self, shape: tuple[int, ...]) -> int:
        """Return how many bytes a tensor of a shape takes; its last axis is a row."""
        count, width = _as_rows(shape)
        return count * self._row_bytes(width) if width else 0

    def ratio(self, widths: Iterable[int]) -> float:
        """Return how many times fewer bytes than fp32 it takes to send a row of each width, without framing."""
        widths = tuple(widths)
        return sum(4 * width for width in widths) / sum(self._row_bytes(width) for width in widths)

    def error_bound(self, width: int, *, stochastic: bool) -> float:
        """Return how large a row's error can be: the most that |x - decoded x| / |x| reaches, in the 2-norm.

        bf16 rounds each number by at most 2^-8 of it. An integer codec with L levels has a step of s = max|x| / L. To
        the nearest, a number is off by at most half a step and by no more than itself, so that the worst row has W - 1
        numbers of half a step beside one of L steps. Stochastically, a number next to zero can be off by a step.

        Args:
            width: Numbers in a row, W.
            stochastic: Whether rounding is.
        """
        if self is Codec.FP32:
            return 0.0
        if self is Codec.BF16:
            return 2.0**-8
        levels = _QUANTISERS[self].levels
        if stochastic:
            return math.sqrt(width - 1) / levels
        return math.sqrt((width - 1) / (4 * levels**2 + width - 1))

    def encode(self, what: str, tensor: Tensor, *, seed: tuple[int, ...] | None = None) -> Tensor:
        """Return the bytes of a tensor, uint8 of one axis, on the CPU.

        Args:
            what: The tensor's name in error messages.
            tensor: Of any floating dtype, on any device.
            seed: Rounds integers stochastically, always alike for one seed; None rounds to the nearest.

        Raises:
            NonFiniteError: It holds an infinite or undefined number, for which integers have no place.
        """
        if self in _DTYPES:
            return tensor.detach().to("cpu", _DTYPES[self]).contiguous().view(-1).view(torch.uint8)
        if not tensor.numel():
            return torch.empty(0, dtype=torch.uint8)
        x_NW = tensor.detach().to("cpu", torch.float32).reshape(_as_rows(tuple(tensor.shape)))
        return _QUANTISERS[self].encode(what, x_NW, seed)

    def decode(self, what: str, data: Tensor, shape: tuple[int, ...], rows: slice = slice(None)) -> Tensor:
        """Return the numbers of some rows, shape (rows, width): bf16 for that codec, else fp32.

        Args:
            what: The tensor's name in error messages.
            data: What `encode` returned for a tensor that is not empty.
            shape: Of that tensor.
            rows: Which rows are wanted.

        Raises:
            WireError: The bytes are none that `encode` can have returned.
        """
        count, width = _as_rows(shape)
        if self in _DTYPES:
            return data.view(_DTYPES[self]).view(count, width)[rows]
        return _QUANTISERS[self].decode(what, data, (count, width), rows)

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """Return the decoded form of a tensor without numbers."""
        return torch.empty(shape, dtype=_DTYPES.get(self, torch.float32))

    def _row_bytes(self, width: int) -> int:
        if self in _DTYPES:
            return width * _DTYPES[self].itemsize
        return _QUANTISERS[self].row_bytes(width)


_DTYPES = {Codec.FP32: torch.float32, Codec.BF16: torch.bfloat16}
_QUANTISERS = {Codec.INT8: Quantiser(levels=127, per_byte=1), Codec.INT4: Quantiser(levels=7, per_byte=2)}


@final
@dataclass(frozen=True, slots=True)
class Codecs:
    """What a device chooses for its passes.

    Attributes:
        activation: For embeddings, site inputs, site outputs and final states.
        gradient: For the gradients of the last three.
        stochastic: Whether both ends round gradients stochastically.
    """

    activation: Codec = Codec.FP32
    gradient: Codec = Codec.FP32
    stochastic: bool = False

    @classmethod
    def named(cls, codec: str, gradient_codec: str | None = None, *, stochastic_rounding: bool = False) -> Codecs:
        """Return the codecs with these names.

        Args:
            codec: For activations.
            gradient_codec: For gradients; None takes the same.
            stochastic_rounding: Round gradients stochastically.

        Raises:
            ConfigError: A name is none, or gradients are not integers but are to be rounded stochastically.
        """
        names = [codec.value for codec in Codec]
        for name in (codec, gradient_codec):
            if name is not None and name not in names:
                msg = f"Codec: expected one of {', '.join(names)}, got {name!r}. Choose one of those."
                raise ConfigError(msg)
        activation, gradient = Codec(codec), Codec(gradient_codec or codec)
        if stochastic_rounding and not gradient.is_integer:
            msg = (
                f"Stochastic rounding: expected gradients in int8 or int4, got {gradient.value}, which is rounded to "
                "the nearest. Choose another codec for gradients, or leave it out."
            )
            raise ConfigError(msg)
        return cls(activation, gradient, stochastic_rounding)


def rounding_seed(pass_seed: int | None, what: str, site: int) -> tuple[int, ...] | None:
    """Return the seed of one tensor's stochastic rounding, the same at every attempt of a pass.

    Args:
        pass_seed: The pass's own number; None rounds to the nearest.
        what: The tensor's kind.
        site: The site's number, where it belongs to one.
    """
    return None if pass_seed is None else (pass_seed, int.from_bytes(what.encode(), "little"), site)


@final
@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a tensor on the wire: a `TensorPart` whose data is not copied.

    Attributes:
        site: The site's number, where the tensor belongs to one.
        codec: The codec's number, in the first part only, else 0.
        shape: The tensor's shape, in the first part only, else empty.
        data: At most `PART_BYTES` bytes.
    """

    site: int
    codec: int
    shape: tuple[int, ...]
    data: memoryview


def write_parts(
    what: str, tensor: Tensor, codec: Codec, *, site: int = 0, seed: tuple[int, ...] | None = None
) -> Iterator[Part]:
    """Yield a tensor as parts, in order; arguments and errors as for `Codec.encode` and `split_parts`."""
    yield from split_parts(codec.encode(what, tensor, seed=seed), tuple(tensor.shape), codec, site=site)


def split_parts(encoded: Tensor, shape: tuple[int, ...], codec: Codec, *, site: int = 0) -> Iterator[Part]:
    """Yield an encoded tensor as parts, in order, their data not copied.

    Args:
        encoded: What `Codec.encode` returned.
        shape: Of the tensor.
        codec: The one that wrote it.
        site: The site's number, where the tensor belongs to one.
    """
    data = encoded.numpy().data
    yield Part(site, codec.to_pb(), shape, data[:PART_BYTES])
    for offset in range(PART_BYTES, len(data), PART_BYTES):
        yield Part(site, 0, (), data[offset : offset + PART_BYTES])


@final
class TensorReader:
    """Puts the parts of one expected tensor together.

    Args:
        what: Its name in error messages.
        shape: What the protocol says that it must have.
        codec: Likewise.
        site: The site's number, which every part must have.
    """

    def __init__(self, what: str, shape: tuple[int, ...], codec: Codec, *, site: int = 0) -> None:
        self._what = what
        self._shape = shape
        self._codec = codec
        self._site = site
        self._size = codec.size_bytes(shape)
        self._buffer: bytearray | None = None
        self._filled = 0

    @property
    def complete(self) -> bool:
        """Whether all parts have come."""
        return self._buffer is not None and self._filled == self._size

    def add(self, part: Part) -> None:
        """Take the next part.

        Raises:
            WireError: It belongs to another tensor, has another shape or codec, is too long, or brings nothing.
        """
        if part.site != self._site:
            self._refuse(f"site {self._site}", f"site {part.site}")
        if self._buffer is None:
            codec, shape = Codec.from_pb(part.codec), tuple(part.shape)
            if (codec, shape) != (self._codec, self._shape):
                self._refuse(f"{self._codec.value} of shape {self._shape}", f"{codec.value} of shape {shape[:8]}")
        elif part.shape or part.codec:
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
        """Return the finished tensor, on the CPU: bf16 for that codec, else fp32.

        Raises:
            WireError: Some parts have not come, or their bytes are none that the codec writes.
        """
        if self._buffer is None or not self.complete:
            self._refuse(f"{self._size} bytes", f"{self._filled} bytes")
        if not self._size:
            return self._codec.empty(self._shape)
        data = torch.frombuffer(self._buffer, dtype=torch.uint8)
        return self._codec.decode(self._what, data, self._shape).view(self._shape)

    def _refuse(self, expected: str, got: str) -> None:
        msg = f"Reading {self._what}: expected {expected}, got {got}. Use the same version on both sides."
        raise WireError(msg)


def _as_rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return how many rows a tensor has, and how many numbers a row."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1
