"""What a safetensors file says about itself: where each tensor lies, its dtype and its shape, all checked.

A model folder may come from a stranger, so nothing in a header is believed: lengths, offsets, dtypes and shapes are
checked against each other and against the file before a byte of a tensor is read. Not a reader of tensors (see
`checkpoint`). May import only `errors`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard, final

import torch

from tidelock.errors import ModelError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMENSIONS = 64  # what torch can hold
PIECE_BYTES = 16 * 2**20
_REMEDY = "Download or save the model again."

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class ByteFile(Protocol):
    """A file of known size that can be read in ranges, wherever it lies."""

    @property
    def name(self) -> str:
        """Its plain file name."""

    @property
    def label(self) -> str:
        """How to name the file to a person."""

    @property
    def size(self) -> int:
        """Its length in bytes."""

    def stream(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield exactly the bytes from ``start`` up to ``stop``, in pieces of at most ``PIECE_BYTES``.

        Raises:
            ModelError: The file cannot be read, is shorter, or has changed.
        """


@final
@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file on this disk, known by its size and time so that a change under our hands is noticed."""

    path: Path
    size: int
    mtime_ns: int

    @classmethod
    def at(cls, path: Path) -> LocalFile:
        """Return the file as it is now.

        Raises:
            ModelError: There is no regular file at the path.
        """
        if not path.is_file():
            msg = f"Model file: expected a file, got none ({path}). {_REMEDY}"
            raise ModelError(msg)
        stat = path.stat()
        return cls(path, stat.st_size, stat.st_mtime_ns)

    @property
    def name(self) -> str:
        """Its plain file name."""
        return self.path.name

    @property
    def label(self) -> str:
        """How to name the file to a person."""
        return str(self.path)

    def require_unchanged(self) -> None:
        """Check that the file on the disk is still the one that was opened.

        Raises:
            ModelError: It has another size or time, or is gone.
        """
        try:
            stat = self.path.stat()
        except OSError as error:
            raise self._unreadable(error) from error
        if (stat.st_size, stat.st_mtime_ns) != (self.size, self.mtime_ns):
            msg = f"Model file: expected it unchanged while in use, got another one ({self.path}). Start again."
            raise ModelError(msg)

    def stream(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield exactly the bytes from ``start`` up to ``stop``, in pieces of at most ``PIECE_BYTES``.

        Raises:
            ModelError: The file cannot be read, or has changed since it was opened.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                while start < stop and (piece := file.read(min(PIECE_BYTES, stop - start))):
                    start += len(piece)
                    yield piece
        except OSError as error:
            raise self._unreadable(error) from error
        if start < stop:
            msg = f"Model file: expected {self.size} bytes, got fewer ({self.path}). {_REMEDY}"
            raise ModelError(msg)
        self.require_unchanged()

    def _unreadable(self, error: OSError) -> ModelError:
        return ModelError(
            f"Model file: expected a readable file, got {error.strerror} ({self.path}). Check that it is there and "
            "that you may read it."
        )


@final
@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies in its file.

    Args:
        dtype: The format's own name of the dtype, a key of ``DTYPES``.
        shape: Its dimensions; empty for a scalar.
        start: Offset of its first byte in the file.
        stop: Offset past its last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_layout(file: ByteFile) -> dict[str, StoredTensor]:
    """Return every tensor of a safetensors file by name, with all that its header claims checked.

    Raises:
        ModelError: The file is not safetensors, is cut short, or its header contradicts itself or the file.
    """
    if file.size < 8:
        raise _malformed(file, "at least 8 bytes", f"{file.size}")
    length = int.from_bytes(_read(file, 0, 8), "little")
    if length > MAX_HEADER_BYTES:
        raise _malformed(file, f"a header of at most {MAX_HEADER_BYTES} bytes", f"{length}")
    if 8 + length > file.size:
        raise _malformed(file, f"a header within its {file.size} bytes", f"{length} bytes of header")
    header = parse_json_object(_read(file, 8, 8 + length), f"header of {file.label}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _malformed(file, "an object as __metadata__", type(metadata).__name__)
    tensors = {name: _tensor(file, name, entry, 8 + length) for name, entry in header.items()}
    _check_cover(file, tensors, 8 + length)
    return tensors


def parse_json_object(content: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object in these bytes, in which no key may come twice.

    Raises:
        ModelError: The bytes are not UTF-8 JSON, not an object, or repeat a key.
    """
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_distinct_keys)
    except (ValueError, RecursionError) as error:
        msg = f"Model file: expected JSON without repeated keys, got something else ({where}). {_REMEDY}"
        raise ModelError(msg) from error
    if not isinstance(value, dict):
        msg = f"Model file: expected a JSON object, got {type(value).__name__} ({where}). {_REMEDY}"
        raise ModelError(msg)
    return value


def short(name: str) -> str:
    """Return a tensor's name fit for a message: quoted, and cut when somebody made it endless."""
    return repr(name if len(name) <= 120 else f"{name[:120]}...")


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        msg = "a key is repeated"
        raise ValueError(msg)
    return result


def _tensor(file: ByteFile, name: str, entry: object, data_start: int) -> StoredTensor:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _malformed(file, f"a dtype of {', '.join(DTYPES)}", short(str(dtype)), name)
    if not _is_sizes(shape):
        raise _malformed(file, "a shape of whole numbers", short(str(shape)), name)
    if not _is_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= file.size - data_start:
        expected = f"two rising offsets within {file.size - data_start} bytes of data"
        raise _malformed(file, expected, short(str(offsets)), name)
    begin, end = offsets
    expected_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != expected_bytes:
        raise _malformed(file, f"as many bytes as {dtype} {short(str(shape))} needs", f"{end - begin}", name)
    return StoredTensor(dtype, tuple(shape), data_start + begin, data_start + end)


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    # `type(...) is int` because True is an int to isinstance; the bounds keep the product of a hostile shape cheap.
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        return False
    return all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_cover(file: ByteFile, tensors: dict[str, StoredTensor], data_start: int) -> None:
    """Refuse overlaps, holes and a tail: the format allows none, and each could hide bytes from a hash."""
    position = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != position:
            expected = f"its data at byte {position}, where the tensor before it ends"
            raise _malformed(file, expected, f"{tensor.start}", name)
        position = tensor.stop
    if position != file.size:
        raise _malformed(file, f"{position} bytes, the end of its last tensor", f"{file.size}")


def _read(file: ByteFile, start: int, stop: int) -> bytes:
    return b"".join(file.stream(start, stop))


def _malformed(file: ByteFile, expected: str, got: str, name: str | None = None) -> ModelError:
    subject = "Safetensors file" if name is None else f"Tensor {short(name)}"
    return ModelError(f"{subject}: expected {expected}, got {got} ({file.label}). {_REMEDY}")
