"""One entry as bytes: the tensors of an example, encrypted, with everything checked on the way back.

    4 bytes     b"TLC1"
    4 bytes     the codec's name
    12 bytes    nonce, random
    the rest    AES-256-GCM of the plain text, with a tag of 16 bytes

The plain text is the number of tensors and each one's rows and width (little-endian uint32), then their numbers as the
codec writes them. The entry's name and what stands before the nonce are authenticated with it, so that no entry can
pass for another. Of one key 2**32 entries may be written before random nonces are too likely to meet (NIST SP 800-38D,
section 8.3).

May import errors, `wire.codec` and libraries.
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import IO, TYPE_CHECKING, NoReturn

import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from tidelock.errors import ConfigError, NonFiniteError, WireError
from tidelock.wire.codec import Codec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryptography.hazmat.primitives.ciphers import AEADDecryptionContext
    from torch import Tensor

# How the numbers of entries can be written.
CODECS = (Codec.FP32, Codec.BF16, Codec.INT8)
_MAGIC = b"TLC1"
_CODEC_BYTES, _NONCE_BYTES, _TAG_BYTES = 4, 12, 16
_HEAD_BYTES = len(_MAGIC) + _CODEC_BYTES + _NONCE_BYTES
_COUNT, _SHAPE = struct.Struct("<I"), struct.Struct("<II")
_MOST_TENSORS = 4096
# Of one tensor, so that its length is one that every library takes.
_MOST_BYTES = 1 << 30
_PIECE_BYTES = 1 << 20
# Older versions of cryptography want room for a block, less one byte, behind what they decrypt.
_SLACK_BYTES = 15


class DamagedEntryError(Exception):
    """The bytes are not what was written under this name; the cache computes the entry again."""


def entry_bytes(shapes: Sequence[tuple[int, int]], codec: Codec) -> int:
    """Return how many bytes an entry of tensors of these shapes takes."""
    plain = _COUNT.size + _SHAPE.size * len(shapes) + sum(codec.size_bytes(shape) for shape in shapes)
    return _HEAD_BYTES + plain + _TAG_BYTES


def check_tensors(tensors: Sequence[Tensor], codec: Codec) -> None:
    """Refuse what an entry cannot keep.

    Args:
        tensors: Each of shape (rows, width), of any floating dtype, on any device; none of both may be empty.
        codec: How their numbers are to be written.

    Raises:
        ConfigError: A tensor has another shape or dtype, there are too many, or one is too large.
        NonFiniteError: A number is infinite or undefined, whatever the codec.
    """
    if not 1 <= len(tensors) <= _MOST_TENSORS:
        msg = f"Caching an example: expected 1 to {_MOST_TENSORS} tensors, got {len(tensors)}. Tap other blocks."
        raise ConfigError(msg)
    for number, tensor in enumerate(tensors):
        what, shape = f"Caching tensor {number} of an example", tuple(tensor.shape)
        if len(shape) != 2 or not tensor.is_floating_point():
            msg = (
                f"{what}: expected floating-point numbers of shape (rows, width), got {tensor.dtype} of shape {shape}. "
                "Pass one example at a time."
            )
            raise ConfigError(msg)
        if codec.size_bytes(shape) > _MOST_BYTES:
            msg = f"{what}: expected at most {_MOST_BYTES} bytes, got {codec.size_bytes(shape)}. Cut long examples."
            raise ConfigError(msg)
        if tensor.numel() and not all(bool(extreme.isfinite()) for extreme in tensor.detach().aminmax()):
            msg = f"{what}: expected finite numbers, got an infinite or undefined one. Look for damaged weights."
            raise NonFiniteError(msg)


def encode(tensors: Sequence[Tensor], codec: Codec) -> list[bytes | memoryview]:
    """Return the plain text of an entry, in pieces; tensors as `check_tensors` lets pass."""
    shapes = b"".join(_SHAPE.pack(*tensor.shape) for tensor in tensors)
    numbers = (codec.encode("a tap", tensor).numpy().data for tensor in tensors if tensor.numel())
    return [_COUNT.pack(len(tensors)) + shapes, *numbers]


def write_entry(file: IO[bytes], plain: Sequence[bytes | memoryview], codec: Codec, key: bytes, name: str) -> None:
    """Write an entry, encrypted under a fresh nonce.

    Args:
        file: Open for writing.
        plain: What `encode` returned.
        codec: How its numbers are written.
        key: 32 bytes.
        name: The entry's name.

    Raises:
        OSError: The file system refused.
    """
    head, nonce = _MAGIC + codec.value.encode().ljust(_CODEC_BYTES), os.urandom(_NONCE_BYTES)
    cipher = Cipher(algorithms.AES(key), modes.GCM(nonce)).encryptor()
    cipher.authenticate_additional_data(head + name.encode())
    file.write(head + nonce)
    for part in plain:
        for start in range(0, len(part), _PIECE_BYTES):
            file.write(cipher.update(part[start : start + _PIECE_BYTES]))
    file.write(cipher.finalize() + cipher.tag)


def read_entry(file: IO[bytes], key: bytes, name: str) -> tuple[Tensor, ...]:
    """Return an entry's tensors, on the CPU: bf16 for that codec, else fp32.

    The file is mapped and decrypted from there into the tensors, of which none leaves before all bytes are found right.

    Args:
        file: A file on a disk.
        key: 32 bytes.
        name: The entry's name.

    Raises:
        DamagedEntryError: The bytes were not written under this key and name.
        OSError: The file system refused.
    """
    if os.fstat(file.fileno()).st_size < _HEAD_BYTES + _COUNT.size + _TAG_BYTES:
        _refuse()  # before it is mapped, which nothing empty can be
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as stored:
        head, nonce = (
            bytes(stored[: len(_MAGIC) + _CODEC_BYTES]),
            bytes(stored[_HEAD_BYTES - _NONCE_BYTES : _HEAD_BYTES]),
        )
        codec = _codec(head)
        cipher = Cipher(algorithms.AES(key), modes.GCM(nonce, bytes(stored[-_TAG_BYTES:]))).decryptor()
        cipher.authenticate_additional_data(head + name.encode())
        shapes, start = _shapes(cipher, stored, codec)
        encoded = []
        for shape in shapes:
            size = codec.size_bytes(shape)
            plain = torch.empty(size + _SLACK_BYTES, dtype=torch.uint8)
            cipher.update_into(stored[start : start + size], plain.numpy().data)
            encoded.append(plain[:size])
            start += size
        try:
            cipher.finalize()
        except InvalidTag:
            _refuse()
    try:
        return tuple(_decode(data, shape, codec) for data, shape in zip(encoded, shapes, strict=True))
    except WireError:
        _refuse()


def as_stored(tensors: Sequence[Tensor], codec: Codec) -> tuple[Tensor, ...]:
    """Return what `read_entry` returns once they are written; tensors as `check_tensors` lets pass."""
    shapes = [(tensor.shape[0], tensor.shape[1]) for tensor in tensors]
    return tuple(
        _decode(codec.encode("a tap", tensor), shape, codec) for tensor, shape in zip(tensors, shapes, strict=True)
    )


def _decode(data: Tensor, shape: tuple[int, int], codec: Codec) -> Tensor:
    return codec.decode("a tap", data, shape) if len(data) else codec.empty(shape)


def _codec(head: bytes) -> Codec:
    for codec in CODECS:
        if head == _MAGIC + codec.value.encode().ljust(_CODEC_BYTES):
            return codec
    return _refuse()


def _shapes(cipher: AEADDecryptionContext, stored: memoryview, codec: Codec) -> tuple[Sequence[tuple[int, int]], int]:
    """Return the shapes of the tensors and where the first begins, when they fit what is stored to the byte.

    They are not known to be right yet: a changed one is found here, before it takes memory, or with the tag.
    """
    start = _HEAD_BYTES + _COUNT.size
    (count,) = _COUNT.unpack(cipher.update(stored[_HEAD_BYTES:start]))
    end = start + _SHAPE.size * count
    if count > _MOST_TENSORS or end + _TAG_BYTES > len(stored):
        _refuse()
    shapes = [(rows, width) for rows, width in _SHAPE.iter_unpack(cipher.update(stored[start:end]))]
    if entry_bytes(shapes, codec) != len(stored):
        _refuse()
    return shapes, end


def _refuse() -> NoReturn:
    raise DamagedEntryError
