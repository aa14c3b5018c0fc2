"""Which modules are active next: examples worked by hand, and what holds whatever the scores."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidelock.errors import ConfigError
from tidelock.schedule.decide import decide, warm_up_turns
from tidelock.schedule.schedule import Decision, ModuleScore, Schedule, ScoreTable

scores = st.floats(0, 1e6, allow_nan=False)


def warm(*values: float, period: int = 0) -> ScoreTable:
    """Return the table after a warm-up, with blocks 0, 1, ... all active."""
    return ScoreTable(period, tuple(ModuleScore(block, True, score, period) for block, score in enumerate(values)))


def follow(table: ScoreTable, decision: Decision, fresh: list[float]) -> ScoreTable:
    """Return the next period's table, in which the active modules have fresh scores."""
    period = table.period + 1
    rows = (
        ModuleScore(row.block, True, fresh[row.block], period)
        if row.block in decision.active
        else replace(row, active=False)
        for row in table.modules
    )
    return ScoreTable(period, tuple(rows))


def test_early_kill_by_threshold_by_hand() -> None:
    # The mean is 4; half of it is 2.
    decision = decide(Schedule("early-kill", threshold=0.5), warm(1, 2, 9, 4))
    assert decision == Decision(killed=(0,), revived=(), active=(1, 2, 3))


def test_early_kill_keeps_the_best_module_whatever_the_threshold() -> None:
    assert decide(Schedule("early-kill", threshold=9), warm(1, 2, 3)).active == (2,)


@pytest.mark.parametrize("name", ["early-kill", "fixed"])
def test_the_best_are_kept_for_good_by_hand(name: str) -> None:
    schedule = Schedule(name, budget=2)
    first = warm(3, 1, 4, 2)
    decision = decide(schedule, first)
    assert decision == Decision(killed=(1, 3), revived=(), active=(0, 2))
    # Both move less than the killed ones did, and stay.
    second = follow(first, decision, [0.1, 0, 0.2, 0])
    assert decide(schedule, second) == Decision((), (), (0, 2))


def test_kill_revive_by_hand() -> None:
    schedule = Schedule("kill-revive", budget=4)  # exchanges one
    first = warm(6, 1, 5, 2, 4, 3)
    decision = decide(schedule, first)
    assert decision == Decision(killed=(1, 3), revived=(), active=(0, 2, 4, 5))
    second = follow(first, decision, [0.6, 0, 0.5, 0, 0.4, 0.9])
    # Module 4 is the worst of the active ones; 3 did more than 1 when it was last active.
    assert decide(schedule, second) == Decision(killed=(4,), revived=(3,), active=(0, 2, 3, 5))


def test_of_equal_modules_the_lower_block_stays_and_returns_first() -> None:
    schedule = Schedule("kill-revive", budget=2)
    first = warm(1, 1, 1, 1)
    decision = decide(schedule, first)
    assert decision.active == (0, 1)
    assert decide(schedule, follow(first, decision, [1, 1, 1, 1])) == Decision(killed=(1,), revived=(2,), active=(0, 2))


def test_nothing_is_decided_before_the_warm_up_ends() -> None:
    schedule = Schedule("fixed", budget=1, warm_up=2)
    assert decide(schedule, warm(1, 2)).active == (0, 1)
    assert decide(schedule, warm(1, 2, period=1)).active == (1,)


def test_random_draws_what_it_drew_in_another_process() -> None:
    schedule = Schedule("random", budget=3, seed=7)
    table = warm(*range(12))
    assert decide(schedule, table).active == decide(schedule, table).active == (0, 4, 6)
    assert decide(replace(schedule, seed=8), table).active != (0, 4, 6)


@given(st.lists(st.lists(scores, min_size=7, max_size=7), min_size=2, max_size=12), st.data())
def test_exactly_the_budget_is_active_after_the_warm_up(rows: list[list[float]], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["kill-revive", "fixed", "random", "early-kill"]))
    budget = data.draw(st.integers(1, 7))
    schedule = Schedule(name, budget=budget, exchange=data.draw(st.floats(0.01, 1)))
    table = warm(*rows[0])
    for fresh in rows[1:]:
        decision = decide(schedule, table)
        assert decision == decide(schedule, table)
        assert len(decision.active) == budget
        assert not set(decision.killed) & set(decision.revived)
        before = {row.block for row in table.modules if row.active}
        assert set(decision.active) == (before - set(decision.killed)) | set(decision.revived)
        if name == "kill-revive" and table.period and budget < 7:
            assert len(decision.killed) == len(decision.revived) >= 1
        table = follow(table, decision, fresh)


@given(st.lists(scores, min_size=6, max_size=6), st.integers(1, 5))
def test_with_scores_that_never_change_every_module_still_has_its_periods(fixed: list[float], budget: int) -> None:
    schedule = Schedule("kill-revive", budget=budget)
    table, seen = warm(*fixed), set[int]()
    for _ in range(40):
        decision = decide(schedule, table)
        table = follow(table, decision, fixed)
        if table.period > 1:
            seen |= set(decision.revived)
        seen |= set(decision.active) if table.period == 1 else set()
    assert seen == set(range(6))


@given(st.lists(st.lists(scores, min_size=6, max_size=6), min_size=20, max_size=30), st.integers(1, 5))
def test_no_module_sleeps_for_long_whatever_the_scores(rows: list[list[float]], budget: int) -> None:
    schedule = Schedule("kill-revive", budget=budget)
    exchanged = max(1, round(0.25 * budget))
    turns = math.ceil((6 - budget) / exchanged)
    table = warm(*rows[0])
    for fresh in rows[1:]:
        table = follow(table, decide(schedule, table), fresh)
        # By default overdue after twice the turns; then those that are overdue return in turn.
        assert max(table.period - row.last_active for row in table.modules) <= 3 * turns


@given(st.lists(scores, min_size=1, max_size=9))
def test_full_and_a_budget_of_all_kill_nothing(values: list[float]) -> None:
    for schedule in (Schedule(), Schedule("kill-revive", budget=len(values)), Schedule("random", budget=99)):
        assert decide(schedule, warm(*values)) == Decision((), (), tuple(range(len(values))))


@given(st.integers(1, 40), st.integers(1, 40))
def test_in_a_warm_up_by_turns_each_module_has_one(count: int, at_once: int) -> None:
    turns = warm_up_turns(range(count), at_once)
    assert sorted(block for turn in turns for block in turn) == list(range(count))
    assert all(1 <= len(turn) <= at_once for turn in turns)


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -1.0])
def test_scores_that_are_none_are_refused(score: float) -> None:
    with pytest.raises(ConfigError, match="score of the module at block 1: expected a finite number of 0 or more"):
        warm(1, score)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ((), "one a block"),
        ((ModuleScore(1, True, 0, 0), ModuleScore(0, True, 0, 0)), "one a block"),
        ((ModuleScore(0, False, 0, 0),), "an active module"),
        ((ModuleScore(0, True, 0, 5),), "one of a period from 0 to 0"),
    ],
)
def test_tables_that_contradict_themselves_are_refused(rows: tuple[ModuleScore, ...], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        ScoreTable(0, rows)


@pytest.mark.parametrize(
    ("switches", "reason"),
    [
        ({"name": "best"}, "one of full, early-kill"),
        ({"name": "kill-revive", "budget": 0}, "1 or more"),
        ({"name": "kill-revive", "period": 2.5}, "a whole number"),
        ({"name": "kill-revive", "exchange": 0}, "more than 0"),
        ({"name": "kill-revive", "threshold": 0.5}, "early-kill only"),
        ({"name": "early-kill", "threshold": 0.5, "budget": 4}, "either a threshold or a budget"),
        ({"budget": 4}, "none with the schedule full"),
        ({"name": "random", "moments": "halve"}, "one of reset, keep"),
    ],
)
def test_switches_that_break_their_rules_are_refused(switches: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Schedule(**switches)
