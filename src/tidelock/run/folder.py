"""A run folder: everything that a run leaves behind.

    run.toml        the full configuration
    facts.json      versions, the model's shape, sizes of the data
    adapter/        the trained adapter
    model/          instead, the whole model, where all weights were trained
    adapter-all/    the same with the modules that a schedule has killed
    cache/          what a side network reads of the frozen blocks, encrypted
    checkpoints/    what --resume goes on from
    metrics.jsonl   one line each time something was measured
    profile.json    what was measured of a pool of devices
    layout.json     which of them compute what
    schedule.jsonl  one line for each period of the schedule: scores, what was killed and revived
    ledger.json     the bytes that crossed, by kind, in all and by epoch
    tensorboard/    what TensorBoard reads, when the run reports to it
    report.html     what `tidelock report` draws of all that
    report/         the same plots as PNG files

May import `run.config`, `wire.ledger`, errors and small libraries.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from tidelock.errors import CheckpointError, ConfigError, StorageError
from tidelock.run.config import RunConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tidelock.wire.ledger import Ledger

# Written last into a checkpoint: one without it was cut off in the writing.
_COMPLETE = "COMPLETE"
# In the line that Trainer logs when it is done.
_SUMMARY = "train_runtime"
_PROBE_BYTES = 1 << 20


@final
class RunFolder:
    """The files of one run.

    Args:
        path: The folder; see `create` and `open`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapter = path / "adapter"
        self.model = path / "model"
        self.adapter_all = path / "adapter-all"
        self.cache = path / "cache"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.schedule = path / "schedule.jsonl"
        self.facts = path / "facts.json"
        self.profile = path / "profile.json"
        self.timelines = path / "timelines.json"
        self.tensorboard = path / "tensorboard"
        self.page = path / "report.html"
        self.images = path / "report"
        self._toml = path / "run.toml"
        self._ledger = path / "ledger.json"
        self.layout = path / "layout.json"

    @classmethod
    def new(cls, path: Path) -> RunFolder:
        """Return a folder in which a run can begin; it is no run before `write_config`.

        Raises:
            ConfigError: There is a run in it already.
            StorageError: The file system refused.
        """
        folder = cls(path)
        if folder._toml.exists():
            msg = (
                f"Run folder: expected a new one, got one with a run in it ({path}). Resume it (train "
                "--resume, or pool resume), or choose another --out."
            )
            raise ConfigError(msg)
        try:
            folder.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            refusal = storage_error("Making the run folder", error, path)
            raise refusal from error
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Return an existing run folder.

        Raises:
            CheckpointError: There is no run in it.
        """
        folder = cls(path)
        if not folder._toml.is_file():
            msg = f"Run folder: expected one with a run.toml, got none ({path}). Check the path."
            raise CheckpointError(msg)
        return folder

    def config(self) -> RunConfig:
        """Return the run's configuration.

        Raises:
            CheckpointError: It cannot be read.
        """
        try:
            return RunConfig.from_toml(self._toml.read_text(encoding="utf-8"), self._toml)
        except (OSError, UnicodeDecodeError) as error:
            msg = f"Run configuration: expected a readable file, got {type(error).__name__} ({self._toml})."
            raise CheckpointError(msg) from error

    def write_config(self, config: RunConfig) -> None:
        """Write the configuration, with which the run begins.

        Raises:
            StorageError: The file system refused.
        """
        self._write(self._toml, config.to_toml())

    def write_facts(self, facts: str) -> None:
        """Write what the run is made of, as JSON.

        Raises:
            StorageError: The file system refused.
        """
        self._write(self.facts, facts + "\n")

    def write_profile(self, profile: str) -> None:
        """Write what was measured of a pool, as JSON.

        Raises:
            StorageError: The file system refused.
        """
        self._write(self.profile, profile + "\n")

    def write_timelines(self, timelines: str) -> None:
        """Write what the devices of a pool did when in a step, as JSON.

        Raises:
            StorageError: The file system refused.
        """
        self._write(self.timelines, timelines + "\n")

    def write_layout(self, layout: str) -> None:
        """Write which devices of a pool compute what, as JSON; what they did by an earlier layout goes.

        Raises:
            StorageError: The file system refused.
        """
        self.write_timelines("[]")
        self._write(self.layout, layout + "\n")

    def read_layout(self) -> str:
        """Return that JSON.

        Raises:
            CheckpointError: There is none: it was no run in a pool, or it had not begun.
        """
        try:
            return self.layout.read_text(encoding="utf-8")
        except OSError as error:
            msg = (
                f"Run folder: expected one of a pool, with a layout.json, got {error.strerror} ({self.layout}). Begin "
                "another run."
            )
            raise CheckpointError(msg) from error

    def read_facts(self) -> str:
        """Return the facts' JSON; what is not there is empty."""
        return self.facts.read_text(encoding="utf-8", errors="replace") if self.facts.is_file() else ""

    def write_report(self, page: str, images: Mapping[str, bytes]) -> list[Path]:
        """Write the report in place of an earlier one; return its files, the page first.

        Args:
            page: HTML.
            images: PNG files by name.

        Raises:
            StorageError: The file system refused.
        """
        try:
            self.images.mkdir(exist_ok=True)
            for path in self.images.glob("*.png"):
                path.unlink()
            for name, content in images.items():
                (self.images / name).write_bytes(content)
        except OSError as error:
            refusal = storage_error("Writing the report's plots", error, self.images)
            raise refusal from error
        self._write(self.page, page)
        return [self.page, *(self.images / name for name in images)]

    def latest_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint, or None."""
        return max(self._complete_checkpoints(), key=_step_of, default=None)

    def mark_complete(self, checkpoint: Path) -> None:
        """Say that everything of a checkpoint is written, and on the disk."""
        for path in sorted(checkpoint.iterdir()):
            _sync(path)
        (checkpoint / _COMPLETE).touch()
        _sync(checkpoint)
        _sync(self.checkpoints)

    def discard(self, checkpoint: Path) -> None:
        """Remove a checkpoint; one that cannot be removed whole is at least not taken for complete."""
        with contextlib.suppress(OSError):
            (checkpoint / _COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(checkpoint, ignore_errors=True)

    def keep_newest(self, count: int) -> None:
        """Remove all checkpoints but the newest complete ones."""
        kept = sorted(self._complete_checkpoints(), key=_step_of)[-count:]
        for path in set(self.checkpoints.glob("checkpoint-*")) - set(kept):
            self.discard(path)

    def write_ledger(self, ledger: Ledger) -> None:
        """Write what has crossed until now.

        Raises:
            StorageError: The file system refused.
        """
        totals = {**ledger.totals(), "epochs": ledger.epochs()}
        self._write(self._ledger, json.dumps(totals, indent=2, sort_keys=True) + "\n")

    def read_ledger(self) -> Ledger:
        """Return what had crossed: as the ledger says, or a line of metrics that was written after it."""
        # Loads torch, which --help of the commands that know run folders must not wait for.
        from tidelock.wire.ledger import Ledger  # noqa: PLC0415

        text = self._ledger.read_text(encoding="utf-8") if self._ledger.is_file() else "{}"
        ledger = Ledger()
        ledger.add(json.loads(text).get("epochs", []) if _is_json(text) else [])
        rows = [row for row in read_rows(self.metrics) if "bytes" in row]
        newest = max(rows, key=lambda row: _sum(row["bytes"]), default=None)
        if newest is not None and _sum(newest["bytes"]) > _sum(ledger.totals()):
            counted = {**newest["bytes"], "tokens": newest.get("tokens", {})}
            excess = _excess(counted, {**ledger.totals(), "tokens": ledger.tokens()})
            ledger.add([{"epoch": math.ceil(newest.get("epoch", 0)), **excess}])
        return ledger

    def keep_until(self, step: int) -> None:
        """Drop the lines of steps that will be done again, and the summary of a part of the run, which will come again.

        Raises:
            StorageError: The file system refused.
        """
        for path in (self.metrics, self.schedule):
            kept = [row for row in read_rows(path) if row.get("step", 0) <= step and _SUMMARY not in row]
            self._write(path, "".join(f"{json.dumps(row)}\n" for row in kept))

    def metric(self, step: int, name: str) -> float | None:
        """Return what was measured at a step, or None."""
        return next((row[name] for row in read_rows(self.metrics) if row.get("step") == step and name in row), None)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one line to the metrics.

        Raises:
            StorageError: The file system refused.
        """
        self._append(self.metrics, row)

    def append_schedule(self, row: Mapping[str, Any]) -> None:
        """Add one line to what became of the schedule's periods.

        Raises:
            StorageError: The file system refused.
        """
        self._append(self.schedule, row)

    def _complete_checkpoints(self) -> list[Path]:
        return [path for path in self.checkpoints.glob("checkpoint-*") if (path / _COMPLETE).is_file()]

    def _append(self, path: Path, row: Mapping[str, Any]) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            refusal = storage_error(f"Writing {path.name}", error, path)
            raise refusal from error

    def _write(self, path: Path, text: str) -> None:
        """Write a file whole or not at all."""
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_text(text, encoding="utf-8")
            _sync(partial)
            partial.replace(path)
        except OSError as error:
            refusal = storage_error(f"Writing {path.name}", error, path)
            raise refusal from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a JSON Lines file that are whole; none when it is not there."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if _is_json(line)]


def _sum(totals: Mapping[str, Mapping[str, int]]) -> int:
    return sum(sum(sizes.values()) for sizes in totals.values())


def _excess(more: Mapping[str, Mapping[str, int]], less: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """Return what a ledger's counts have that its earlier ones had not."""
    return {way: {kind: size - less[way].get(kind, 0) for kind, size in sizes.items()} for way, sizes in more.items()}


def storage_error(doing: str, error: Exception, path: Path) -> StorageError:
    """Return our error for a refusal of the file system.

    Args:
        doing: What was being done.
        error: What the system said, or a library about it.
        path: What was being written.
    """
    if not isinstance(error, OSError):
        error = _refusal_of_disk(path.parent) or error
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    is_full = isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}
    advice = "Make room" if is_full else "Check disk and permissions"
    return StorageError(f"{doing}: expected the disk to take it, got {reason} ({path}). {advice}, then resume.")


def _refusal_of_disk(folder: Path) -> OSError | None:
    """Return what the system says to a write there; PyTorch keeps it to itself."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
    except OSError as error:
        return error
    return None


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_json(text: str) -> bool:
    """Return whether a file or its last line was not cut off where the process was killed."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _sync(path: Path) -> None:
    """Have the disk hold what was written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
