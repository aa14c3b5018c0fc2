"""The activation cache on the disk: written once for each example, read in any order.

    cache.json                    says that the folder is a cache, and by what it knows its key
    <identity>/identity.json      what the entries below are of
    <identity>/<2 hex>/<64 hex>   one entry for each example; see `cache.entry`

An entry is written beside its place and renamed, so that it is whole or not there. One that is not what was written is
removed and counted, and its example is computed again. The idea is PAC's (doi 10.1145/3673038.3673043, section 4.2).

May import errors, `units`, `cache`, `wire.codec` and libraries.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import mmap
import os
import shutil
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from tidelock.cache.entry import DamagedEntryError, entry_bytes, seal, unseal
from tidelock.cache.identity import CacheIdentity, entry_name
from tidelock.errors import CacheError, ConfigError, StorageError
from tidelock.units import format_bytes
from tidelock.wire.codec import Codec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from tidelock.cache.key import CacheKey

_ABOUT, _IDENTITY = "cache.json", "identity.json"
_FORMAT = 1
_PARTIAL = ".partial-"
# What another process is writing is younger.
_STALE_SECONDS = 3600.0
# Left free on the disk, for whatever else is written there.
RESERVE_BYTES = 256 << 20
# Entries read ahead that wait to be asked for.
_MOST_AHEAD = 64


@final
class ActivationCache:
    """The entries of one identity in a cache's folder; safe to use from several threads and processes.

    Args:
        folder: Made when it is not there.
        key: Its secret.
        identity: What the entries are of.
        limit_bytes: The most that all entries of this folder may take; None leaves that to the disk.

    Attributes:
        hits: Entries that were there when asked for.
        misses: Entries that were not.
        damaged: Entries that were found damaged, and removed.

    Raises:
        CacheError: The folder is a cache with another key, or of another format.
        ConfigError: The folder holds something else, or the key.
        StorageError: The file system refused.
    """

    def __init__(self, folder: Path, key: CacheKey, identity: CacheIdentity, *, limit_bytes: int | None = None) -> None:
        self._folder = folder
        self._codec = Codec(identity.codec)
        self._identity = identity
        self._name_key, self._entry_key = key.derive("cache names"), key.derive("cache entries")
        self._limit_bytes = limit_bytes
        self._entries = folder / identity.digest.hex()[:32]
        self._lock = threading.Lock()
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="cache-read")
        self._ahead: OrderedDict[str, Future[tuple[Tensor, ...] | None]] = OrderedDict()
        self.hits = self.misses = self.damaged = 0
        open_folder(folder, key)
        try:
            self._entries.mkdir(exist_ok=True)
            _write(self._entries / _IDENTITY, json.dumps(asdict(identity), indent=2).encode())
            _remove_stale(folder)
            self._used = sum(size for _, size in entries_of(folder))
        except OSError as error:
            refusal = _refusal("Opening the cache", error, folder)
            raise refusal from error

    def __contains__(self, ids: Sequence[Sequence[int]]) -> bool:
        return self._path(ids).is_file()

    def missing(self, examples: Iterable[Sequence[Sequence[int]]]) -> Iterator[int]:
        """Yield the numbers of the examples that have no entry."""
        return (number for number, ids in enumerate(examples) if ids not in self)

    def get(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, ...] | None:
        """Return an example's tensors, each (rows, width); None when there is no entry, or only a damaged one."""
        path = self._path(ids)
        with self._lock:
            future = self._ahead.pop(path.name, None)
        tensors = self._read(path) if future is None else future.result()
        with self._lock:
            if tensors is None:
                self.misses += 1
            else:
                self.hits += 1
        return tensors

    def read_ahead(self, examples: Iterable[Sequence[Sequence[int]]]) -> None:
        """Begin to read entries that will soon be asked for; beyond a bounded number, none."""
        for ids in examples:
            path = self._path(ids)
            with self._lock:
                if path.name in self._ahead:
                    continue
                while len(self._ahead) >= _MOST_AHEAD:
                    self._ahead.popitem(last=False)[1].cancel()
                self._ahead[path.name] = self._readers.submit(self._read, path)

    def put(self, ids: Sequence[Sequence[int]], tensors: Sequence[Tensor]) -> None:
        """Write an example's entry; one that is there already is left as it is.

        Args:
            ids: Token ids of the example and whatever else its tensors depend on.
            tensors: Each of shape (rows, width).

        Raises:
            NonFiniteError: A number is infinite or undefined, and the codec is one of integers.
            StorageError: It would not leave enough room, within the limit or on the disk, or the file system refused.
        """
        path = self._path(ids)
        if path.is_file():
            return
        size = entry_bytes([(tensor.shape[0], tensor.shape[1]) for tensor in tensors], self._codec)
        with self._lock:
            self._require_room(size)
            self._used += size
        try:
            path.parent.mkdir(exist_ok=True)
            _write(path, seal(tensors, self._codec, self._entry_key, self._label(path)))
        except OSError as error:
            refusal = _refusal("Writing to the cache", error, self._folder)
            raise refusal from error

    def entry_bytes(self, shapes: Sequence[tuple[int, int]]) -> int:
        """Return how many bytes an entry of tensors of these shapes (rows, width) takes."""
        return entry_bytes(shapes, self._codec)

    def require_room(self, size_bytes: int) -> None:
        """Refuse, before anything is computed, what would not fit.

        Raises:
            StorageError: So many more bytes would not leave enough room, within the limit or on the disk.
        """
        with self._lock:
            self._require_room(size_bytes)

    def verify(self, *, remove: bool = False) -> tuple[int, list[Path]]:
        """Read every entry of this identity; return how many are right, and those that are damaged.

        Args:
            remove: Remove the damaged ones.
        """
        paths = [path for path, _ in entries_of(self._entries)]
        damaged = [path for path in paths if not self._is_right(path)]
        if remove:
            for path in damaged:
                path.unlink(missing_ok=True)
        return len(paths) - len(damaged), damaged

    def close(self) -> None:
        """Stop reading ahead."""
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _path(self, ids: Sequence[Sequence[int]]) -> Path:
        name = entry_name(self._identity, ids, self._name_key)
        return self._entries / name[:2] / name

    def _label(self, path: Path) -> bytes:
        return self._identity.digest + bytes.fromhex(path.name)

    def _read(self, path: Path) -> tuple[Tensor, ...] | None:
        try:
            return self._unseal(path)
        except FileNotFoundError:
            return None
        except DamagedEntryError:
            with self._lock:
                self.damaged += 1
            path.unlink(missing_ok=True)
            return None
        except OSError as error:
            refusal = _refusal("Reading the cache", error, path)
            raise refusal from error

    def _is_right(self, path: Path) -> bool:
        try:
            self._unseal(path)
        except (DamagedEntryError, OSError):
            return False
        return True

    def _unseal(self, path: Path) -> tuple[Tensor, ...]:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:  # which cannot be mapped
                raise DamagedEntryError
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as data:
                return unseal(data, self._codec, self._entry_key, self._label(path))

    def _require_room(self, size_bytes: int) -> None:
        if self._limit_bytes is not None and self._used + size_bytes > self._limit_bytes:
            # Other processes may have removed entries, or written some.
            self._used = sum(size for _, size in entries_of(self._folder))
            if self._used + size_bytes > self._limit_bytes:
                msg = (
                    f"Writing to the cache: expected room for {format_bytes(size_bytes)} more within its limit of "
                    f"{format_bytes(self._limit_bytes)}, got {format_bytes(self._used)} in it already "
                    f"({self._folder}). Raise the limit, choose --cache-codec int8, or clear another cache."
                )
                raise StorageError(msg)
        free = shutil.disk_usage(self._folder).free
        if free < size_bytes + RESERVE_BYTES:
            msg = (
                f"Writing to the cache: expected room for {format_bytes(size_bytes)} more and a reserve of "
                f"{format_bytes(RESERVE_BYTES)} on the disk, got {format_bytes(free)} ({self._folder}). Make room, "
                "choose --cache-codec int8, or a folder on another disk."
            )
            raise StorageError(msg)


def open_folder(folder: Path, key: CacheKey) -> None:
    """Make a cache's folder, or see that one that is there is a cache with this key.

    Raises:
        CacheError: It has another key, or is of another format.
        ConfigError: It holds something else, or the key.
        StorageError: The file system refused.
    """
    if key.path.resolve().is_relative_to(folder.resolve()):
        msg = f"Cache key: expected it outside of the cache that it opens, got {key.path}. Move it, and give its --key."
        raise ConfigError(msg)
    about, check = folder / _ABOUT, hmac.digest(key.derive("cache check"), b"tidelock", "sha256").hex()
    try:
        if not about.exists():
            if folder.is_dir() and any(folder.iterdir()):
                msg = f"Cache: expected a new folder or a cache, got one with other files ({folder}). Choose another."
                raise ConfigError(msg)
            folder.mkdir(parents=True, exist_ok=True)
            _write(about, json.dumps({"format": _FORMAT, "key_check": check}).encode())
    except OSError as error:
        refusal = _refusal("Making the cache", error, folder)
        raise refusal from error
    found = read_about(folder)
    if not hmac.compare_digest(str(found.get("key_check")), check):
        msg = (
            f"Cache: expected the key that it was made with, got another ({folder}, {key.path}). Nothing was changed. "
            "Give its --key, or choose another folder."
        )
        raise CacheError(msg)


def read_about(folder: Path) -> dict[str, Any]:
    """Return what a cache's folder says of itself.

    Raises:
        CacheError: The folder is no cache, or one of another format.
    """
    try:
        about = json.loads((folder / _ABOUT).read_bytes())
    except (OSError, ValueError):
        about = None
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        msg = f"Cache: expected a folder with a {_ABOUT} of format {_FORMAT}, got none ({folder}). Check the path."
        raise CacheError(msg)
    return about


def identities_of(folder: Path) -> Iterator[tuple[CacheIdentity, Path]]:
    """Yield what the entries of a cache are of, each with its folder; one that cannot be read is passed over."""
    for path in sorted(folder.glob(f"*/{_IDENTITY}")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            values = json.loads(path.read_bytes())
            yield CacheIdentity(**{**values, "taps": tuple(values["taps"])}), path.parent


def entries_of(folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield the entries in a folder, each with its size in bytes."""
    for path in folder.rglob("*"):
        if len(path.name) == 64 and path.parent.name == path.name[:2]:
            with contextlib.suppress(OSError):  # another process has removed it
                yield path, path.stat().st_size


def clear(folder: Path) -> int:
    """Remove a cache with all its entries, and nothing else; return how many bytes its entries took.

    Raises:
        CacheError: The folder is no cache.
        StorageError: The file system refused.
    """
    read_about(folder)
    size = sum(size for _, size in entries_of(folder))
    try:
        for _, entries in list(identities_of(folder)):
            shutil.rmtree(entries)
        (folder / _ABOUT).unlink()
        with contextlib.suppress(OSError):  # somebody has put something of theirs there
            folder.rmdir()
    except OSError as error:
        refusal = _refusal("Clearing the cache", error, folder)
        raise refusal from error
    return size


def _write(path: Path, content: bytes) -> None:
    """Write a file so that it is whole, on the disk and under its name, or not there."""
    partial = path.with_name(f"{_PARTIAL}{os.getpid()}-{threading.get_ident()}-{path.name[:16]}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _remove_stale(folder: Path) -> None:
    """Remove what a process that was killed had begun to write."""
    for path in folder.rglob(f"{_PARTIAL}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()


def _refusal(doing: str, error: OSError, path: Path) -> StorageError:
    return StorageError(
        f"{doing}: expected the disk to do so, got {error.strerror or error} ({path}). Check it and its permissions."
    )
