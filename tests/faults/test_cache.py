"""A cache whose writers are killed, or are two at once: every entry is whole or not there."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.unit.cache.conftest import IDENTITY, example, taps_of
from tidelock.cache.key import CacheKey
from tidelock.cache.store import ActivationCache, entries_of

# Writes entries; at the given one stops for good where half of its bytes are written, and says so.
_WRITER = """
import sys, time
from pathlib import Path
from tests.unit.cache.conftest import IDENTITY, example, taps_of
from tidelock.cache.key import CacheKey
from tidelock.cache.store import ActivationCache

folder, first, count, stop_at = Path(sys.argv[1]), *map(int, sys.argv[2:])
cache = ActivationCache(folder / "cache", CacheKey.open(folder / "key"), IDENTITY)
print("ready", flush=True)
sys.stdin.readline()
for number in range(first, first + count):
    if number == stop_at:
        write = Path.open
        def half(path, *args, **kwargs):
            file = write(path, *args, **kwargs)
            if ".partial-" in path.name:
                file.write(b"half"); file.flush()
                print("half", flush=True)
                time.sleep(600)
            return file
        Path.open = half
    cache.put(example(number), taps_of(number))
print("done", flush=True)
"""


def start(folder: Path, first: int, count: int, stop_at: int = -1) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(folder), str(first), str(count), str(stop_at)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def tell(process: subprocess.Popen[str], expected: str) -> None:
    """Let a process go on once it has said what was expected."""
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline().strip() == expected
    if expected == "ready":
        process.stdin.write("\n")
        process.stdin.flush()


@pytest.fixture
def opened(tmp_path: Path):
    caches: list[ActivationCache] = []

    def make() -> ActivationCache:
        caches.append(ActivationCache(tmp_path / "cache", CacheKey.open(tmp_path / "key"), IDENTITY))
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()


def test_a_writer_killed_half_way_leaves_whole_entries(tmp_path: Path, opened) -> None:
    with start(tmp_path, 0, 9, stop_at=4) as writer:
        tell(writer, "ready")
        tell(writer, "half")
        writer.send_signal(signal.SIGKILL)
        assert writer.wait(30) == -signal.SIGKILL
    assert len(list((tmp_path / "cache").rglob(".partial-*"))) == 1
    cache = opened()
    assert cache.verify() == (4, [])
    assert list(cache.missing(map(example, range(9)))) == [4, 5, 6, 7, 8]
    for number in cache.missing(map(example, range(9))):
        cache.put(example(number), taps_of(number))
    assert cache.verify() == (9, [])


def test_two_processes_write_one_cache(tmp_path: Path, opened) -> None:
    with start(tmp_path, 0, 60) as one, start(tmp_path, 30, 60) as other:
        for writer in (one, other):
            tell(writer, "ready")
        for writer in (one, other):
            tell(writer, "done")
            assert writer.wait(30) == 0
    cache = opened()
    assert cache.verify() == (90, [])
    assert len(list(entries_of(tmp_path / "cache"))) == 90
    got = cache.get(example(45))
    assert got is not None
    assert torch.equal(got[2], taps_of(45)[2])
