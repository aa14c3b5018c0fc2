"""The files of a cache: made once, locked, counted, and removed with nothing else."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from filelock import FileLock

from tests.unit.cache.conftest import IDENTITY, MakeCache, all_files, entries_in, example, fill, is_kept, taps_of
from tidelock.cache import folder as module
from tidelock.cache.folder import CacheFolder
from tidelock.cache.key import CacheKey
from tidelock.cache.store import ActivationCache
from tidelock.errors import CacheError, ConfigError, StorageError

OTHER = replace(IDENTITY, codec="bf16")


def counted(folder: Path) -> int:
    return int((folder / "usage").read_text())


def test_its_files_are_those_of_the_module(make_cache: MakeCache, folder: Path) -> None:
    (entry,) = fill(make_cache(), range(1))
    group, shard, name = entry.relative_to(folder).parts
    assert {path.relative_to(folder).as_posix() for path in all_files(folder)} == {
        *("cache.json", "lock", "usage", f"{group}/identity.json", f"{group}/{shard}/{name}")
    }
    listed = [line.split()[0] for line in (module.__doc__ or "").splitlines() if line.startswith("    ")]
    assert listed == [
        "cache.json",
        "lock",
        "usage",
        "<identity>/identity.json",
        "<identity>/<2",
    ]
    assert name[:2] == shard
    assert {path.stat().st_mode & 0o077 for path in (entry, folder / "cache.json", folder / "usage")} == {0}


def test_another_key_changes_nothing(make_cache: MakeCache, folder: Path, other_key: CacheKey) -> None:
    fill(make_cache())
    before = all_files(folder)
    with pytest.raises(CacheError, match=r"expected the key that it was made with, got another .* Nothing was changed"):
        make_cache(with_key=other_key)
    with pytest.raises(CacheError, match=r"expected the key"):
        CacheFolder.open(folder, other_key)
    assert all_files(folder) == before


def test_a_key_inside_the_cache_is_refused(make_cache: MakeCache, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    for path in (folder / "key", tmp_path / "link" / "key"):
        with pytest.raises(ConfigError, match=r"expected it outside of the cache that it opens"):
            make_cache(with_key=CacheKey.open(path))


def test_a_folder_with_other_files_is_refused_and_left_as_it_is(make_cache: MakeCache, folder: Path) -> None:
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"expected a new folder or a cache, got one with other files"):
        make_cache()
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_a_file_in_its_place_is_refused(make_cache: MakeCache, folder: Path) -> None:
    folder.write_text("mine")
    with pytest.raises(StorageError, match=r"Opening the cache: expected the file system to do it, got File exists"):
        make_cache()


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2, "key_check": "x"}', '{"format": 1}', "[" * 100_000])
def test_a_folder_of_another_format_is_refused(make_cache: MakeCache, folder: Path, text: str) -> None:
    fill(make_cache(), range(1))
    (folder / "cache.json").write_text(text)
    with pytest.raises(CacheError, match=r"of format 1, got none"):
        make_cache()
    assert len(entries_in(folder)) == 1


def test_one_whose_making_was_cut_off_is_made_again(make_cache: MakeCache, folder: Path) -> None:
    folder.mkdir()
    for name in (".cache.json.x1y2.partial", "lock", "usage"):
        (folder / name).write_text("")
    fill(make_cache())
    assert not list(folder.glob(".*"))


def test_what_killed_writers_left_is_removed_and_nothing_else(make_cache: MakeCache, folder: Path) -> None:
    (entry, *_) = fill(make_cache())
    left = [place / ".x.1.partial" for place in (folder, entry.parent, entry.parent.parent)]
    mine = entry.parent / "mine.partial"
    for path in (*left, mine):
        path.write_text("half")
    again = make_cache()
    assert [path.exists() for path in (*left, mine)] == [False, False, False, True]
    assert all(is_kept(again, number) for number in range(5))


def test_what_entries_take_is_counted(make_cache: MakeCache, folder: Path) -> None:
    cache = make_cache()
    fill(cache)
    total = sum(path.stat().st_size for path in entries_in(folder))
    assert counted(folder) == total
    entries_in(folder)[0].write_bytes(b"damaged")
    for number in range(5):
        cache.get(example(number))
    assert counted(folder) == sum(path.stat().st_size for path in entries_in(folder)) < total


@pytest.mark.parametrize("text", ["", "\0" * 21, "12\n", "9" * 20])
def test_a_damaged_count_is_made_anew(make_cache: MakeCache, folder: Path, text: str) -> None:
    cache = make_cache()
    fill(cache)
    (folder / "usage").write_text(text)
    cache.put(example(9), taps_of(9))
    assert counted(folder) == sum(path.stat().st_size for path in entries_in(folder))


def test_a_write_that_is_interrupted_is_not_counted(make_cache: MakeCache, folder: Path) -> None:
    cache = make_cache()
    fill(cache)
    before = all_files(folder)

    def interrupted(_file: object) -> None:
        raise KeyboardInterrupt

    with cache._folder.locked(), pytest.raises(KeyboardInterrupt):
        cache._folder.add(cache._path(example(9)), 1000, interrupted)
    assert all_files(folder) == before


def test_opening_counts_anew(make_cache: MakeCache, folder: Path) -> None:
    fill(make_cache())
    (folder / "usage").write_text(f"{10**9:020d}\n")
    make_cache()
    assert counted(folder) == sum(path.stat().st_size for path in entries_in(folder))


def test_what_it_is_of_is_written_again_where_it_was_damaged(make_cache: MakeCache, folder: Path) -> None:
    fill(make_cache())
    (path,) = folder.glob("*/identity.json")
    good = path.read_bytes()
    changed = json.dumps({**json.loads(good), "tap_width": 9}).encode()
    for text in (b"{", b"{}", b'{"taps": 1}', changed, b"[" * 100_000):
        path.write_bytes(text)
        assert CacheFolder.open(folder).groups() == [(path.parent, None)]
        cache = make_cache()
        assert path.read_bytes() == good
        assert all(is_kept(cache, number) for number in range(5))


def test_a_lock_that_is_not_given_up_is_an_error(
    make_cache: MakeCache, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cache()
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.05)
    with FileLock(folder / "lock"), pytest.raises(StorageError, match=r"expected a turn to write within 0 s, got none"):
        make_cache()
    fill(make_cache())


def test_threads_write_at_once(make_cache: MakeCache, folder: Path) -> None:
    cache = make_cache()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: cache.put(example(number % 20), taps_of(number % 20)), range(60)))
    assert len(entries_in(folder)) == 20
    assert counted(folder) == sum(path.stat().st_size for path in entries_in(folder))
    assert all(is_kept(cache, number) for number in range(20))


def test_clearing_removes_a_cache_and_nothing_else(make_cache: MakeCache, folder: Path) -> None:
    entries = [*fill(make_cache()), *fill(make_cache(OTHER))]
    (entries[0].parents[1] / "identity.json").write_text("{")  # damaged: cleared all the same
    (entries[1].parent / ".x.1.partial").write_text("half")
    mine = [entries[0].with_name("mine"), entries[-1].parents[1] / "mine", folder / "mine"]
    for path in mine:
        path.write_text("mine")
    expected = sum(path.stat().st_size for path in entries)
    assert CacheFolder.open(folder).clear() == expected > 0
    assert sorted(all_files(folder)) == sorted(mine)
    with pytest.raises(CacheError, match=r"expected a folder with a cache.json"):
        CacheFolder.open(folder)


def test_clearing_that_was_cut_off_is_done_again(
    make_cache: MakeCache, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(make_cache())
    unlink, calls = Path.unlink, []

    def refuse_the_third(path: Path, *, missing_ok: bool = False) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise OSError(5, "Input/output error")
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse_the_third)
    with pytest.raises(StorageError, match=r"Clearing the cache: .*, got Input/output error"):
        CacheFolder.open(folder).clear()
    monkeypatch.undo()
    assert len(entries_in(folder)) == 3
    CacheFolder.open(folder).clear()
    assert not folder.exists()


def test_one_that_another_process_makes_meanwhile_is_used(
    make_cache: MakeCache, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterdir = Path.iterdir

    def make_it_first(path: Path) -> Iterator[Path]:
        monkeypatch.undo()
        fill(make_cache())
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", make_it_first)
    assert is_kept(make_cache(), 4)


def test_what_the_system_refuses_for_what_it_is_of_is_told(
    make_cache: MakeCache, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache()
    (folder / OTHER.group).write_text("mine")
    with pytest.raises(StorageError, match=r"Opening the cache: .*, got File exists"):
        make_cache(OTHER)
    fill(cache)


def test_a_folder_that_is_gone_has_nothing_in_it(folder: Path) -> None:
    assert (CacheFolder(folder).groups(), CacheFolder(folder).leftovers()) == ([], [])


def test_links_in_a_cache_are_not_followed(make_cache: MakeCache, folder: Path, tmp_path: Path) -> None:
    make_cache()
    (tmp_path / "elsewhere" / "ab").mkdir(parents=True)
    (tmp_path / "elsewhere" / "ab" / ("a" * 64)).write_text("mine")
    (folder / ("c" * 32)).symlink_to(tmp_path / "elsewhere")
    CacheFolder.open(folder).clear()
    assert (tmp_path / "elsewhere" / "ab" / ("a" * 64)).read_text() == "mine"


@pytest.fixture
def no_rights() -> Iterator[Path]:
    """Return a cache's folder in which this process may not write, whoever it is."""
    with TemporaryDirectory() as name:
        folder = Path(name, "cache")
        yield folder
        if os.getuid() == 0:
            os.seteuid(0)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o700)


def give_up_rights(folder: Path, key: CacheKey) -> CacheKey:
    """Take the right to write away; return a key that can still be compared."""
    for path in (folder.parent, folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    if os.getuid() == 0:
        os.seteuid(65534)  # root may write everywhere
    return CacheKey(Path("/nowhere/key"), key.secret)


def test_without_the_right_to_write_it_is_an_error_and_nothing_changes(no_rights: Path, key: CacheKey) -> None:
    cache = ActivationCache(no_rights, key, IDENTITY)
    (damaged, *_) = fill(cache)
    damaged.write_bytes(b"damaged")
    before = all_files(no_rights)
    same = give_up_rights(no_rights, key)
    with pytest.raises(StorageError, match=r"got Permission denied .*\. Check disk and permissions"):
        ActivationCache(no_rights, same, IDENTITY)
    with pytest.raises(StorageError, match=r"got Permission denied"):
        cache.put(example(9), taps_of(9))
    with pytest.raises(StorageError, match=r"Clearing the cache: .*|Taking the cache's lock: .*"):
        CacheFolder.open(no_rights).clear()
    assert is_kept(cache, 1)
    assert (cache.get(example(0)), cache.damaged) == (None, 1)  # cannot be removed, and is not believed
    cache.close()
    assert all_files(no_rights) == before


def test_an_entry_that_may_not_be_read_is_an_error(no_rights: Path, key: CacheKey) -> None:
    cache = ActivationCache(no_rights, key, IDENTITY)
    (entry, *_) = fill(cache)
    give_up_rights(no_rights, key)
    if os.getuid() == 0:
        os.seteuid(0)
    entry.chmod(0o000)
    if os.getuid() == 0:
        os.seteuid(65534)
    with pytest.raises(StorageError, match=r"Reading the cache: .* got Permission denied"):
        cache.get(example(0))
    assert re.fullmatch(r"[0-9a-f]{64}", entry.name)
    assert entry.exists()
    cache.close()
