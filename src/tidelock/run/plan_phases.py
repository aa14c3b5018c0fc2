"""Which steps of a run are alike: those of a schedule's warm-up and those after it, or those before all is cached.

Which modules a schedule keeps is known only once they have learned; here they are spread evenly, the lowest among them,
which costs most.
May import everything below `run`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from tidelock.backbone.scheduler import norm_report
from tidelock.schedule.decide import decide, warm_up_turns
from tidelock.schedule.schedule import ModuleScore, ScoreTable
from tidelock.wire import tidelock_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidelock.run.config import RunConfig
    from tidelock.schedule.schedule import Schedule


@final
@dataclass(frozen=True, slots=True)
class Phase:
    """Steps that are alike.

    Attributes:
        name: What people call them.
        first: The first one's number, from 0.
        steps: How many.
        turns: Blocks of the modules that are active; where there are several, in turns, step by step.
        cached: Whether what the blocks give is at hand.
    """

    name: str
    first: int
    steps: int
    turns: tuple[tuple[int, ...], ...] = ((),)
    cached: bool = False

    def sample(self, per_epoch: int) -> list[int]:
        """Return the steps of an epoch that these are, each once; whatever the epoch."""
        return [(self.first + step) % per_epoch for step in range(min(self.steps, per_epoch))]


def steps_of(config: RunConfig, num_rows: int) -> tuple[int, int]:
    """Return the optimizer steps of an epoch, and of a run of so many examples."""
    per_epoch = math.ceil(math.ceil(num_rows / config.batch_size) / config.accumulate)
    return per_epoch, config.max_steps or math.ceil(config.epochs * per_epoch)


def scheduled_phases(
    schedule: Schedule, blocks: Sequence[int], max_active: int | None, per_epoch: int, steps: int
) -> list[Phase]:
    """Return the phases of a run with modules at sites.

    Args:
        schedule: Which modules are active when.
        blocks: Those of all modules, ascending.
        max_active: Most that the cloud's operator lets be active; None is all.
        per_epoch: Steps in an epoch.
        steps: Steps in the run.
    """
    if not schedule.changes:
        return [Phase("all steps", 0, steps, (tuple(blocks),))]
    most = min(max_active or len(blocks), len(blocks))
    turns = warm_up_turns(blocks, min(schedule.warm_up_active or len(blocks), most))
    first = min(steps, schedule.warm_up * (schedule.period or per_epoch))
    # Above a threshold may be any number, all at most.
    budget = most if schedule.threshold is not None else min(schedule.budget_of(len(blocks)), most)
    spread = tuple(blocks[number * len(blocks) // budget] for number in range(budget))
    phases = [Phase("warm-up", 0, first, turns), Phase("after it", first, steps - first, (spread,))]
    return [phase for phase in phases if phase.steps]


def side_phases(per_epoch: int, steps: int, *, caches: bool) -> list[Phase]:
    """Return the phases of a run with a network beside the blocks."""
    if not caches:
        return [Phase("all steps", 0, steps)]
    first, later = min(per_epoch, steps), steps - per_epoch
    phases = [Phase("first epoch", 0, first), Phase("later epochs", first, later, cached=True)]
    return [phase for phase in phases if phase.steps > 0]


def decision_bytes(
    schedule: Schedule, blocks: Sequence[int], active: Sequence[int], max_active: int | None, fingerprint: str
) -> tuple[int, int]:
    """Return the bytes of a period's norms and of the command that answers them.

    Args:
        schedule: Which modules are active when.
        blocks: Those of all modules, ascending.
        active: Of those that were active.
        max_active: Most that the cloud's operator lets be active; None is all.
        fingerprint: Of the model.
    """
    period = max(1, schedule.warm_up)
    rows = tuple(ModuleScore(block, block in active, 1.0, period) for block in blocks)
    table = ScoreTable(period, rows)
    decision = decide(schedule, table, max_active)
    command = pb.ScheduleCommand(period=period, kill=decision.killed, revive=decision.revived, max_active=max_active)
    return norm_report(schedule, table, fingerprint).ByteSize(), command.ByteSize()
