"""The cloud's scheduler: decides by the pure function within the tenant's limit; refuses what contradicts itself."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidelock.backbone.scheduler import check_command, norm_report
from tidelock.cloud.scheduler import answer
from tidelock.errors import WireError
from tidelock.schedule.decide import decide
from tidelock.schedule.schedule import ModuleScore, Schedule, ScoreTable
from tidelock.wire import tidelock_pb2 as pb

BLOCKS = 6
SCHEDULE = Schedule("kill-revive", budget=3)

schedules = st.one_of(
    st.builds(
        Schedule,
        st.just("kill-revive"),
        budget=st.none() | st.integers(1, 8),
        warm_up=st.integers(1, 3),
        exchange=st.floats(0.01, 1.0),
        longest_sleep=st.none() | st.integers(1, 9),
    ),
    st.builds(Schedule, st.sampled_from(["fixed", "early-kill"]), budget=st.none() | st.integers(1, 8)),
    st.builds(Schedule, st.just("early-kill"), threshold=st.floats(0.01, 3.0)),
    st.builds(Schedule, st.just("random"), budget=st.integers(1, 8), seed=st.integers(0, 2**63)),
)


@st.composite
def tables(draw: st.DrawFn) -> ScoreTable:
    period = draw(st.integers(0, 50))
    blocks = sorted(draw(st.sets(st.integers(0, BLOCKS - 1), min_size=1)))
    alive = draw(st.sets(st.sampled_from(blocks), min_size=1))
    rows = (
        ModuleScore(block, block in alive, draw(st.floats(0, 1e9)), draw(st.integers(0, period))) for block in blocks
    )
    return ScoreTable(period, tuple(rows))


@given(schedules, tables(), st.none() | st.integers(1, BLOCKS))
def test_device_and_cloud_agree_whatever_the_scores(
    schedule: Schedule, table: ScoreTable, max_active: int | None
) -> None:
    command = answer(norm_report(schedule, table, "f" * 64), BLOCKS, max_active)
    decision = check_command(pb.ScheduleCommand.FromString(command.SerializeToString()), schedule, table)
    assert decision == decide(schedule, table, max_active)
    if max_active is not None and schedule.changes and table.period >= schedule.warm_up - 1:
        assert len(decision.active) <= max_active


def a_report(**changes: object) -> pb.NormReport:
    rows = tuple(ModuleScore(block, True, float(block), 2) for block in range(BLOCKS))
    report = norm_report(SCHEDULE, ScoreTable(2, rows), "f" * 64)
    report.MergeFrom(pb.NormReport(**changes))  # type: ignore[arg-type]
    return report


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"modules": [pb.ModuleNorm(block=BLOCKS, active=True)]}, "expected modules at blocks below 6"),
        ({"modules": [pb.ModuleNorm(block=0, active=True)]}, "expected modules at blocks below 6"),
        ({"rule": pb.ScheduleRule(name="sleep")}, "Schedule's name: expected one of full, .*got 'sleep'"),
        ({"rule": pb.ScheduleRule(exchange=2.0)}, "exchange: expected more than 0 and at most 1"),
        ({"rule": pb.ScheduleRule(exchange=math.nan)}, "exchange: expected more than 0 and at most 1"),
        ({"rule": pb.ScheduleRule(threshold=1.0)}, "threshold: expected it with early-kill only"),
        ({"period": 1}, "expected one of a period from 0 to 1"),
    ],
)
def test_a_report_that_contradicts_itself_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(WireError, match=f"^Reading norms: .*{said}"):
        answer(a_report(**changes), BLOCKS, None)


@pytest.mark.parametrize("norm", [math.nan, math.inf, -1.0])
def test_a_norm_that_is_no_norm_is_refused(norm: float) -> None:
    report = a_report()
    report.modules[3].norm = norm
    with pytest.raises(WireError, match=r"^Reading norms: .*score of the module at block 3"):
        answer(report, BLOCKS, None)


def test_no_modules_at_all_are_refused() -> None:
    report = a_report()
    del report.modules[:]
    with pytest.raises(WireError, match=r"^Reading norms: "):
        answer(report, BLOCKS, None)
