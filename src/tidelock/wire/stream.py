"""Reads and writes the messages of a Pass stream, in protobuf's own encoding, with their tensor data copied once.

Protobuf's Python code copies a message's bytes three times on its way out and as often on its way in; at some hundred
megabytes a step that was half of what the wire cost. A tensor part is one length-delimited field (`TensorPart`) in a
message whose last inner field is the data, so it is joined and split here; everything else goes through protobuf.

Encoding: https://protobuf.dev/programming-guides/encoding/. May import errors, `wire` and libraries.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast, final

import torch
from google.protobuf.message import DecodeError

from tidelock.errors import WireError
from tidelock.wire import tidelock_pb2 as pb
from tidelock.wire.codec import Codec, Part, split_parts

if TYPE_CHECKING:
    from google.protobuf.message import Message

_VARINT = 0
_LENGTH_DELIMITED = 2
_DATA_FIELD = pb.TensorPart.DESCRIPTOR.fields_by_name["data"].number
_DATA_TAG = bytes([_DATA_FIELD << 3 | _LENGTH_DELIMITED])
_LONGEST_HEADER = 256


@final
@dataclass(frozen=True, slots=True)
class Incoming:
    """A message that came.

    Attributes:
        field: Which of the oneof it is, or None for an empty message.
        body: A `Part` for a tensor, protobuf's message otherwise.
        size_bytes: Its size on the stream.
    """

    field: str | None
    body: Any
    size_bytes: int


def write_part(kind: type[Message], field: str, part: Part) -> bytes:
    """Return the encoded `kind(field=part)`.

    Args:
        kind: `DeviceMessage` or `CloudMessage`.
        field: Which of its oneof; a `TensorPart`.
        part: The tensor's part.
    """
    return b"".join((_head(kind, field, part), part.data))


@functools.cache
def tensor_bytes(kind: type[Message], field: str, shape: tuple[int, ...], codec: Codec, site: int = 0) -> int:
    """Return the bytes of all messages that carry a tensor of a shape; arguments as for `write_part`, `split_parts`."""
    # Memory that nobody writes to is not taken.
    parts = split_parts(torch.empty(codec.size_bytes(shape), dtype=torch.uint8), shape, codec, site=site)
    return sum(len(_head(kind, field, part)) + len(part.data) for part in parts)


def _head(kind: type[Message], field: str, part: Part) -> bytes:
    """Return what `write_part` writes ahead of the data."""
    codec = cast("pb.Codec", part.codec)
    header = pb.TensorPart(site=part.site, codec=codec, shape=part.shape).SerializeToString()
    inner = b"".join((header, _DATA_TAG, _varint(len(part.data))))
    tag = kind.DESCRIPTOR.fields_by_name[field].number << 3 | _LENGTH_DELIMITED
    return b"".join((_varint(tag), _varint(len(inner) + len(part.data)), inner))


def read_message(kind: type[Message], frame: bytes) -> Incoming:
    """Return a message that came, its tensor data not copied.

    Args:
        kind: `DeviceMessage` or `CloudMessage`.
        frame: Its bytes, of at most the size that gRPC lets through.

    Raises:
        WireError: The bytes are no such message.
    """
    try:
        return _read_part(kind, frame) or _read_any(kind, frame)
    except DecodeError as error:
        msg = f"Reading a message: expected a {kind.DESCRIPTOR.name}, got {len(frame)} bytes that are none."
        raise WireError(msg) from error


def _read_any(kind: type[Message], frame: bytes) -> Incoming:
    message = kind.FromString(frame)
    field = message.WhichOneof("body")
    return Incoming(field, getattr(message, field) if field else None, len(frame))


def _read_part(kind: type[Message], frame: bytes) -> Incoming | None:
    """Return a message that is one tensor part and nothing else, written as `write_part` writes it, or None."""
    tag, start = _read_varint(frame, 0)
    length, start = _read_varint(frame, start)
    field = kind.DESCRIPTOR.fields_by_number.get(tag >> 3)
    if (
        field is None
        or tag & 7 != _LENGTH_DELIMITED
        or field.message_type is not pb.TensorPart.DESCRIPTOR
        or start + length != len(frame)
    ):
        return None
    header_end = _find_data(frame, start)
    size, data_start = _read_varint(frame, header_end + 1)
    if not header_end or data_start + size != len(frame):
        return None
    header = pb.TensorPart.FromString(frame[start:header_end])
    part = Part(header.site, header.codec, tuple(header.shape), memoryview(frame)[data_start:])
    return Incoming(field.name, part, len(frame))


def _find_data(frame: bytes, at: int) -> int:
    """Return where the data's tag is, behind the header's few small fields, or 0 when it is not there."""
    end = min(len(frame), at + _LONGEST_HEADER)
    while at < end:
        tag = frame[at]
        if tag == _DATA_TAG[0]:
            return at
        number, at = _read_varint(frame, at + 1)
        if tag & 7 == _LENGTH_DELIMITED:
            at += max(number, 0)
        elif tag & 7 != _VARINT:
            return 0
    return 0


def _varint(number: int) -> bytes:
    """Return a number, at least 0, as protobuf writes it: seven bits a byte, the lowest first."""
    digits = bytearray()
    while number >= 0x80:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)


def _read_varint(frame: bytes, at: int) -> tuple[int, int]:
    """Return the number written at a place and the place behind it; a malformed one is no number of ours."""
    number = 0
    for shift in range(0, 35, 7):
        if at >= len(frame):
            break
        digit = frame[at]
        at += 1
        number |= (digit & 0x7F) << shift
        if digit < 0x80:
            return number, at
    return -1, at
