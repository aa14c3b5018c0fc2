"""Files that are whole and on the disk, or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tidelock.cache.files import storage_error, whole_file
from tidelock.errors import StorageError


def write(path: Path) -> None:
    with whole_file(path, "x") as file:
        file.write(b"new")


def test_a_file_takes_its_place_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    with whole_file(path, "x") as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
        (partial,) = tmp_path.glob(".x.*.partial")
        assert partial.read_text() == "new"
    assert [(item.name, item.read_text()) for item in tmp_path.iterdir()] == [("x", "new")]
    assert path.stat().st_mode & 0o777 == 0o600


def test_it_is_on_the_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, sync, replace = [], os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        sync(descriptor)

    def replaced(path: Path, target: Path) -> Path:
        done.append("replaced")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    write(tmp_path / "x")
    assert done[0].endswith(".partial")
    assert done[1:] == ["replaced", tmp_path.name]


@pytest.mark.parametrize("refused", ["os.fsync", "os.fdopen", "tempfile.mkstemp"])
def test_a_refusal_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(refused, refuse)
    with pytest.raises(StorageError, match=r"^Writing x: .*, got No space left on device \(.*x\)\. Make room"):
        write(path)
    assert [(item.name, item.read_text()) for item in tmp_path.iterdir()] == [("x", "old")]


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "x", "x"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_advice_depends_on_the_refusal(tmp_path: Path) -> None:
    full = storage_error("Writing", OSError(errno.EDQUOT, "Disk quota exceeded"), tmp_path)
    other = storage_error("Writing", OSError("odd"), tmp_path)
    assert "Make room" in full.message
    assert "got odd (" in other.message
    assert "Check disk and permissions" in other.message
