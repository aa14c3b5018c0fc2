"""Looks at whole caches: what is in one, and whether every entry is what was written.

May import errors, `cache` and libraries.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from tidelock.cache.entry import DamagedEntryError, read_entry
from tidelock.cache.files import storage_error
from tidelock.cache.folder import CacheFolder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tidelock.cache.identity import CacheIdentity
    from tidelock.cache.key import CacheKey


@final
@dataclass(frozen=True, slots=True)
class Group:
    """The entries of one identity.

    Attributes:
        name: Of their folder.
        identity: What they are of; None when that cannot be read.
        entries: How many there are.
        size_bytes: What they take.
    """

    name: str
    identity: CacheIdentity | None
    entries: int
    size_bytes: int


def groups_of(path: Path) -> list[Group]:
    """Return what is in a cache; needs no key and changes nothing.

    Raises:
        CacheError: The folder is no cache.
        StorageError: The file system refused.
    """
    folder, found = CacheFolder.open(path), []
    try:
        for group, identity in folder.groups():
            sizes = [size for _, size in folder.entries(group)]
            found.append(Group(group.name, identity, len(sizes), sum(sizes)))
    except OSError as error:
        refusal = storage_error("Reading the cache", error, path)
        raise refusal from error
    return found


def verify(path: Path, key: CacheKey, *, remove: bool = False) -> Iterator[tuple[Path, bool]]:
    """Read every entry of a cache, whatever it is of; yield each and whether it is what was written.

    Args:
        path: The cache's folder.
        key: Its key.
        remove: Remove the damaged ones.

    Raises:
        CacheError: The folder is no cache, or one with another key.
        StorageError: The file system refused.
    """
    folder, secret = CacheFolder.open(path, key), key.derive("cache entries")
    try:
        for group, _ in folder.groups():
            for entry, _ in folder.entries(group):
                is_right = _is_right(folder, entry, secret, remove=remove)
                if is_right is not None:
                    yield entry, is_right
    except OSError as error:
        refusal = storage_error("Reading the cache", error, path)
        raise refusal from error


def clear(path: Path) -> int:
    """Remove a cache with all its entries, and nothing else; return how many bytes its entries took.

    Raises:
        CacheError: The folder is no cache.
        StorageError: The file system refused, or another process does not give up the lock.
    """
    return CacheFolder.open(path).clear()


def _is_right(folder: CacheFolder, entry: Path, secret: bytes, *, remove: bool) -> bool | None:
    """Return whether an entry is what was written; None when another process has removed it."""
    try:
        with entry.open("rb") as file:
            try:
                read_entry(file, secret, entry.name)
            except DamagedEntryError:
                if remove:
                    folder.discard(entry, os.fstat(file.fileno()))
                return False
    except FileNotFoundError:
        return None
    return True
