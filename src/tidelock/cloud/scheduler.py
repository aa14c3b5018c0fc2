"""The cloud's scheduler: answers a device's norms with the modules to kill and to revive.

Keeps nothing: all that a decision depends on is in the report, so that a cloud may be restarted between two of them.

May import `wire`, `schedule` and errors.
"""

from __future__ import annotations

from tidelock.errors import ConfigError, WireError
from tidelock.schedule.decide import decide
from tidelock.schedule.schedule import ModuleScore, Schedule, ScoreTable
from tidelock.wire import tidelock_pb2 as pb


def answer(report: pb.NormReport, num_blocks: int, max_active: int | None) -> pb.ScheduleCommand:
    """Return what a device is to kill and to revive.

    Args:
        report: All modules of the device when a period has ended.
        num_blocks: The model's.
        max_active: Most modules that this tenant may have active; None for no limit.

    Raises:
        WireError: The report contradicts itself or the model.
    """
    if len(report.modules) > num_blocks or any(module.block >= num_blocks for module in report.modules):
        msg = f"Reading norms: expected modules at blocks below {num_blocks}, each once, got others. Use one model."
        raise WireError(msg)
    try:
        decision = decide(_schedule(report.rule), _table(report), max_active)
    except ConfigError as error:
        msg = f"Reading norms: {error.message}"
        raise WireError(msg) from error
    return pb.ScheduleCommand(
        period=report.period, kill=decision.killed, revive=decision.revived, max_active=max_active
    )


def _schedule(rule: pb.ScheduleRule) -> Schedule:
    return Schedule(
        rule.name,
        budget=rule.budget if rule.HasField("budget") else None,
        threshold=rule.threshold if rule.HasField("threshold") else None,
        warm_up=rule.warm_up,
        exchange=rule.exchange,
        longest_sleep=rule.longest_sleep if rule.HasField("longest_sleep") else None,
        seed=rule.seed,
    )


def _table(report: pb.NormReport) -> ScoreTable:
    rows = (ModuleScore(row.block, row.active, row.norm, row.last_active) for row in report.modules)
    return ScoreTable(report.period, tuple(rows))
