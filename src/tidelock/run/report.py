"""Draws what there is to see of a run: a page and its plots, beside the run's other files.

May import everything below `run`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tidelock.errors import CheckpointError, ConfigError
from tidelock.report.facts import RunFacts
from tidelock.report.record import RunRecord
from tidelock.run.folder import RunFolder, read_rows

if TYPE_CHECKING:
    from tidelock.run.config import RunConfig

# Where this person's files and cloud are: no part of what the run is, and a page is shown to others.
_PRIVATE = frozenset({"out", "cloud", "token_file", "ca", "client_cert", "client_key"})


def write_report(run: Path) -> list[Path]:
    """Write `report.html` and `report/*.png` into a run's folder; return the files, the page first.

    Args:
        run: The run folder; the run may still be going on.

    Raises:
        CheckpointError: There is no run in it, none that has logged a step, or one whose facts are damaged.
        ConfigError: Matplotlib is not installed.
        StorageError: The file system refused.
    """
    folder = RunFolder.open(run)
    record = _read(folder)
    try:
        from tidelock.report.page import page_of  # noqa: PLC0415  (needs an extra)
        from tidelock.report.plots import LIGHT, as_png, plots_of  # noqa: PLC0415
    except ModuleNotFoundError as error:
        msg = f"Report: expected {error.name}, got no such package. Run: pip install 'tidelock[report]'."
        raise ConfigError(msg) from error
    plots = plots_of(record)
    images = {f"{plot.name}.png": as_png(plot.figure(record, LIGHT)) for plot in plots}
    return folder.write_report(page_of(record, plots), images)


def _read(folder: RunFolder) -> RunRecord:
    config, metrics = folder.config(), read_rows(folder.metrics)
    if not any("loss" in row for row in metrics):
        msg = (
            f"Report: expected a run that has logged a step, got none ({folder.metrics}). Wait for it, or --resume it."
        )
        raise CheckpointError(msg)
    try:
        facts = RunFacts.model_validate_json(folder.read_facts())
    except ValidationError as error:
        msg = f"Report: expected the facts of the run, got none or damaged ones ({folder.facts}). --resume the run."
        raise CheckpointError(msg) from error
    return RunRecord(
        name=folder.path.resolve().name,
        options=_options_of(config),
        facts=facts,
        metrics=metrics,
        periods=read_rows(folder.schedule),
        epochs=folder.read_ledger().epochs(),
    )


def _options_of(config: RunConfig) -> dict[str, Any]:
    """Return what a page may show of the options that have a value: of a path from the root, its last part only."""
    return {
        name: f"…/{Path(value).name}" if isinstance(value, str) and Path(value).is_absolute() else value
        for name, value in asdict(config).items()
        if value is not None and name not in _PRIVATE
    }
