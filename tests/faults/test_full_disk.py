"""A disk that refuses: a limit on the size of files, or /dev/full in place of one, which is full as a disk can be."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.inject import Place, fill_disk, limit_files
from tests.faults.world import Cloud, Run, World, check_equal

needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@pytest.mark.parametrize(
    ("size_bytes", "file"),
    [(5_000, "model.safetensors"), (24_000, "optimizer.pt")],
)
def test_what_a_library_writes_and_the_system_refuses(
    world: World, cloud: Cloud, undisturbed: Run, size_bytes: int, file: str
) -> None:
    newest = undisturbed.out / "checkpoints" / "checkpoint-12"
    too_large = {path.name for path in newest.iterdir() if path.stat().st_size > size_bytes}
    assert file in too_large
    assert ("model.safetensors" in too_large) == (file == "model.safetensors")  # which is written first
    name = f"limited-{size_bytes}"
    run = world.train(name, cloud.address, hook=limit_files(Place.SAVED, 1, size_bytes))
    check_refused(run, "File too large", "Check disk and permissions")
    check_equal(world.resume(run), undisturbed)


@needs_dev_full
def test_the_last_file_of_a_checkpoint(world: World, cloud: Cloud, undisturbed: Run) -> None:
    path = world.folder / "full-state" / "checkpoints" / "checkpoint-4" / "trainer_state.json"
    # Once the checkpoint before it is there, which clears away what is left of others.
    run = world.train("full-state", cloud.address, hook=fill_disk(Place.SAVED, 1, path))
    check_refused(run, "No space left on device", "Make room")
    check_equal(world.resume(run), undisturbed)


def check_refused(run: Run, reason: str, advice: str) -> None:
    assert run.process.wait() == 6
    asked = "Writing a checkpoint: expected the disk to take it"
    where = run.out / "checkpoints" / "checkpoint-4"
    last = run.process.stderr.splitlines()[-1]
    assert last == f"error: {asked}, got {reason} ({where}). {advice}, then resume."
    assert "Traceback" not in run.process.stderr
    assert run.checkpoints == [2]
    assert not where.exists()


@needs_dev_full
def test_at_a_line_of_metrics(world: World, cloud: Cloud, undisturbed: Run) -> None:
    metrics = world.folder / "full-metrics" / "metrics.jsonl"
    run = world.train("full-metrics", cloud.address, hook=fill_disk(Place.SITE_FORWARD, 1, metrics))
    assert run.process.wait() == 6
    last = run.process.stderr.splitlines()[-1]
    assert last.startswith("error: Writing metrics.jsonl: expected the disk to take it, got No space left on device (")
    metrics.unlink()
    check_equal(world.resume(run), undisturbed)
