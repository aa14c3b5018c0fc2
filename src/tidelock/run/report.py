"""Draws what there is to see of a run: a page and its plots, beside the run's other files.

May import everything below `run`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tidelock.errors import CheckpointError, ConfigError
from tidelock.plan.inputs import read_profile
from tidelock.plan.plan import make_plan
from tidelock.pool.timeline import from_json
from tidelock.report.facts import RunFacts
from tidelock.report.record import PoolRecord, PoolRow, RunRecord
from tidelock.run.folder import RunFolder, read_rows
from tidelock.run.pool_layout import described, layout_from_json, planned_layout

if TYPE_CHECKING:
    from tidelock.plan.plan import Plan
    from tidelock.pool.layout import PoolLayout
    from tidelock.pool.timeline import Timeline
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
        pool=_pool_of(folder, config.batch_size) if folder.layout.is_file() else None,
    )


def _pool_of(folder: RunFolder, batch_rows: int) -> PoolRecord:
    """Return how the peers of a pool did a step, beside the plan if there is one for the layout that they had."""
    layout = layout_from_json(folder.read_layout())
    timelines = _timelines_of(folder)
    plan = _plan_of(folder, layout, batch_rows)
    rows: list[PoolRow] = []
    for number in range(len(layout.stages)):
        if plan is not None:
            planned = [(bar.work, bar.begin, bar.end) for bar in plan.timeline if bar.stage == number]
            rows.append(PoolRow(f"stage {number + 1}, planned", is_planned=True, bars=planned))
        for timeline in timelines:
            if timeline.stage == number:
                done = [(bar.work, bar.begin, bar.end) for bar in timeline.bars]
                rows.append(PoolRow(f"peer {timeline.peer}", is_planned=False, bars=done))
    return PoolRecord(described(layout), rows if timelines else [])


def _timelines_of(folder: RunFolder) -> list[Timeline]:
    if not folder.timelines.is_file():
        return []
    try:
        return from_json(folder.timelines.read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError) as error:
        msg = (
            f"Report: expected what the peers did in a step, got {type(error).__name__} ({folder.timelines}). Remove "
            "that file; the report is then drawn without it."
        )
        raise CheckpointError(msg) from error


def _plan_of(folder: RunFolder, layout: PoolLayout, batch_rows: int) -> Plan | None:
    """Return the plan for the measured profile, if that is what the layout comes from."""
    if not folder.profile.is_file():
        return None
    profile = read_profile(folder.profile)
    plan = make_plan(profile, batch_rows, layout.micro_batches)
    return plan if planned_layout(plan, profile, layout.stages[-1].blocks.stop) == layout else None


def _options_of(config: RunConfig) -> dict[str, Any]:
    """Return what a page may show of the options that have a value: of a path from the root, its last part only."""
    return {
        name: f"…/{Path(value).name}" if isinstance(value, str) and Path(value).is_absolute() else value
        for name, value in asdict(config).items()
        if value is not None and name not in _PRIVATE
    }
