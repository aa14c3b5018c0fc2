"""A key, an identity, and caches with some entries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tidelock.cache.identity import CacheIdentity
from tidelock.cache.key import CacheKey
from tidelock.cache.store import ActivationCache
from tidelock.cache.upkeep import verify

IDENTITY = CacheIdentity("a" * 64, "b" * 64, "fp32", (0, 2), None, "fp32")
MakeCache = Callable[..., ActivationCache]


def example(number: int) -> tuple[tuple[int, ...], ...]:
    """Return the token ids of one example."""
    return ((1, 7, number),)


def taps_of(number: int, *, rows: int = 3) -> tuple[Tensor, ...]:
    """Return the tensors of one example: two of one width and one of another."""
    generator = torch.Generator().manual_seed(number)
    return tuple(torch.randn(rows, width, generator=generator) for width in (8, 8, 5))


def fill(cache: ActivationCache, numbers: range = range(5)) -> list[Path]:
    """Put examples; return the paths of their entries."""
    for number in numbers:
        cache.put(example(number), taps_of(number))
    return [cache._path(example(number)) for number in numbers]


def is_kept(cache: ActivationCache, number: int) -> bool:
    """Return whether an example's tensors come back as they were put, bit for bit."""
    got = cache.get(example(number))
    return got is not None and all(map(torch.equal, got, taps_of(number)))


def all_files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def entries_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and len(path.name) == 64)


def verified(folder: Path, key: CacheKey, *, remove: bool = False) -> tuple[int, list[Path]]:
    """Return how many entries are right, and those that are damaged."""
    found = list(verify(folder, key, remove=remove))
    return sum(is_right for _, is_right in found), [path for path, is_right in found if not is_right]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def key(tmp_path: Path) -> CacheKey:
    return CacheKey.open(tmp_path / "keys" / "cache.key")


@pytest.fixture
def other_key(tmp_path: Path) -> CacheKey:
    return CacheKey.open(tmp_path / "keys" / "other.key")


@pytest.fixture
def make_cache(folder: Path, key: CacheKey) -> Iterator[MakeCache]:
    """Return a function that opens a cache in one and the same folder; all are closed at the end."""
    caches: list[ActivationCache] = []

    def make(identity: CacheIdentity = IDENTITY, *, with_key: CacheKey = key, **options: int) -> ActivationCache:
        caches.append(ActivationCache(folder, with_key, identity, **options))
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()
