"""The simulator against schedules drawn by hand, and against a longest way through a graph of what waits for what."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.plan.pools import slow_simulation
from tidelock.plan.simulate import StageTimes, gantt, simulate


def drawn(stages: list[StageTimes], micro_batches: int) -> list[str]:
    """Return one line for each stage: which forward (f) or backward (b) computes in each second."""
    bars = [bar for bar in gantt(stages, micro_batches) if bar.work in {"forward", "backward"}]
    length = round(max(bar.end for bar in bars))
    lines = [["."] * length for _ in stages]
    for bar in bars:
        for second in range(round(bar.begin), round(bar.end)):
            lines[bar.stage][second] = f"{bar.work[0]}{bar.micro_batch}"
    return [" ".join(cell.ljust(2) for cell in line).rstrip(" .") for line in lines]


def test_one_stage_computes_all_the_time():
    assert drawn([StageTimes(1, 2, 1)], 2) == ["f0 b0 b0 f1 b1 b1"]


def test_three_stages_with_the_classic_number_in_flight():
    assert drawn([StageTimes(1, 1, 3), StageTimes(1, 1, 2), StageTimes(1, 1, 1)], 4) == [
        "f0 f1 f2 .  .  b0 f3 b1 .  b2 .  b3",
        ".  f0 f1 .  b0 f2 b1 f3 b2 .  b3",
        ".  .  f0 b0 f1 b1 f2 b2 f3 b3",
    ]


def test_a_transfer_leaves_a_gap_with_the_classic_number_in_flight():
    stages = [StageTimes(1, 1, 2, send_forward=1, send_backward=1), StageTimes(1, 1, 1)]
    assert drawn(stages, 3) == [
        "f0 f1 .  .  .  b0 f2 b1 .  .  .  b2",
        ".  .  f0 b0 f1 b1 .  .  f2 b2",
    ]


def test_pacs_figure_6_has_three_forwards_before_the_first_backward_which_hides_the_transfer():
    stages = [StageTimes(1, 1, 3, send_forward=1, send_backward=1), StageTimes(1, 1, 1)]
    assert drawn(stages, 6) == [
        "f0 f1 f2 .  .  b0 f3 b1 f4 b2 f5 b3 .  b4 .  b5",
        ".  .  f0 b0 f1 b1 f2 b2 f3 b3 f4 b4 f5 b5",
    ]


def test_a_slow_link_sends_one_after_another_and_latency_overlaps():
    stages = [StageTimes(1, 1, 3, send_forward=3, latency=2), StageTimes(1, 1, 1)]
    ends = simulate(stages, 3)
    assert ends.sent_forward == [[4, 7, 10], []]
    assert ends.forward[1] == [7, 10, 13]
    assert ends.backward[0] == [11, 14, 17]


def test_gradients_are_summed_after_the_last_backward():
    ends = simulate([StageTimes(1, 1, 2, all_reduce=1), StageTimes(1, 1, 1, all_reduce=9)], 2)
    assert ends.backward == [[4, 6], [3, 5]]
    assert ends.all_reduce == [7, 14]
    assert ends.seconds == 14
    sums = [bar for bar in gantt([StageTimes(1, 1, 1, all_reduce=9)], 1) if bar.work == "all-reduce"]
    assert [(bar.begin, bar.end, bar.micro_batch) for bar in sums] == [(2, 11, None)]


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[list[StageTimes], int]:
    count, ahead = draw(st.integers(1, 6)), draw(st.integers(1, 2))
    computing, times = (st.floats(least, 10).map(lambda seconds: round(seconds, 3)) for least in (0.001, 0))
    stages = [
        StageTimes(draw(computing), draw(computing), 1 + ahead * (count - 1 - index), *(draw(times) for _ in range(4)))
        for index in range(count)
    ]
    return stages, draw(st.integers(1, 9))


@given(pipelines())
def test_it_is_the_longest_way_through_everything_that_waits(pipeline: tuple[list[StageTimes], int]):
    stages, micro_batches = pipeline
    assert simulate(stages, micro_batches).seconds == pytest.approx(slow_simulation(stages, micro_batches), rel=1e-12)


@given(pipelines(), st.integers(0, 10**6))
@settings(max_examples=50)
def test_no_event_gets_later_when_a_time_gets_shorter(pipeline: tuple[list[StageTimes], int], seed: int):
    stages, micro_batches = pipeline
    draw = random.Random(seed)
    names = ("forward", "backward", "all_reduce", "send_forward", "send_backward", "latency")
    shorter = [replace(stage, **{name: getattr(stage, name) * draw.random() for name in names}) for stage in stages]
    before, after = simulate(stages, micro_batches), simulate(shorter, micro_batches)
    for one, other in ((before.forward, after.forward), (before.backward, after.backward)):
        for line, less in zip(one, other, strict=True):
            assert all(late <= early + 1e-9 for late, early in zip(less, line, strict=True))


@given(pipelines())
@settings(max_examples=50)
def test_bars_of_one_stage_or_link_never_overlap_and_no_more_are_in_flight_than_said(
    pipeline: tuple[list[StageTimes], int],
):
    stages, micro_batches = pipeline
    bars = gantt(stages, micro_batches)
    for index, stage in enumerate(stages):
        for works in ({"forward", "backward", "all-reduce"}, {"send-forward"}, {"send-backward"}):
            own = [bar for bar in bars if bar.stage == index and bar.work in works]
            assert all(one.end <= other.begin + 1e-9 for one, other in itertools.pairwise(own))
        computed = [bar for bar in bars if bar.stage == index and bar.work in {"forward", "backward"}]
        held = 0
        for bar in sorted(computed, key=lambda bar: bar.end):
            held += 1 if bar.work == "forward" else -1
            assert 0 <= held <= stage.in_flight
