"""The cache on the disk: what was put is got, and what is damaged is found with nothing else lost."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.cache.conftest import IDENTITY, MakeCache, example, taps_of
from tidelock.cache import store
from tidelock.cache.key import CacheKey
from tidelock.cache.store import ActivationCache, clear, entries_of, identities_of
from tidelock.errors import CacheError, ConfigError, NonFiniteError, StorageError
from tidelock.wire.codec import Codec


def fill(cache: ActivationCache, count: int = 5) -> list[Path]:
    for number in range(count):
        cache.put(example(number), taps_of(number))
    return sorted(path for path, _ in entries_of(cache._folder))


def test_what_was_put_is_got_in_any_order(make_cache: MakeCache) -> None:
    fill(make_cache())
    again = make_cache()
    for number in (3, 0, 4, 1, 2):
        got = again.get(example(number))
        assert got is not None
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, taps_of(number), strict=True))
    assert again.get(example(9)) is None
    assert (again.hits, again.misses, again.damaged) == (5, 1, 0)
    assert list(again.missing(map(example, (1, 9, 3, 8)))) == [1, 3]


def test_what_is_put_twice_is_written_once(make_cache: MakeCache) -> None:
    cache = make_cache()
    (path,) = fill(cache, 1)
    before = path.stat().st_ino
    cache.put(example(0), taps_of(0))
    assert path.stat().st_ino == before


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_rounding_keeps_its_bound_and_changes_something(make_cache: MakeCache, codec: str) -> None:
    cache = make_cache(replace(IDENTITY, codec=codec))
    cache.put(example(1), taps_of(1))
    got = cache.get(example(1))
    assert got is not None
    for ours, theirs in zip(got, taps_of(1), strict=True):
        errors = (ours.float() - theirs).norm(dim=1) / theirs.norm(dim=1)
        assert 0 < float(errors.max()) <= Codec(codec).error_bound(theirs.shape[1], stochastic=False) + 1e-6


def test_what_is_not_finite_is_not_written_as_integers(make_cache: MakeCache) -> None:
    cache = make_cache(replace(IDENTITY, codec="int8"))
    with pytest.raises(NonFiniteError):
        cache.put(example(1), [torch.tensor([[1.0, float("inf")]])])
    assert example(1) not in cache
    assert not list(cache._folder.rglob(".partial-*"))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "c" * 64},
        {"tokenizer": "c" * 64},
        {"dtype": "bf16"},
        {"taps": (0, 1)},
        {"tap_width": 4},
        {"codec": "bf16"},
        {"max_length": 127},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_the_numbers_depend_on_is_part_of_the_key(make_cache: MakeCache, changes: dict[str, Any]) -> None:
    fill(make_cache())
    other = make_cache(replace(IDENTITY, **changes))
    assert other.get(example(1)) is None
    assert example(1) in make_cache()


def test_neither_names_nor_files_tell_of_the_text(make_cache: MakeCache, key: CacheKey, tmp_path: Path) -> None:
    paths = fill(make_cache(), 2)
    (tmp_path / "other").mkdir()
    stranger = ActivationCache(tmp_path / "other" / "cache", CacheKey.open(tmp_path / "other" / "key"), IDENTITY)
    names = {path.name for path in fill(stranger, 2)}
    assert names.isdisjoint(path.name for path in paths)  # nobody without the key can look a text up
    spellings = [tensor[row].numpy().tobytes() for tensor in taps_of(1) for row in range(3)]
    for path in (path for path in (tmp_path / "cache").rglob("*") if path.is_file()):
        data = path.read_bytes()
        assert not any(spelling in data for spelling in spellings)
        assert key.secret not in data
        assert key.secret.hex().encode() not in data


def regions(path: Path) -> dict[str, int]:
    size = path.stat().st_size
    return {"magic": 1, "nonce": 8, "shapes": 20, "numbers": size // 2, "tag": size - 1}


@pytest.mark.parametrize("region", ["magic", "nonce", "shapes", "numbers", "tag"])
def test_a_flipped_byte_costs_that_entry_only(make_cache: MakeCache, region: str) -> None:
    cache = make_cache()
    fill(cache)
    path = cache._path(example(2))
    data = bytearray(path.read_bytes())
    data[regions(path)[region]] ^= 1
    path.write_bytes(data)
    assert cache.verify() == (4, [path])
    assert cache.get(example(2)) is None
    assert (cache.damaged, path.exists()) == (1, False)
    assert all(cache.get(example(number)) is not None for number in (0, 1, 3, 4))
    cache.put(example(2), taps_of(2))
    assert cache.verify() == (5, [])


@pytest.mark.parametrize("size", [0, 3, 31, 100])
def test_an_entry_cut_short_is_found(make_cache: MakeCache, size: int) -> None:
    cache = make_cache()
    fill(cache)
    path = cache._path(example(2))
    os.truncate(path, size)
    assert cache.verify(remove=True) == (4, [path])
    assert not path.exists()
    assert cache.get(example(2)) is None


def test_entries_cannot_pass_for_each_other(make_cache: MakeCache) -> None:
    cache = make_cache()
    fill(cache)
    other = make_cache(replace(IDENTITY, model="c" * 64))
    fill(other)
    shutil.copyfile(cache._path(example(0)), cache._path(example(1)))
    other._path(example(3)).write_bytes(cache._path(example(3)).read_bytes())
    assert cache.get(example(1)) is None
    assert other.get(example(3)) is None


def test_another_key_changes_nothing(make_cache: MakeCache, tmp_path: Path) -> None:
    fill(make_cache())
    with pytest.raises(CacheError, match=r"expected the key that it was made with, got another .* Nothing was changed"):
        make_cache(with_key=CacheKey.open(tmp_path / "keys" / "other.key"))
    assert make_cache().verify() == (5, [])


def test_a_key_inside_the_cache_is_refused(make_cache: MakeCache, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected it outside of the cache that it opens"):
        make_cache(with_key=CacheKey.open(tmp_path / "cache" / "key"))


def test_a_folder_with_other_files_is_refused(make_cache: MakeCache, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"expected a new folder or a cache, got one with other files"):
        make_cache()


def test_a_limit_is_kept_and_told_before(make_cache: MakeCache) -> None:
    cache = make_cache()
    size = cache.entry_bytes([(3, 8), (3, 8), (3, 5)])
    (path,) = fill(cache, 1)
    assert path.stat().st_size == size
    limited = make_cache(limit_bytes=3 * size + 1)
    limited.require_room(2 * size)
    with pytest.raises(StorageError, match=r"within its limit of .*\. Raise the limit"):
        limited.require_room(2 * size + 2)
    with pytest.raises(StorageError, match=r"within its limit of"):
        fill(limited)
    assert len(list(entries_of(limited._folder))) == 3
    path.unlink()  # another process has made room
    limited.put(example(7), taps_of(7))


def test_the_disk_is_never_filled(make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache()
    free = store.RESERVE_BYTES + cache.entry_bytes([(3, 8), (3, 8), (3, 5)])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))
    cache.put(example(1), taps_of(1))
    with pytest.raises(StorageError, match=r"a reserve of 268.4 MB on the disk, got 268.4 MB .*\. Make room"):
        cache.put(example(2), taps_of(2, rows=4))
    assert example(2) not in cache


def test_what_the_system_refuses_is_told(make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache()

    def refuse(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match=r"Writing to the cache: expected the disk to do so, got No space left"):
        cache.put(example(1), taps_of(1))
    monkeypatch.undo()
    assert example(1) not in cache
    assert not list(cache._folder.rglob(".partial-*"))


def test_what_a_killed_writer_left_is_removed_once_it_is_old(make_cache: MakeCache, tmp_path: Path) -> None:
    make_cache()
    old, young = (tmp_path / "cache" / f".partial-{name}" for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    make_cache()
    assert (old.exists(), young.exists()) == (False, True)


def test_what_is_read_ahead_is_got_and_bounded(make_cache: MakeCache) -> None:
    cache = make_cache()
    fill(cache, 100)
    cache.read_ahead(map(example, range(100)))
    assert len(cache._ahead) <= store._MOST_AHEAD
    for number in (99, 0, 50):
        got = cache.get(example(number))
        assert got is not None
        assert torch.equal(got[0], taps_of(number)[0])
    cache.read_ahead([example(99), example(99), example(1000)])
    assert cache.get(example(1000)) is None


def test_clearing_removes_a_cache_and_nothing_else(make_cache: MakeCache, tmp_path: Path) -> None:
    cache = make_cache()
    fill(cache)
    fill(make_cache(replace(IDENTITY, codec="bf16")))
    assert {identity.codec for identity, _ in identities_of(tmp_path / "cache")} == {"fp32", "bf16"}
    (tmp_path / "cache" / "mine.txt").write_text("mine")
    expected = sum(size for _, size in entries_of(tmp_path / "cache"))
    assert clear(tmp_path / "cache") == expected > 0
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["mine.txt"]
    with pytest.raises(CacheError, match=r"expected a folder with a cache.json"):
        clear(tmp_path / "cache")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2}'])
def test_a_folder_of_another_format_is_refused(make_cache: MakeCache, tmp_path: Path, text: str) -> None:
    make_cache()
    (tmp_path / "cache" / "cache.json").write_text(text)
    with pytest.raises(CacheError, match=r"of format 1, got none"):
        make_cache()


def test_an_identity_that_cannot_be_read_is_passed_over(make_cache: MakeCache, tmp_path: Path) -> None:
    make_cache()
    for number, text in enumerate(("{", "{}", json.dumps({"taps": [1], "colour": 2}))):
        (tmp_path / "cache" / str(number)).mkdir()
        (tmp_path / "cache" / str(number) / "identity.json").write_text(text)
    assert [identity for identity, _ in identities_of(tmp_path / "cache")] == [IDENTITY]
