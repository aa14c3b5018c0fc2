"""A run folder: everything that a run leaves behind.

    run.toml        the full configuration
    adapter/        the trained adapter, in PEFT's format
    checkpoints/    what --resume goes on from
    metrics.jsonl   one line each time something was measured
    ledger.json     the bytes that crossed, by kind

May import `run.config`, `wire.ledger`, errors and small libraries.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from tidelock.errors import CheckpointError, ConfigError, StorageError
from tidelock.run.config import RunConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

# Written last into a checkpoint: one without it was cut off in the writing.
_COMPLETE = "COMPLETE"


@final
class RunFolder:
    """The files of one run.

    Args:
        path: The folder; see `create` and `open`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapter = path / "adapter"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self._toml = path / "run.toml"
        self._ledger = path / "ledger.json"

    @classmethod
    def create(cls, config: RunConfig) -> RunFolder:
        """Return a new run folder with its configuration written.

        Raises:
            ConfigError: There is a run in it already.
            StorageError: The file system refused.
        """
        folder = cls(Path(config.out))
        if folder._toml.exists():
            msg = (
                f"Run folder: expected a new one, got one with a run in it ({folder.path}). Go on with it by --resume, "
                "or choose another --out."
            )
            raise ConfigError(msg)
        folder.checkpoints_ready()
        folder._write(folder._toml, config.to_toml())
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

    def checkpoints_ready(self) -> None:
        """Make the folders."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            refusal = storage_error("Making the run folder", error, self.path)
            raise refusal from error

    def latest_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint, or None."""
        complete = [path for path in self.checkpoints.glob("checkpoint-*") if (path / _COMPLETE).is_file()]
        return max(complete, key=_step_of, default=None)

    def mark_complete(self, checkpoint: Path) -> None:
        """Say that everything of a checkpoint is written, and on the disk."""
        for path in sorted(checkpoint.iterdir()):
            _sync(path)
        (checkpoint / _COMPLETE).touch()
        _sync(checkpoint)

    def discard(self, checkpoint: Path) -> None:
        """Remove what a failed write left, so that nothing half-written stays."""
        shutil.rmtree(checkpoint, ignore_errors=True)

    def write_ledger(self, totals: Mapping[str, Any]) -> None:
        """Write the ledger's totals.

        Raises:
            StorageError: The file system refused.
        """
        self._write(self._ledger, json.dumps(totals, indent=2, sort_keys=True) + "\n")

    def read_ledger(self) -> dict[str, dict[str, int]]:
        """Return the totals written last, or empty ones."""
        try:
            totals: dict[str, dict[str, int]] = json.loads(self._ledger.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return totals

    def keep_metrics_until(self, step: int) -> None:
        """Drop the lines of steps that will be done again."""
        if not self.metrics.is_file():
            return
        lines = self.metrics.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _is_json(line) and json.loads(line).get("step", 0) <= step]
        self._write(self.metrics, "".join(f"{line}\n" for line in kept))

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one line to the metrics.

        Raises:
            StorageError: The file system refused.
        """
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            refusal = storage_error("Writing metrics", error, self.metrics)
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


def storage_error(doing: str, error: Exception, path: Path) -> StorageError:
    """Return our error for a refusal of the file system."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    advice = "Make room" if isinstance(error, OSError) and error.errno == errno.ENOSPC else "Check disk and permissions"
    return StorageError(f"{doing}: expected the disk to take it, got {reason} ({path}). {advice}, then use --resume.")


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_json(line: str) -> bool:
    # The last line may be cut off where the process was killed.
    try:
        json.loads(line)
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
