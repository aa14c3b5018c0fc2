from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.support.run_folder import new_run_folder
from tidelock.errors import CheckpointError, ConfigError, StorageError
from tidelock.run.config import RunConfig
from tidelock.run.folder import RunFolder, read_rows, storage_error
from tidelock.wire.ledger import Kind, Ledger


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return new_run_folder(RunConfig(data="facts.jsonl", out=str(tmp_path / "deep" / "run"), model="m"))


def checkpoint(folder: RunFolder, step: int, *, complete: bool = True) -> Path:
    path = folder.checkpoints / f"checkpoint-{step}"
    path.mkdir()
    (path / "weights").write_text(str(step))
    if complete:
        folder.mark_complete(path)
    return path


def refuse(*_args: object, **_kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_new_folder_is_a_run_once_its_configuration_is_written(tmp_path: Path) -> None:
    folder = RunFolder.new(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"expected one with a run\.toml, got none"):
        RunFolder.open(tmp_path / "run")
    # Whoever failed before that may try again.
    assert RunFolder.new(tmp_path / "run").path == folder.path
    config = RunConfig(data="facts.jsonl", out=str(tmp_path / "run"), model="m", rank=3)
    folder.write_config(config)
    assert RunFolder.open(tmp_path / "run").config() == config
    with pytest.raises(ConfigError, match="got one with a run in it"):
        RunFolder.new(tmp_path / "run")


def test_a_configuration_that_cannot_be_read(folder: RunFolder) -> None:
    (folder.path / "run.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="expected a readable file, got UnicodeDecodeError"):
        folder.config()
    (folder.path / "run.toml").unlink()
    with pytest.raises(CheckpointError, match="expected a readable file, got FileNotFoundError"):
        folder.config()


def test_a_place_for_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Making the run folder: expected the disk to take it, got Not a directory"):
        RunFolder.new(tmp_path / "file" / "run")


def test_the_latest_checkpoint_is_the_newest_complete_one(folder: RunFolder) -> None:
    assert folder.latest_checkpoint() is None
    checkpoint(folder, 9)
    tenth = checkpoint(folder, 10)
    checkpoint(folder, 11, complete=False)
    assert folder.latest_checkpoint() == tenth


def test_the_newest_complete_checkpoints_are_kept(folder: RunFolder) -> None:
    for step in (8, 9, 10):
        checkpoint(folder, step)
    checkpoint(folder, 7, complete=False)
    checkpoint(folder, 12, complete=False)
    folder.keep_newest(2)
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["checkpoint-10", "checkpoint-9"]


def test_a_checkpoint_that_cannot_be_removed_is_not_taken_for_complete(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(folder, 3)
    monkeypatch.setattr(shutil, "rmtree", lambda *_args, **_kwargs: None)
    folder.discard(path)
    assert path.exists()
    assert folder.latest_checkpoint() is None
    folder.discard(folder.checkpoints / "checkpoint-99")  # not there: nothing to do


def test_metrics_are_kept_up_to_a_step_without_summaries_and_broken_lines(folder: RunFolder) -> None:
    rows: list[dict[str, float]] = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.0},
        {"step": 2, "train_runtime": 5.0},
        {"step": 3},
    ]
    for row in rows:
        folder.append_metrics(row)
    with folder.metrics.open("a") as file:
        file.write('{"step": 2, "lo')
    folder.keep_until(2)
    assert [json.loads(line) for line in folder.metrics.read_text().splitlines()] == rows[:2]
    assert folder.metric(2, "loss") == 1.0
    assert folder.metric(2, "eval_loss") is None
    assert folder.metric(3, "loss") is None


def test_periods_of_steps_that_will_be_done_again_are_dropped(folder: RunFolder) -> None:
    for step in (2, 4, 6):
        folder.append_schedule({"period": step // 2 - 1, "step": step})
    folder.keep_until(5)
    assert [row["step"] for row in read_rows(folder.schedule)] == [2, 4]


def test_without_metrics_there_are_none_to_keep(folder: RunFolder) -> None:
    folder.keep_until(5)
    assert folder.metrics.read_text() == ""


def a_ledger(*sizes: int) -> Ledger:
    """Return a ledger with embeddings of these sizes, one an epoch."""
    ledger = Ledger()
    for epoch, size_bytes in enumerate(sizes, start=1):
        ledger.begin_epoch(epoch)
        ledger.sent(Kind.EMBEDDING, size_bytes)
    return ledger


def test_the_ledger_is_what_was_written_last(folder: RunFolder) -> None:
    assert folder.read_ledger().epochs() == []
    folder.write_ledger(a_ledger(2, 3))
    assert folder.read_ledger().epochs() == a_ledger(2, 3).epochs()
    assert json.loads((folder.path / "ledger.json").read_text())["sent"] == {"embedding": 5}
    # A line of metrics that came after it, before the process was killed.
    folder.append_metrics({"step": 7, "epoch": 2.5, "bytes": {"sent": {"embedding": 6}, "received": {"control": 1}}})
    expected = a_ledger(2, 3, 1)
    expected.received(Kind.CONTROL, 1)
    assert folder.read_ledger().epochs() == expected.epochs()
    folder.write_ledger(a_ledger(8))
    assert folder.read_ledger().epochs() == a_ledger(8).epochs()
    (folder.path / "ledger.json").write_text('{"sent": {"embe')
    assert folder.read_ledger().totals() == {"sent": {"embedding": 6}, "received": {"control": 1}}


def test_a_refusing_disk_is_a_storage_error(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_ledger(a_ledger(5))
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(StorageError, match=r"^Writing metrics.jsonl: .*No space left on device .*Make room"):
        folder.append_metrics({"step": 1})
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match=r"Writing ledger\.json: .*No space left on device"):
        folder.write_ledger(a_ledger(6))
    assert folder.read_ledger().totals()["sent"] == {"embedding": 5}


def test_a_refusal_says_what_the_system_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint-3"
    error = storage_error("Saving", PermissionError(errno.EACCES, "Permission denied"), path)
    assert error.message == (
        f"Saving: expected the disk to take it, got Permission denied ({path}). Check disk and permissions, then "
        "resume."
    )
    assert "got odd (" in storage_error("Saving", OSError("odd"), path).message
    # A library's own words are used where the disk takes what it refused a moment ago.
    libraries = RuntimeError("unexpected pos 64 vs 0")
    assert "got unexpected pos 64 vs 0 (" in storage_error("Saving", libraries, path).message
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    said = storage_error("Saving", libraries, path).message
    assert "got No space left on device (" in said
    assert "Make room" in said
