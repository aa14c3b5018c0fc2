"""The files of a cache.

    cache.json                    says that the folder is a cache, and by what it knows its key
    lock                          held by whoever writes
    usage                         how many bytes all entries take
    <identity>/identity.json      what the entries below are of
    <identity>/<2 hex>/<64 hex>   one entry for each example; see `cache.entry`

Files appear and disappear whole, so that reading needs no lock. May import errors, `cache` and libraries.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import re
from contextlib import contextmanager
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, final

from filelock import FileLock, Timeout

from tidelock.cache.files import PARTIAL, storage_error, sync_folder, whole_file
from tidelock.cache.identity import CacheIdentity
from tidelock.errors import CacheError, ConfigError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tidelock.cache.key import CacheKey

_FORMAT = 1
_ABOUT, _IDENTITY, _LOCK, _USAGE = "cache.json", "identity.json", "lock", "usage"
_GROUP, _SHARD, _ENTRY = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{2}"), re.compile(r"[0-9a-f]{64}")
_COUNTED = re.compile(r"[0-9]{20}\n")
# A writer holds the lock for one entry; who waits longer waits for a process that was stopped.
_PATIENCE_SECONDS = 60.0
_POLL_SECONDS = 0.002


@final
class CacheFolder:
    """The files of one cache; see `open` and `prepare`.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._about = path / _ABOUT
        self._usage = path / _USAGE
        self._lock = FileLock(path / _LOCK, timeout=_PATIENCE_SECONDS)

    @classmethod
    def open(cls, path: Path, key: CacheKey | None = None) -> CacheFolder:
        """Return an existing cache, of which nothing is changed.

        Args:
            path: The folder.
            key: What must be its key; None is for what needs none.

        Raises:
            CacheError: The folder is no cache, or one with another key or of another format.
        """
        folder = cls(path)
        check = folder._key_check()
        if key is not None and not hmac.compare_digest(check.encode(), _check_of(key).encode()):
            msg = (
                f"Cache: expected the key that it was made with, got another ({path}, {key.path}). Nothing was "
                "changed. Give its --cache-key, or choose another folder."
            )
            raise CacheError(msg)
        return folder

    @classmethod
    def prepare(cls, path: Path, key: CacheKey) -> CacheFolder:
        """Return a cache to write into, made when it is not there, without what killed writers have left.

        Raises:
            CacheError: It has another key, or is of another format.
            ConfigError: The folder holds something else, or the key.
            StorageError: The file system refused, or another process does not give up the lock.
        """
        if key.path.resolve().is_relative_to(path.resolve()):
            msg = (
                f"Cache key: expected it outside of the cache that it opens, got {key.path}. Move it, and give its "
                "--cache-key."
            )
            raise ConfigError(msg)
        folder = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            folder._require_nothing_else()
            with folder.locked():
                if not folder._about.exists():
                    about = {"format": _FORMAT, "key_check": _check_of(key)}
                    _write(folder._about, json.dumps(about).encode())
                cls.open(path, key)
                for left in folder.leftovers():
                    left.unlink(missing_ok=True)
                folder._count(folder._size())
        except OSError as error:
            refusal = storage_error("Opening the cache", error, path)
            raise refusal from error
        return folder

    def add_group(self, identity: CacheIdentity) -> Path:
        """Return the folder for the entries of an identity, which says what they are of.

        Raises:
            StorageError: The file system refused.
        """
        group = self.path / identity.group
        try:
            with self.locked():
                group.mkdir(exist_ok=True)
                if _identity_in(group) != identity:
                    _write(group / _IDENTITY, json.dumps(asdict(identity), indent=2).encode())
                    sync_folder(self.path)
        except OSError as error:
            refusal = storage_error("Opening the cache", error, group)
            raise refusal from error
        return group

    def groups(self) -> list[tuple[Path, CacheIdentity | None]]:
        """Return the folders of entries with what these are of; None when that cannot be read, which harms no entry."""
        return [(group, _identity_in(group)) for group in _folders(self.path, _GROUP)]

    def entries(self, group: Path) -> Iterator[tuple[Path, int]]:
        """Yield the entries of an identity's folder, each with its size in bytes."""
        for shard in _folders(group, _SHARD):
            for path in sorted(shard.iterdir()):
                if _ENTRY.fullmatch(path.name):
                    with contextlib.suppress(FileNotFoundError):  # another process has removed it
                        yield path, path.stat().st_size

    def leftovers(self) -> list[Path]:
        """Return the files that are being written; under the lock, those that nobody goes on writing."""
        groups = _folders(self.path, _GROUP)
        shards = [shard for group in groups for shard in _folders(group, _SHARD)]
        return [path for folder in (self.path, *groups, *shards) for path in folder.glob(f".*{PARTIAL}")]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep all other writers out, of this process and of others.

        Raises:
            StorageError: Another one does not give up the lock.
        """
        try:
            self._lock.acquire(poll_interval=_POLL_SECONDS)
        except Timeout as error:
            msg = (
                f"Cache: expected a turn to write within {_PATIENCE_SECONDS:.0f} s, got none ({self.path}). Another "
                "process holds its lock: let it go on, or end it."
            )
            raise StorageError(msg) from error
        except OSError as error:
            refusal = storage_error("Taking the cache's lock", error, self.path)
            raise refusal from error
        try:
            yield
        finally:
            self._lock.release()

    def add(self, path: Path, size: int, write: Callable[[IO[bytes]], None]) -> None:
        """Write an entry, which is on the disk when this returns; only under the lock.

        Args:
            path: Where it belongs.
            size: How many bytes it has.
            write: Writes them.

        Raises:
            StorageError: The file system refused; nothing has changed.
        """
        before = self.used()
        try:
            # Counted first: of a process killed in between too much is counted, which the next one puts right.
            self._count(before + size)
            if not path.parent.is_dir():
                path.parent.mkdir(parents=True)
                sync_folder(path.parent.parent)
            with whole_file(path, "an entry of the cache") as file:
                write(file)
        except BaseException as error:
            with contextlib.suppress(OSError):
                self._count(before)
            if isinstance(error, OSError):
                refusal = storage_error("Writing to the cache", error, path)
                raise refusal from error
            raise

    def discard(self, path: Path, seen: os.stat_result) -> None:
        """Remove a damaged entry, unless another process has replaced it; one that cannot be removed stays.

        Args:
            path: Where it is.
            seen: Of the file that was found damaged.
        """
        with contextlib.suppress(OSError, StorageError), self.locked():
            now = path.stat()
            if (now.st_ino, now.st_mtime_ns) == (seen.st_ino, seen.st_mtime_ns):
                path.unlink()
                self._count(self._size())  # how much of it had been counted is not known

    def used(self) -> int:
        """Return how many bytes all entries take; only under the lock."""
        with contextlib.suppress(FileNotFoundError):
            text = self._usage.read_text(encoding="ascii", errors="replace")
            if _COUNTED.fullmatch(text):
                return int(text)
        return self._size()

    def clear(self) -> int:
        """Remove the cache with all its entries, and nothing else; return how many bytes its entries took.

        Folders that have something else in them stay.

        Raises:
            StorageError: The file system refused, or another process does not give up the lock.
        """
        try:
            with self.locked():
                size = self._size()
                for left in self.leftovers():
                    left.unlink()
                for group, _ in self.groups():
                    for path, _ in self.entries(group):
                        path.unlink()
                    (group / _IDENTITY).unlink(missing_ok=True)
                    for folder in (*_folders(group, _SHARD), group):
                        _remove_if_empty(folder)
                self._usage.unlink(missing_ok=True)
                self._about.unlink()  # last: clearing that was cut off can be done again
            (self.path / _LOCK).unlink(missing_ok=True)
            _remove_if_empty(self.path)
        except OSError as error:
            refusal = storage_error("Clearing the cache", error, self.path)
            raise refusal from error
        return size

    def _size(self) -> int:
        return sum(size for group, _ in self.groups() for _, size in self.entries(group))

    def _count(self, size: int) -> None:
        # In place and of one length: a full disk has room for it.
        handle = os.open(self._usage, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.write(handle, f"{size:020d}\n".encode())
        finally:
            os.close(handle)

    def _require_nothing_else(self) -> None:
        """Refuse a folder that is no cache and has something in it, before a lock is put there."""
        own = re.compile(rf"{_LOCK}|{_USAGE}|\.{_ABOUT}\..*{PARTIAL}")
        others = [path for path in self.path.iterdir() if not own.fullmatch(path.name)]
        # Looked for last: where another process is making the cache, cache.json is there before what else was found.
        if others and not self._about.exists():
            msg = f"Cache: expected a new folder or a cache, got one with other files ({self.path}). Choose another."
            raise ConfigError(msg)

    def _key_check(self) -> str:
        try:
            about = json.loads(self._about.read_bytes())
        except (OSError, ValueError, RecursionError):
            about = None
        check = about.get("key_check") if isinstance(about, dict) and about.get("format") == _FORMAT else None
        if not isinstance(check, str):
            msg = (
                f"Cache: expected a folder with a {_ABOUT} of format {_FORMAT}, got none ({self.path}). Check the path."
            )
            raise CacheError(msg)
        return check


def _check_of(key: CacheKey) -> str:
    return hmac.digest(key.derive("cache check"), b"tidelock", "sha256").hex()


def _write(path: Path, content: bytes) -> None:
    with whole_file(path, path.name) as file:
        file.write(content)


def _identity_in(group: Path) -> CacheIdentity | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError, ConfigError):
        values = json.loads((group / _IDENTITY).read_bytes())
        identity = CacheIdentity(**{**values, "taps": tuple(values["taps"])})
        return identity if identity.group == group.name else None
    return None


def _folders(folder: Path, named: re.Pattern[str]) -> list[Path]:
    """Return the folders in a folder with such a name, in order; links are none."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as found:
        names = [item.name for item in found if named.fullmatch(item.name) and item.is_dir(follow_symlinks=False)]
        return [folder / name for name in sorted(names)]
    return []


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
