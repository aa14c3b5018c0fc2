"""The decision after a period, by the cloud's scheduler and by the device that checks it: one pure function.

Kill and Revive is DLoRA's (arXiv 2404.05182, Algorithms 1 and 2) with the number of exchanged modules made explicit:
fresh scores of active modules and stale ones of killed modules are never ranked together. A killed module's score does
not change, while the learning rate shrinks those of the active ones; in one ranking the set would first never change,
and later for no good reason.

May import `schedule` and errors.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

from tidelock.schedule.schedule import Decision

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tidelock.schedule.schedule import ModuleScore, Schedule, ScoreTable


def decide(schedule: Schedule, table: ScoreTable, max_active: int | None = None) -> Decision:
    """Return what is active in the period after the one that ended.

    The same arguments give the same decision in every process. Of modules with equal scores, that of the lower block is
    kept, or revived, first.

    Args:
        schedule: The rule.
        table: All modules when the period has ended.
        max_active: Most modules that may be active, whatever the schedule's budget; at least one.
    """
    before = {module.block for module in table.modules if module.active}
    after = set(_next_active(schedule, table, max_active or len(table.modules)))
    return Decision(tuple(sorted(before - after)), tuple(sorted(after - before)), tuple(sorted(after)))


def warm_up_turns(blocks: Sequence[int], at_once: int) -> tuple[tuple[int, ...], ...]:
    """Return groups of at most `at_once` blocks that take turns in the warm-up, in which each block has one turn.

    Args:
        blocks: Those of all modules, ascending.
        at_once: Modules that may be active together.
    """
    count = math.ceil(len(blocks) / at_once)
    return tuple(tuple(blocks[turn::count]) for turn in range(count))


def _next_active(schedule: Schedule, table: ScoreTable, max_active: int) -> Iterable[int]:
    modules, period = table.modules, table.period
    budget = min(schedule.budget_of(len(modules)), max_active)
    is_first = period == schedule.warm_up - 1
    if schedule.name == "full" or period < schedule.warm_up - 1:
        return (module.block for module in modules)
    if schedule.name == "random":
        # A generator of its own for each period: a resumed run draws what the whole one draws.
        draw = random.Random(f"{schedule.seed} {period}")  # noqa: S311  (no secret)
        return draw.sample([module.block for module in modules], budget)
    if schedule.name == "early-kill" and schedule.threshold is not None and is_first:
        return _above_threshold(modules, schedule.threshold)[:max_active]
    if is_first:
        return (module.block for module in _best(modules)[:budget])
    active = [module for module in modules if module.active]
    if schedule.name == "kill-revive":
        return _exchange(schedule, table, budget)
    return (module.block for module in _best(active)[: max_active if schedule.threshold is not None else budget])


def _above_threshold(modules: Sequence[ModuleScore], threshold: float) -> list[int]:
    """Return the blocks of modules that are not idle, the best first; at least one."""
    mean = sum(module.score for module in modules) / len(modules)
    best = _best(modules)
    return [module.block for module in best if module.score >= threshold * mean] or [best[0].block]


def _exchange(schedule: Schedule, table: ScoreTable, budget: int) -> list[int]:
    """Return the blocks of `budget` modules: the best of the active, the rest replaced by the best of the killed."""
    active = _best(module for module in table.modules if module.active)
    killed = _best(module for module in table.modules if not module.active)
    count = min(max(1, round(schedule.exchange * budget)), len(killed))
    longest = schedule.longest_sleep or 2 * math.ceil(len(killed) / max(count, 1))
    overdue = [module for module in killed if table.period - module.last_active >= longest]
    overdue.sort(key=lambda module: (module.last_active, module.block))
    awake = [module for module in killed if module not in overdue]
    kept, worst = active[: budget - count], active[budget - count :]
    return [module.block for module in (*kept, *overdue, *awake, *worst)[:budget]]


def _best(modules: Iterable[ModuleScore]) -> list[ModuleScore]:
    """Return modules from the highest score to the lowest; the lower block first among equals."""
    return sorted(modules, key=lambda module: (-module.score, module.block))
