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

IDENTITY = CacheIdentity("a" * 64, "b" * 64, "fp32", (0, 2), None, "fp32", 128)
MakeCache = Callable[..., ActivationCache]


def example(number: int) -> tuple[tuple[int, ...], ...]:
    """Return the token ids of one example."""
    return ((1, 7, number),)


def taps_of(number: int, *, rows: int = 3) -> tuple[Tensor, ...]:
    """Return the tensors of one example: two of one width and one of another."""
    generator = torch.Generator().manual_seed(number)
    return tuple(torch.randn(rows, width, generator=generator) for width in (8, 8, 5))


@pytest.fixture
def key(tmp_path: Path) -> CacheKey:
    return CacheKey.open(tmp_path / "keys" / "cache.key")


@pytest.fixture
def make_cache(tmp_path: Path, key: CacheKey) -> Iterator[MakeCache]:
    """Return a function that opens a cache in one and the same folder; all are closed at the end."""
    caches: list[ActivationCache] = []

    def make(identity: CacheIdentity = IDENTITY, *, with_key: CacheKey = key, **options: int) -> ActivationCache:
        caches.append(ActivationCache(tmp_path / "cache", with_key, identity, **options))
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()
