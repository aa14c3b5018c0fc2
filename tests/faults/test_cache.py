"""A cache whose writers are killed, refused by the disk, or many at once: every entry is whole or not there."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.cache_writer import large
from tests.unit.cache.conftest import IDENTITY, entries_in, example, is_kept, taps_of, verified
from tidelock.cache.key import CacheKey
from tidelock.cache.store import ActivationCache


def open_cache(folder: Path) -> ActivationCache:
    return ActivationCache(folder / "cache", CacheKey.open(folder / "key"), IDENTITY)


def check(folder: Path, entries: int) -> None:
    """Fail unless a cache has so many entries, all of them right, counts them, and has nothing half written."""
    assert verified(folder / "cache", CacheKey.open(folder / "key")) == (entries, [])
    sizes = [path.stat().st_size for path in entries_in(folder / "cache")]
    assert len(sizes) == entries
    assert int((folder / "cache" / "usage").read_text()) == sum(sizes)
    assert not list((folder / "cache").rglob(".*.partial"))


def start(
    folder: Path, first: int, count: int, *, struck: int = -1, fault: str = "", limit: int = 0
) -> subprocess.Popen[str]:
    args = map(str, (folder, first, count, struck, fault, limit))
    command = [sys.executable, "-m", "tests.faults.cache_writer", *args]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def let_go(*processes: subprocess.Popen[str]) -> list[str]:
    """Let processes begin once all are ready; return what each said last."""
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return [process.communicate(timeout=90)[0].strip() for process in processes]


@pytest.mark.parametrize("fault", ["mid-write", "before-rename"])
def test_a_writer_killed_half_way_leaves_whole_entries(tmp_path: Path, fault: str) -> None:
    with start(tmp_path, 0, 9, struck=4, fault=fault) as writer:
        (said,) = let_go(writer)
        assert writer.wait(30) == -signal.SIGKILL
    (left,) = (tmp_path / "cache").rglob(".*.partial")
    struck_at = int(said.removeprefix("struck at "))
    assert 0 < struck_at <= left.stat().st_size
    assert len(entries_in(tmp_path / "cache")) == 4
    cache = open_cache(tmp_path)
    whole = cache.entry_bytes([(len(tensor), tensor.shape[1]) for tensor in large(4)])
    assert (struck_at == whole) == (fault == "before-rename")
    check(tmp_path, 4)
    missing = list(cache.missing(map(example, range(9))))
    assert missing == [4, 5, 6, 7, 8]
    for number in missing:
        cache.put(example(number), taps_of(number))
    assert all(is_kept(cache, number) for number in range(9))
    check(tmp_path, 9)


def test_a_disk_that_refuses_costs_that_entry_only(tmp_path: Path) -> None:
    with start(tmp_path, 0, 9, struck=4, fault="limit") as writer:
        (said,) = let_go(writer)
    asked = "StorageError: Writing an entry of the cache: expected the file system to do it, got File too large ("
    assert said.startswith(asked)
    check(tmp_path, 4)
    assert all(is_kept(open_cache(tmp_path), number) for number in range(4))


def test_processes_make_and_write_one_cache_at_once(tmp_path: Path) -> None:
    with start(tmp_path, 0, 40) as one, start(tmp_path, 20, 40) as two, start(tmp_path, 20, 40) as three:
        assert let_go(one, two, three) == ["done"] * 3
    check(tmp_path, 60)
    cache = open_cache(tmp_path)
    assert all(is_kept(cache, number) for number in range(60))


def test_processes_keep_one_limit_together(tmp_path: Path) -> None:
    size = open_cache(tmp_path).entry_bytes([(len(tensor), tensor.shape[1]) for tensor in taps_of(0)])
    limit = 50 * size
    with start(tmp_path, 0, 40, limit=limit) as one, start(tmp_path, 100, 40, limit=limit) as other:
        said = let_go(one, other)
    refused = [line for line in said if line.startswith("StorageError: Writing to the cache: expected room for 316 B")]
    assert refused
    assert set(said) - {"done"} == set(refused)
    check(tmp_path, 50)
