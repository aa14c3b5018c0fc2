"""The device's half of a decision: reports norms to the cloud's scheduler, and checks what it answers.

May import `schedule`, `wire` and errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tidelock.errors import WireError
from tidelock.schedule.decide import decide
from tidelock.wire import tidelock_pb2 as pb
from tidelock.wire.limits import PROTOCOL_VERSION

if TYPE_CHECKING:
    from tidelock.schedule.schedule import Decision, Schedule, ScoreTable


def norm_report(schedule: Schedule, table: ScoreTable, fingerprint: str) -> pb.NormReport:
    """Return the message that asks for a decision.

    Args:
        schedule: The rule.
        table: All modules when a period has ended.
        fingerprint: Of the cloud's model.
    """
    return pb.NormReport(
        protocol=PROTOCOL_VERSION,
        fingerprint=fingerprint,
        rule=pb.ScheduleRule(
            name=schedule.name,
            budget=schedule.budget,
            threshold=schedule.threshold,
            warm_up=schedule.warm_up,
            exchange=schedule.exchange,
            longest_sleep=schedule.longest_sleep,
            seed=schedule.seed,
        ),
        period=table.period,
        modules=[
            pb.ModuleNorm(block=row.block, active=row.active, norm=row.score, last_active=row.last_active)
            for row in table.modules
        ],
    )


def check_command(command: pb.ScheduleCommand, schedule: Schedule, table: ScoreTable) -> Decision:
    """Return the decision that a command stands for, which must be what this device would have decided.

    Raises:
        WireError: It is another one.
    """
    max_active = command.max_active if command.HasField("max_active") else None
    ours = decide(schedule, table, max_active)
    theirs = (command.period, tuple(command.kill), tuple(command.revive))
    if max_active == 0 or theirs != (table.period, ours.killed, ours.revived):
        msg = (
            f"The cloud's scheduler: expected it to kill {list(ours.killed)} and revive {list(ours.revived)} after "
            f"period {table.period}, got {list(theirs[1])[:40]} and {list(theirs[2])[:40]} after {theirs[0]}. Nothing "
            "was changed. Use the same version on both sides."
        )
        raise WireError(msg)
    return ours
