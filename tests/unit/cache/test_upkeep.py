"""Whole caches: what is in one is said without a key, and every entry is read whatever it is of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.cache.conftest import IDENTITY, MakeCache, all_files, entries_in, fill, verified
from tidelock.cache.folder import CacheFolder
from tidelock.cache.key import CacheKey
from tidelock.cache.upkeep import clear, groups_of, verify
from tidelock.errors import CacheError, StorageError

OTHER = replace(IDENTITY, codec="int8")


def test_what_is_in_a_cache(make_cache: MakeCache, folder: Path) -> None:
    paths = {IDENTITY: fill(make_cache()), OTHER: fill(make_cache(OTHER), range(2))}
    groups = groups_of(folder)
    assert {group.identity: group.entries for group in groups} == {IDENTITY: 5, OTHER: 2}
    for group in groups:
        assert group.identity is not None
        assert group.size_bytes == sum(path.stat().st_size for path in paths[group.identity])
        assert group.name == group.identity.group


def test_every_entry_is_read_whatever_it_is_of(make_cache: MakeCache, folder: Path, key: CacheKey) -> None:
    fill(make_cache())
    damaged, *_ = fill(make_cache(OTHER))
    for path in folder.glob("*/identity.json"):
        path.write_text("{")
    damaged.write_bytes(b"damaged")
    before = all_files(folder)
    assert verified(folder, key) == (9, [damaged])
    assert [group.identity for group in groups_of(folder)] == [None, None]
    assert all_files(folder) == before
    assert verified(folder, key, remove=True) == (9, [damaged])
    assert verified(folder, key) == (9, [])
    assert len(entries_in(folder)) == 9


def test_another_key_removes_nothing(make_cache: MakeCache, folder: Path, other_key: CacheKey) -> None:
    fill(make_cache())
    before = all_files(folder)
    with pytest.raises(CacheError, match=r"expected the key"):
        verified(folder, other_key, remove=True)
    assert all_files(folder) == before


def test_an_entry_that_is_removed_meanwhile_is_passed_over(
    make_cache: MakeCache, folder: Path, key: CacheKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(make_cache())
    listed, entries = entries_in(folder), CacheFolder.entries

    def entries_of_which_one_goes(self: CacheFolder, group: Path) -> Iterator[tuple[Path, int]]:
        for path, size in entries(self, group):
            if path == listed[2]:
                path.unlink()
            yield path, size

    monkeypatch.setattr(CacheFolder, "entries", entries_of_which_one_goes)
    assert list(verify(folder, key)) == [(path, True) for path in listed if path != listed[2]]


@pytest.mark.parametrize("call", [groups_of, clear])
def test_what_is_no_cache_is_refused(tmp_path: Path, key: CacheKey, call) -> None:
    with pytest.raises(CacheError, match=r"expected a folder with a cache.json"):
        call(tmp_path)
    with pytest.raises(CacheError, match=r"expected a folder with a cache.json"):
        verified(tmp_path, key)
    assert key.path.exists()


def test_what_the_system_refuses_is_told(
    make_cache: MakeCache, folder: Path, key: CacheKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(make_cache())

    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(CacheFolder, "entries", refuse)
    for call in (groups_of, lambda path: verified(path, key)):
        with pytest.raises(StorageError, match=r"Reading the cache: .*, got Input/output error"):
            call(folder)
