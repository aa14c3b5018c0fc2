"""Trackers such as TensorBoard, to which `transformers.Trainer` reports by itself, beside metrics.jsonl.

May import everything below `run`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    get_available_reporting_integrations,
)

from tidelock.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import Trainer


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that a run could not report to.

    Raises:
        ConfigError: Transformers does not know one of these names, or its package is not installed.
    """
    known, installed = sorted(INTEGRATION_TO_CALLBACK), get_available_reporting_integrations()
    for name in names:
        if name not in known:
            msg = f"--report-to: expected one of {', '.join(known)}, got {name!r}. Choose of those, or leave it out."
            raise ConfigError(msg)
        if name not in installed:
            install = "pip install 'tidelock[tensorboard]'" if name == "tensorboard" else "Install it"
            msg = f"--report-to {name}: expected its package, got none. {install}, or leave it out."
            raise ConfigError(msg)


def keep_events_in(folder: Path, trainer: Trainer) -> None:
    """Have TensorBoard's event files in a folder of the run, unless `TENSORBOARD_LOGGING_DIR` says where."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder)
