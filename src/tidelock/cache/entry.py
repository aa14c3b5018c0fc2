"""One entry as bytes: the tensors of an example, encrypted, with everything checked on the way back.

    4 bytes     b"TLC1"
    12 bytes    nonce, random
    the rest    AES-256-GCM of the plain text, with a tag of 16 bytes

The plain text is the number of tensors and each one's rows and width (little-endian uint32), then their numbers as the
codec writes them. What the entry is of and its name are authenticated with it, so that no entry can pass for another.
Of one key 2**32 entries may be written before random nonces are too likely to meet (NIST SP 800-38D, section 8.3).

May import errors, `wire.codec` and libraries.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tidelock.errors import WireError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from tidelock.wire.codec import Codec

_MAGIC = b"TLC1"
_NONCE_BYTES, _TAG_BYTES = 12, 16
_HEAD_BYTES = len(_MAGIC) + _NONCE_BYTES
_MOST_TENSORS = 4096


class DamagedEntryError(Exception):
    """The bytes are not what was written under this name; the cache computes the entry again."""


def entry_bytes(shapes: Sequence[tuple[int, int]], codec: Codec) -> int:
    """Return how many bytes an entry of tensors of these shapes takes."""
    return _HEAD_BYTES + _TAG_BYTES + 4 + 8 * len(shapes) + sum(codec.size_bytes(shape) for shape in shapes)


def seal(tensors: Sequence[Tensor], codec: Codec, key: bytes, label: bytes) -> bytes:
    """Return an entry's bytes.

    Args:
        tensors: Each of shape (rows, width), of any floating dtype, on any device.
        codec: How their numbers are written.
        key: 32 bytes.
        label: What the entry is of, and its name.

    Raises:
        NonFiniteError: A number is infinite or undefined, and the codec is one of integers.
    """
    shapes = b"".join(struct.pack("<II", *tensor.shape) for tensor in tensors)
    numbers = (codec.encode("a tap", tensor).numpy().tobytes() for tensor in tensors)
    plain = b"".join((struct.pack("<I", len(tensors)), shapes, *numbers))
    nonce = os.urandom(_NONCE_BYTES)
    return _MAGIC + nonce + AESGCM(key).encrypt(nonce, plain, _MAGIC + label)


def unseal(data: memoryview, codec: Codec, key: bytes, label: bytes) -> tuple[Tensor, ...]:
    """Return an entry's tensors: bf16 for that codec, else fp32; arguments as for `seal`.

    Raises:
        DamagedEntryError: The bytes were not written under this key for this label.
    """
    if len(data) < _HEAD_BYTES + _TAG_BYTES + 4 or data[: len(_MAGIC)] != _MAGIC:
        raise DamagedEntryError
    try:
        plain = AESGCM(key).decrypt(data[len(_MAGIC) : _HEAD_BYTES], data[_HEAD_BYTES:], _MAGIC + label)
    except InvalidTag as error:
        raise DamagedEntryError from error
    return _read(plain, codec)


def _read(plain: bytes, codec: Codec) -> tuple[Tensor, ...]:
    (count,) = struct.unpack_from("<I", plain)
    start = 4 + 8 * count
    if count > _MOST_TENSORS or start > len(plain):
        raise DamagedEntryError
    shapes = [struct.unpack_from("<II", plain, 4 + 8 * index) for index in range(count)]
    if start + sum(codec.size_bytes(shape) for shape in shapes) != len(plain):
        raise DamagedEntryError
    tensors, whole = [], bytearray(plain)
    for shape in shapes:
        size = codec.size_bytes(shape)
        if not size:
            tensors.append(codec.empty(shape))
            continue
        part = torch.frombuffer(whole, dtype=torch.uint8, count=size, offset=start)
        try:
            # A copy: what follows a tensor in the buffer must not stay in memory with it, and begins anywhere.
            tensors.append(codec.decode("a tap", part.clone(), shape))
        except WireError as error:
            raise DamagedEntryError from error
        start += size
    return tuple(tensors)
