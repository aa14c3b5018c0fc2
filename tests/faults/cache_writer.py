"""A process that writes to a cache, and what strikes it at one of its entries."""

from __future__ import annotations

import resource
import signal
import sys
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import ciphers
from torch import Tensor

from tests.unit.cache.conftest import IDENTITY, example, taps_of
from tidelock.cache import entry
from tidelock.cache.key import CacheKey
from tidelock.cache.store import ActivationCache
from tidelock.errors import TidelockError

# More than cache.json and identity.json have, and less than the entry that is refused.
_LARGEST_FILE = 2_000


def main(folder: Path, first: int, count: int, struck: int, fault: str, limit: int) -> None:
    """Put some examples once told so, and say how it ended.

    Args:
        folder: Has the cache and its key.
        first: Number of the first example.
        count: How many.
        struck: At which of them the fault strikes, whose entry is a large one.
        fault: What happens there.
        limit: Of the cache, in bytes; 0 is none.
    """
    _say("ready")
    sys.stdin.readline()
    cache = ActivationCache(folder / "cache", CacheKey.open(folder / "key"), IDENTITY, limit_bytes=limit or None)
    for number in range(first, first + count):
        if number == struck:
            _FAULTS[fault](folder)
        try:
            cache.put(example(number), large(number) if number == struck else taps_of(number))
        except TidelockError as error:
            _say(f"{type(error).__name__}: {error}")
            return
    _say("done")


def large(number: int) -> list[Tensor]:
    """Return tensors whose entry is written in several pieces."""
    return [tensor.repeat(1, 40_000) for tensor in taps_of(number)]


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _kill_in_mid_write(folder: Path) -> None:
    cipher, pieces = ciphers.Cipher, []

    class KillingCipher:
        """Encrypts, and kills the process where a third piece is to be written."""

        def __init__(self, *args: Any) -> None:
            self._inner: Any = cipher(*args)

        def encryptor(self) -> KillingCipher:
            self._inner = self._inner.encryptor()
            return self

        def authenticate_additional_data(self, data: bytes) -> None:
            self._inner.authenticate_additional_data(data)

        def update(self, data: bytes) -> bytes:
            pieces.append(len(data))
            if len(pieces) == 3:
                _kill_self(next((folder / "cache").rglob(".*.partial")))
            return bytes(self._inner.update(data))

    vars(entry)["Cipher"] = KillingCipher


def _kill_before_rename(_folder: Path) -> None:
    Path.replace = lambda path, _target: _kill_self(path)  # type: ignore[assignment,method-assign,return-value]


def _kill_self(partial: Path) -> None:
    _say(f"struck at {partial.stat().st_size}")
    signal.raise_signal(signal.SIGKILL)


def _limit_files(_folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_FILE, resource.RLIM_INFINITY))


_FAULTS = {"mid-write": _kill_in_mid_write, "before-rename": _kill_before_rename, "limit": _limit_files}

if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], int(sys.argv[6]))
