"""The cache on the disk: what was put is got, and what is damaged is found with nothing else lost."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.cache.conftest import (
    IDENTITY,
    MakeCache,
    all_files,
    entries_in,
    example,
    fill,
    is_kept,
    taps_of,
    verified,
)
from tests.unit.cache.test_identity import CHANGES
from tidelock.cache import store
from tidelock.cache.key import CacheKey
from tidelock.cache.store import ActivationCache
from tidelock.cache.upkeep import clear
from tidelock.errors import CacheError, ConfigError, NonFiniteError, StorageError
from tidelock.wire.codec import Codec

SHAPES = [(3, 8), (3, 8), (3, 5)]


def test_what_was_put_is_got_in_any_order(make_cache: MakeCache) -> None:
    fill(make_cache())
    again = make_cache()
    assert all(is_kept(again, number) for number in (3, 0, 4, 1, 2))
    assert again.get(example(9)) is None
    assert (again.hits, again.misses, again.damaged) == (5, 1, 0)


def test_what_is_missing_is_named_once(make_cache: MakeCache) -> None:
    cache = make_cache()
    fill(cache)
    assert list(cache.missing(map(example, (1, 9, 3, 8, 9, 1)))) == [1, 3]
    assert example(1) in cache
    assert example(9) not in cache


def test_what_is_put_twice_is_written_once(make_cache: MakeCache) -> None:
    cache = make_cache()
    (path,) = fill(cache, range(1))
    before = path.stat()
    cache.put(example(0), taps_of(0))
    assert path.stat() == before


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_rounding_keeps_its_bound_and_changes_something(make_cache: MakeCache, codec: str) -> None:
    cache = make_cache(replace(IDENTITY, codec=codec))
    cache.put(example(1), taps_of(1))
    got = cache.get(example(1))
    assert got is not None
    for ours, theirs in zip(got, taps_of(1), strict=True):
        errors = (ours.float() - theirs).norm(dim=1) / theirs.norm(dim=1)
        assert 0 < float(errors.max()) <= Codec(codec).error_bound(theirs.shape[1], stochastic=False) + 1e-6


def test_examples_of_two_stacks_and_tensors_without_rows(make_cache: MakeCache) -> None:
    cache = make_cache()
    ids, tensors = ((1, 2, 3, 4), (5, 6)), (torch.randn(4, 8), torch.randn(2, 8), torch.empty(0, 8))
    cache.put(ids, tensors)
    got = cache.get(ids)
    assert got is not None
    assert all(map(torch.equal, got, tensors))
    assert cache.get(((1, 2, 3, 4), (5, 7))) is None


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        ((torch.ones(4, 8),), ConfigError),  # padding
        ((torch.ones(3, 8, 1),), ConfigError),
        ((torch.ones(3, 8), torch.tensor([[float("nan")]])), NonFiniteError),
        ((), ConfigError),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_is_written(
    make_cache: MakeCache, folder: Path, tensors: tuple[torch.Tensor, ...], error: type[Exception]
) -> None:
    cache = make_cache()
    before = all_files(folder)
    with pytest.raises(error, match=r"^Caching"):
        cache.put(example(1), tensors)
    for call in (cache.get, cache.__contains__, lambda ids: cache.put(ids, tensors)):
        with pytest.raises(ConfigError, match=r"expected token ids"):
            call([[]])
    assert all_files(folder) == before


@pytest.mark.parametrize("field", CHANGES)
def test_what_the_numbers_depend_on_is_part_of_the_key(make_cache: MakeCache, field: str) -> None:
    fill(make_cache())
    changes: dict[str, Any] = {field: CHANGES[field]}
    assert make_cache(replace(IDENTITY, **changes)).get(example(1)) is None
    assert is_kept(make_cache(), 1)


def test_neither_names_nor_files_tell_of_the_text(
    make_cache: MakeCache, folder: Path, key: CacheKey, other_key: CacheKey, tmp_path: Path
) -> None:
    names = {path.name for path in fill(make_cache(), range(2))}
    stranger = ActivationCache(tmp_path / "other", other_key, IDENTITY)
    # Nobody without the key can look a text up that he guesses.
    assert names.isdisjoint(path.name for path in fill(stranger, range(2)))
    secrets = [row.numpy().tobytes() for tensor in taps_of(1) for row in tensor]
    secrets += [number.to_bytes(8, "little") + bytes(7) for number in (7, 1)]
    secrets += [b"[1, 7,", b"1,7,1", key.secret, key.secret.hex().encode(), key.derive("cache entries")]
    for data in all_files(folder).values():
        assert not any(secret in data for secret in secrets)


PLACES = {"magic": 1, "codec": 5, "nonce": 9, "shapes": 25, "numbers": 100, "tag": -1}


@pytest.mark.parametrize("place", PLACES)
def test_a_flipped_byte_costs_that_entry_only(make_cache: MakeCache, folder: Path, key: CacheKey, place: str) -> None:
    cache = make_cache()
    path = fill(cache)[2]
    data = bytearray(path.read_bytes())
    data[PLACES[place]] ^= 1
    path.write_bytes(data)
    assert verified(folder, key) == (4, [path])
    assert cache.get(example(2)) is None
    assert (cache.damaged, cache.misses, path.exists()) == (1, 1, False)
    assert all(is_kept(cache, number) for number in (0, 1, 3, 4))
    cache.put(example(2), taps_of(2))
    assert is_kept(cache, 2)
    assert verified(folder, key) == (5, [])


@pytest.mark.parametrize("size", [0, 3, 20, 31, 100])
def test_an_entry_cut_short_is_found(make_cache: MakeCache, size: int) -> None:
    cache = make_cache()
    path = fill(cache)[2]
    os.truncate(path, size)
    assert cache.get(example(2)) is None
    assert (cache.damaged, path.exists()) == (1, False)
    assert all(is_kept(cache, number) for number in (0, 1, 3, 4))


def test_entries_cannot_pass_for_each_other(make_cache: MakeCache, folder: Path) -> None:
    cache, other = make_cache(), make_cache(replace(IDENTITY, model="c" * 64))
    one, two, *_ = fill(cache)
    theirs = fill(other)[3]
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    theirs.write_bytes(cache._path(example(3)).read_bytes())
    assert [cache.get(example(number)) for number in (0, 1)] == [None, None]
    assert other.get(example(3)) is None
    assert len(entries_in(folder)) == 7


def test_a_damaged_entry_that_was_replaced_meanwhile_stays(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, other = make_cache(), make_cache()
    (path,) = fill(cache, range(1))
    path.write_bytes(b"damaged")
    discard = cache._folder.discard

    def late(place: Path, seen: os.stat_result) -> None:
        place.unlink()
        other.put(example(0), taps_of(0))
        discard(place, seen)

    monkeypatch.setattr(cache._folder, "discard", late, raising=False)
    assert cache.get(example(0)) is None
    assert is_kept(cache, 0)


def test_a_limit_is_kept_and_told_before(make_cache: MakeCache, folder: Path) -> None:
    cache = make_cache()
    size = cache.entry_bytes(SHAPES)
    (path,) = fill(cache, range(1))
    assert path.stat().st_size == size
    limited = make_cache(limit_bytes=3 * size + 1)
    limited.require_room(2 * size)
    with pytest.raises(StorageError, match=r"within its limit of .*\. Raise the limit"):
        limited.require_room(2 * size + 2)
    fill(limited, range(3))
    before = all_files(folder)
    with pytest.raises(StorageError, match=r"room for 316 B more, and about 3.2 kB after that within its limit of"):
        limited.put(example(3), taps_of(3), left=10)
    assert all_files(folder) == before
    fill(limited, range(3))  # what is there needs no room
    path.write_bytes(b"damaged")
    assert limited.get(example(0)) is None  # which makes room
    (folder / "usage").unlink()
    limited.put(example(7), taps_of(7))


def test_two_with_one_limit_keep_it_together(make_cache: MakeCache, folder: Path) -> None:
    size = make_cache().entry_bytes(SHAPES)
    one, other = (make_cache(limit_bytes=5 * size) for _ in range(2))
    fill(one, range(3))
    with pytest.raises(StorageError, match=r"within its limit"):
        fill(other, range(10, 15))
    assert len(entries_in(folder)) == 5


def test_the_disk_is_never_filled(make_cache: MakeCache, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache()
    free = store.RESERVE_BYTES + cache.entry_bytes(SHAPES)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))
    cache.put(example(1), taps_of(1))
    before = all_files(folder)
    with pytest.raises(StorageError, match=r"a reserve of 268.4 MB on the disk, got 268.4 MB .*\. Make room"):
        cache.put(((1, 2, 3, 4),), taps_of(2, rows=4))
    assert all_files(folder) == before


@pytest.mark.parametrize("refused", ["fsync", "write", "open"])
def test_what_the_system_refuses_is_told(
    make_cache: MakeCache, folder: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    cache = make_cache()
    fill(cache)
    before, original = all_files(folder), getattr(os, refused)
    calls = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if refused == "open" and "usage" not in str(args[0]):
            return original(*args, **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, refused, refuse)
    with pytest.raises(StorageError, match=r"got No space left on device \(.*\)\. Make room"):
        cache.put(example(9), taps_of(9))
    monkeypatch.undo()
    assert calls
    assert all_files(folder) == before


def test_a_cache_that_was_cleared_meanwhile_is_an_error(make_cache: MakeCache, folder: Path) -> None:
    cache = make_cache()
    fill(cache)
    clear(folder)
    assert cache.get(example(0)) is None
    with pytest.raises((CacheError, StorageError)):
        cache.put(example(9), taps_of(9))
    assert entries_in(folder) == []


def test_what_is_read_ahead_is_got(make_cache: MakeCache) -> None:
    cache = make_cache()
    fill(cache)
    cache.read_ahead(map(example, (4, 9, 0, 4)))
    assert set(cache._ahead) == {cache._path(example(number)).name for number in (4, 0)}
    assert all(is_kept(cache, number) for number in (0, 4, 1, 4))
    assert cache.get(example(9)) is None
    assert (cache.hits, cache.misses) == (4, 1)
    assert not cache._ahead


def test_what_is_read_ahead_is_bounded_and_begins_with_the_first(make_cache: MakeCache) -> None:
    size = make_cache().entry_bytes(SHAPES)
    cache = make_cache(ahead_bytes=3 * size)
    fill(cache, range(9))
    consumed = []

    def order():
        for number in range(9):
            consumed.append(number)
            yield example(number)

    cache.read_ahead(order())
    assert list(cache._ahead) == [cache._path(example(number)).name for number in (0, 1, 2)]
    assert consumed == [0, 1, 2, 3]
    cache.read_ahead(map(example, (2, 3, 4, 5)))  # what is not wanted any more makes room
    assert list(cache._ahead) == [cache._path(example(number)).name for number in (2, 3, 4)]
    assert all(is_kept(cache, number) for number in (3, 2, 0))
    small = make_cache(ahead_bytes=1)
    small.read_ahead(map(example, range(9)))
    assert len(small._ahead) == 1
    assert all(is_kept(small, number) for number in range(3))


def test_integers_are_counted_as_the_numbers_that_they_become(make_cache: MakeCache) -> None:
    cache = make_cache(replace(IDENTITY, codec="int8"))
    (path, *_) = fill(cache)
    decoded = sum(tensor.nbytes for tensor in taps_of(0))
    assert decoded <= cache._size_in_memory(path) == 4 * path.stat().st_size


def test_a_damaged_entry_that_was_read_ahead_is_put_again(make_cache: MakeCache) -> None:
    cache = make_cache()
    (path, *_) = fill(cache)
    path.write_bytes(b"damaged")
    cache.read_ahead([example(0)])
    (future, _), *_ = cache._ahead.values()
    assert isinstance(future, Future)
    assert future.result() is None
    cache.put(example(0), taps_of(0))
    assert is_kept(cache, 0)
    assert cache.damaged == 1


def test_a_closed_cache_still_reads(make_cache: MakeCache) -> None:
    cache = make_cache()
    fill(cache)
    cache.read_ahead(map(example, range(5)))
    cache.close()
    assert all(is_kept(cache, number) for number in range(5))


def test_what_the_system_refuses_to_read_is_told(make_cache: MakeCache) -> None:
    cache = make_cache()
    (path, *_) = fill(cache)
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageError, match=r"Reading the cache: expected the file system to do it, got Is a directory"):
        cache.get(example(0))
