"""A run folder as a run makes it, before anything is trained."""

from __future__ import annotations

from pathlib import Path

from tidelock.run.config import RunConfig
from tidelock.run.folder import RunFolder


def new_run_folder(config: RunConfig) -> RunFolder:
    """Return a new run folder with its configuration written."""
    folder = RunFolder.new(Path(config.out))
    folder.write_config(config)
    return folder
