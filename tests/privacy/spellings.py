"""How a text could be written in bytes that leave the device, and whether it is in some."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch


def spellings_of_text(text: str) -> dict[str, bytes]:
    """Return a text in every encoding in which it could slip out."""
    raw = text.encode()
    # Wherever in a longer text it stands, its base64 is one of three, apart from the letters at both ends.
    in_base64 = {f"base64 at {shift}": base64.b64encode(bytes(shift) + raw)[4:-4] for shift in range(3)}
    return {
        "utf-8": raw,
        "utf-16-le": text.encode("utf-16-le"),
        "utf-16-be": text.encode("utf-16-be"),
        "utf-32-le": text.encode("utf-32-le"),
        "hex": raw.hex().encode(),
        "HEX": raw.hex().upper().encode(),
        "reversed": raw[::-1],
        "escaped": b"".join(f"\\u{ord(letter):04x}".encode() for letter in text),
        **in_base64,
    }


def spellings_of_ids(ids: Sequence[int]) -> dict[str, bytes]:
    """Return a run of token ids in every type that holds them, as protobuf packs them, and as JSON."""
    packed = {
        f"{order}{code}": struct.pack(f"{order}{len(ids)}{code}", *ids)
        for order in "<>"
        for code in ("h", "i", "q", "f", "d")
    }
    return {
        **packed,
        "varint": b"".join(_varint(number) for number in ids),
        "json": ", ".join(map(str, ids)).encode(),
        "compact json": ",".join(map(str, ids)).encode(),
    }


def spellings_of_numbers(numbers: Sequence[float]) -> dict[str, bytes]:
    """Return a run of numbers in every floating-point type of 4 and 8 bytes, and each alone as text."""
    packed = {
        f"{order}{code}": struct.pack(f"{order}{len(numbers)}{code}", *numbers) for order in "<>" for code in "fd"
    }
    return {**packed, **{f"text {number}": str(number).encode() for number in numbers}}


def spellings_of_weights(tensors: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    """Return every row of every matrix, as fp32 and as bf16; rows of zeros left out."""
    return {
        f"{name}[{index}] {dtype}": row.to(dtype).view(torch.uint8).numpy().tobytes()
        for name, tensor in tensors.items()
        if tensor.dim() == 2
        for index, row in enumerate(tensor.contiguous())
        if bool(row.any())
        for dtype in (torch.float32, torch.bfloat16)
    }


def found(spellings: Mapping[str, bytes], places: Mapping[str, bytes]) -> list[str]:
    """Return which spelling is in which place."""
    return [f"{spelling} in {place}" for place, data in places.items() for spelling in _in(spellings, data)]


def _in(spellings: Mapping[str, bytes], data: bytes) -> Iterator[str]:
    return (name for name, spelling in spellings.items() if spelling in data)


def windows(ids: Sequence[int], width: int) -> Iterable[Sequence[int]]:
    """Return every run of so many of the ids."""
    return (ids[start : start + width] for start in range(len(ids) - width + 1))


def _varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])
