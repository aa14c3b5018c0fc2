"""Rows of numbers as small integers with one scale a row, and back.

Symmetric absmax quantisation by row, that is by token (LLM.int8(), arXiv 2208.07339): x = s q, where the scale s is the
row's largest absolute value divided by `levels`, and q is an integer from -levels to levels. With a seed q is rounded
stochastically, up or down with the probability that makes the expectation of s q equal to x (Gupta et al., arXiv
1502.02551).

Bytes: the scales of all rows, 4 bytes each, fp32; then the integers of all rows. A scale is fp32 because fp16 ends at
65504 and bf16 would have to be rounded up, or clip the row's largest number; two bytes more are under 1 % of a row of
576 numbers at 4 bits, and fp32 has a scale for every row of fp32.

Shapes: N rows (tokens), W numbers in each, P bytes in each. May import errors and libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
import torch

from tidelock.errors import NonFiniteError, WireError

if TYPE_CHECKING:
    from torch import Tensor

_SCALE_BYTES = 4
# A normal number whose inverse is one too. Rows with numbers below `levels` times it are as good as zero.
SMALLEST_SCALE = 2.0**-125
# Stochastic rounding draws so many bits a number: the expectation is right to half of 2**-16 of a step.
_DITHER_BITS = 16


@final
@dataclass(frozen=True, slots=True)
class Quantiser:
    """One width of integers.

    Attributes:
        levels: The largest integer; the smallest is its negative.
        per_byte: Integers in a byte: 1, or 2 with the even-numbered one in the low four bits.
    """

    levels: int
    per_byte: int

    def row_bytes(self, width: int) -> int:
        """Return the bytes of a row of W numbers with its scale; half a byte of a row of odd width is left zero."""
        return _SCALE_BYTES + -(-width // self.per_byte)

    def encode(self, what: str, x_NW: Tensor, seed: tuple[int, ...] | None) -> Tensor:
        """Return the bytes of rows, uint8 of one axis.

        Args:
            what: The tensor's name in error messages.
            x_NW: fp32 on the CPU, neither axis empty.
            seed: Fixes every stochastic choice; None rounds to the nearest integer, and halves to the even one.

        Raises:
            NonFiniteError: A number is infinite or not a number.
        """
        count, width = x_NW.shape
        absmax_N1 = torch.maximum(x_NW.amax(1, keepdim=True), x_NW.amin(1, keepdim=True).neg_())
        if not bool(torch.isfinite(absmax_N1).all()):
            msg = (
                f"Sending a {what}: expected finite numbers, got an infinite or undefined one, for which integers on "
                "the wire have no place. The optimizer was not moved. Lower the learning rate, or look for damaged "
                "examples or weights."
            )
            raise NonFiniteError(msg)
        scale_N1 = absmax_N1.div_(self.levels).clamp_(SMALLEST_SCALE, self._largest_scale)
        y_NW = _round(x_NW, scale_N1.reciprocal(), seed, self.levels)
        data = torch.empty(count * self.row_bytes(width), dtype=torch.uint8)
        data[: count * _SCALE_BYTES].view(torch.float32).copy_(scale_N1[:, 0])
        bytes_NP = data[count * _SCALE_BYTES :].view(count, -1)
        if self.per_byte == 1:
            bytes_NP.view(torch.int8).copy_(y_NW)
        else:
            _pack(y_NW, bytes_NP)
        return data

    def decode(self, what: str, data: Tensor, shape: tuple[int, int], rows: slice = slice(None)) -> Tensor:
        """Return the numbers of some rows, fp32.

        Args:
            what: The tensor's name in error messages.
            data: What `encode` returned for all rows.
            shape: N and W.
            rows: Which rows are wanted.

        Raises:
            WireError: The bytes are none that `encode` can have returned.
        """
        count, width = shape
        scale_N1 = data[: count * _SCALE_BYTES].view(torch.float32)[rows, None]
        if not bool(((scale_N1 >= SMALLEST_SCALE) & (scale_N1 <= self._largest_scale)).all()):
            _refuse(what, f"scales from {SMALLEST_SCALE:.3g} to {self._largest_scale:.3g}", "another")
        bytes_NP = data[count * _SCALE_BYTES :].view(count, -1)[rows]
        q_NW = bytes_NP.view(torch.int8) if self.per_byte == 1 else _unpack(what, bytes_NP, width)
        if int(q_NW.amin()) < -self.levels:
            _refuse(what, f"integers from {-self.levels} to {self.levels}", f"{-self.levels - 1}")
        return q_NW.to(torch.float32).mul_(scale_N1)

    @property
    def _largest_scale(self) -> float:
        """Return the scale of the largest numbers that fp32 has, less what could make their product overflow."""
        return float(torch.tensor(torch.finfo(torch.float32).max / self.levels * (1 - 2.0**-22)))


def _round(x_NW: Tensor, inverse_N1: Tensor, seed: tuple[int, ...] | None, levels: int) -> Tensor:
    """Return each row times its factor, rounded to integers, fp32."""
    if seed is None:
        return (x_NW * inverse_N1).round_()
    # To the nearest after a shift by less than half a step, uniformly drawn, is stochastic rounding. Shifts are odd
    # multiples of 2**-17, never half a step: integers stay what they are.
    drawn = np.random.SFC64(np.random.SeedSequence(seed)).random_raw(-(-x_NW.numel() * _DITHER_BITS // 64))
    shift = torch.from_numpy(drawn.view(np.int16)[: x_NW.numel()]).to(torch.float32)
    shift_NW = shift.add_(0.5).mul_(2.0**-_DITHER_BITS).view(x_NW.shape)
    return shift_NW.addcmul_(x_NW, inverse_N1).round_().clamp_(-levels, levels)


def _pack(y_NW: Tensor, bytes_NP: Tensor) -> None:
    """Write integers from -7 to 7, two a byte; as 16-bit numbers, which are shifted faster than every other byte."""
    width = y_NW.shape[1]
    q_NW = torch.zeros(len(y_NW), width + width % 2, dtype=torch.int8)
    q_NW[:, :width].copy_(y_NW)
    pairs_NP = q_NW.view(torch.int16)
    bytes_NP.copy_((pairs_NP & 0x0F).bitwise_or_((pairs_NP >> 4).bitwise_and_(0xF0)))


def _unpack(what: str, bytes_NP: Tensor, width: int) -> Tensor:
    """Return the integers, int8 of shape (N, W), from -8 to 7."""
    wide_NP = bytes_NP.to(torch.int16)
    pairs_NP = ((wide_NP & 0xF0) << 4).bitwise_or_(wide_NP.bitwise_and_(0x0F))
    q_NW = pairs_NP.view(torch.int8).bitwise_xor_(8).sub_(8)
    if width % 2 and bool(q_NW[:, -1].any()):
        _refuse(what, "an empty half byte at the end of each row", "a number there")
    return q_NW[:, :width]


def _refuse(what: str, expected: str, got: str) -> None:
    msg = f"Reading {what}: expected {expected}, got {got}. Use the same version on both sides."
    raise WireError(msg)
