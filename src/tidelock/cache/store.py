"""The activation cache on the disk: written once for each example, read in any order.

An entry is written beside its place and renamed, so that it is whole or not there. One that is not what was written is
removed and counted, and its example is computed again. The idea is PAC's (doi 10.1145/3673038.3673043, section 4.2). It
holds where the blocks give the same for an example in every epoch: without dropout.

May import errors, `units`, `cache`, `wire.codec` and libraries.
"""

from __future__ import annotations

import os
import shutil
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, final

from tidelock.cache.entry import (
    DamagedEntryError,
    as_stored,
    check_tensors,
    encode,
    entry_bytes,
    read_entry,
    write_entry,
)
from tidelock.cache.files import storage_error
from tidelock.cache.folder import CacheFolder
from tidelock.cache.identity import CacheIdentity, entry_name
from tidelock.errors import ConfigError, StorageError
from tidelock.units import format_bytes
from tidelock.wire.codec import Codec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from tidelock.cache.key import CacheKey

# Left free on the disk, for whatever else is written there.
RESERVE_BYTES = 256 << 20
# Read ahead and not yet asked for, in memory.
AHEAD_BYTES = 256 << 20


@final
class ActivationCache:
    """The entries of one identity in a cache's folder; safe to use from several threads and processes.

    Args:
        folder: Made when it is not there.
        key: Its secret.
        identity: What the entries are of.
        limit_bytes: The most that all entries of this folder may take; None leaves that to the disk.
        ahead_bytes: The most that entries take in memory that were read ahead and not yet asked for.

    Attributes:
        hits: Entries that were there when asked for.
        misses: Entries that were not.
        damaged: Entries that were found damaged, and removed.

    Raises:
        CacheError: The folder is a cache with another key, or of another format.
        ConfigError: The folder holds something else, or the key.
        StorageError: The file system refused.
    """

    def __init__(
        self,
        folder: Path,
        key: CacheKey,
        identity: CacheIdentity,
        *,
        limit_bytes: int | None = None,
        ahead_bytes: int = AHEAD_BYTES,
    ) -> None:
        self._key = key
        self._codec = Codec(identity.codec)
        self._identity = identity
        self._name_key, self._entry_key = key.derive("cache names"), key.derive("cache entries")
        self._limit_bytes, self._ahead_bytes = limit_bytes, ahead_bytes
        self._lock = threading.Lock()
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="cache-read")
        self._ahead: dict[str, tuple[Future[tuple[Tensor, ...] | None], int]] = {}
        self.hits = self.misses = self.damaged = 0
        self._folder = CacheFolder.prepare(folder, key)
        self._entries = self._folder.add_group(identity)

    def __contains__(self, ids: Sequence[Sequence[int]]) -> bool:
        return self._path(ids).is_file()

    def missing(self, examples: Iterable[Sequence[Sequence[int]]]) -> Iterator[int]:
        """Yield the numbers of the examples that have no entry, of equal ones the first only."""
        seen = set()
        for number, ids in enumerate(examples):
            path = self._path(ids)
            if path not in seen and not path.is_file():
                yield number
            seen.add(path)

    def get(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, ...] | None:
        """Return an example's tensors, each (rows, width); None when there is no entry, or only a damaged one.

        Raises:
            StorageError: The file system refused.
        """
        path = self._path(ids)
        with self._lock:
            future, _ = self._ahead.pop(path.name, (None, 0))
        tensors = None if future is None else future.result()
        if tensors is None:  # not read ahead, or damaged then and perhaps put again since
            tensors = self._read(path)
        with self._lock:
            if tensors is None:
                self.misses += 1
            else:
                self.hits += 1
        return tensors

    def read_ahead(self, examples: Iterable[Sequence[Sequence[int]]]) -> None:
        """Begin to read the entries that will be asked for next, in a thread.

        As many as take `ahead_bytes` in memory, and at least one; what was read ahead before and is not among them is
        dropped.

        Args:
            examples: In the order in which they will be asked for; no more of them are looked at than are read.
        """
        wanted: dict[str, Path] = {}
        with self._lock:
            room = self._ahead_bytes
            for path in map(self._path, examples):
                future, size = self._ahead.get(path.name, (None, 0))
                if future is None and (size := self._size_in_memory(path)) == 0:
                    continue
                room -= size
                if room < 0 and wanted:
                    break
                wanted[path.name] = path
                if future is None:
                    self._ahead[path.name] = self._readers.submit(self._read, path), size
            for name in self._ahead.keys() - wanted:
                self._ahead.pop(name)[0].cancel()

    def put(self, ids: Sequence[Sequence[int]], tensors: Sequence[Tensor], *, left: int = 0) -> None:
        """Write an example's entry, which is on the disk when this returns; one that is there is left as it is.

        Args:
            ids: Token ids of the example and whatever else its tensors depend on.
            tensors: Each of shape (rows, width), with no more rows than the example has tokens.
            left: How many examples are still to come, for the message when there is no room.

        Raises:
            CacheError: The cache was cleared meanwhile.
            ConfigError: There are no token ids, or a tensor is none that an entry keeps: padding, say.
            NonFiniteError: A number is infinite or undefined.
            StorageError: It would not leave enough room, within the limit or on the disk, or the file system refused.
        """
        path = self._path(ids)
        if path.is_file():
            return
        check_tensors(tensors, self._codec)
        tokens, rows = max(map(len, ids)), max(len(tensor) for tensor in tensors)
        if rows > tokens:
            msg = f"Caching an example: expected at most its {tokens} tokens, got {rows} rows. Leave padding out."
            raise ConfigError(msg)
        size = self.entry_bytes([(tensor.shape[0], tensor.shape[1]) for tensor in tensors])
        plain = encode(tensors, self._codec)
        with self._folder.locked():
            if not path.is_file():  # another process may have been faster
                self._require_room(size, left * size)
                write = partial(write_entry, plain=plain, codec=self._codec, key=self._entry_key, name=path.name)
                self._folder.add(path, size, write)

    def as_stored(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return tensors as `get` returns them once they are put: rounded as the codec has it."""
        check_tensors(tensors, self._codec)
        return as_stored(tensors, self._codec)

    def entry_bytes(self, shapes: Sequence[tuple[int, int]]) -> int:
        """Return how many bytes an entry of tensors of these shapes (rows, width) takes."""
        return entry_bytes(shapes, self._codec)

    def require_room(self, size_bytes: int) -> None:
        """Refuse, before anything is computed, what would not fit.

        Raises:
            StorageError: So many more bytes would not leave enough room, within the limit or on the disk.
        """
        with self._folder.locked():
            self._require_room(size_bytes)

    def close(self) -> None:
        """Stop reading ahead."""
        self.read_ahead(())
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _path(self, ids: Sequence[Sequence[int]]) -> Path:
        name = entry_name(self._identity, ids, self._name_key)
        return self._entries / name[:2] / name

    def _size_in_memory(self, path: Path) -> int:
        """Return about how many bytes an entry's tensors take, 0 when it is not there."""
        try:
            size = path.stat().st_size
        except OSError:
            return 0
        return 4 * size if self._codec is Codec.INT8 else size

    def _read(self, path: Path) -> tuple[Tensor, ...] | None:
        try:
            with path.open("rb") as file:
                try:
                    return read_entry(file, self._entry_key, path.name)
                except DamagedEntryError:
                    with self._lock:
                        self.damaged += 1
                    self._folder.discard(path, os.fstat(file.fileno()))
                    return None
        except FileNotFoundError:
            return None
        except OSError as error:
            refusal = storage_error("Reading the cache", error, path)
            raise refusal from error

    def _require_room(self, size: int, to_come: int = 0) -> None:
        then = f", and about {format_bytes(to_come)} after that" if to_come else ""
        CacheFolder.open(self._folder.path, self._key)  # is still there
        used = self._folder.used()
        if self._limit_bytes is not None and used + size > self._limit_bytes:
            msg = (
                f"Writing to the cache: expected room for {format_bytes(size)} more{then} within its limit of "
                f"{format_bytes(self._limit_bytes)}, got {format_bytes(used)} in it already ({self._folder.path}). "
                "Raise the limit, choose a codec of fewer bytes (int8), or clear another cache."
            )
            raise StorageError(msg)
        free = shutil.disk_usage(self._folder.path).free
        if free < size + RESERVE_BYTES:
            msg = (
                f"Writing to the cache: expected room for {format_bytes(size)} more{then} and a reserve of "
                f"{format_bytes(RESERVE_BYTES)} on the disk, got {format_bytes(free)} ({self._folder.path}). Make "
                "room, choose a codec of fewer bytes (int8), or a folder on another disk."
            )
            raise StorageError(msg)
