"""Times of passes that run at once: scaled to the clock, taken once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tidelock.backbone import pass_times
from tidelock.backbone.pass_times import PassSeconds, PassTimes, TimeSplit, passes_at_once


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test moves."""
    now = [100.0]
    monkeypatch.setattr(pass_times, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def test_one_pass_after_another_is_as_measured(clock: list[float]) -> None:
    times = PassTimes()
    for _ in range(2):
        with times.running():
            clock[0] += 5.0
        clock[0] += 1.0
        times.add(cloud=2.0, waiting=0.5)
        times.add(wire=1.5)
    assert times.take() == TimeSplit(cloud=4.0, waiting=1.0, wire=3.0)
    assert times.take() == TimeSplit()


def test_two_passes_at_once_wait_once(clock: list[float]) -> None:
    times = PassTimes()
    with times.running():
        clock[0] += 1.0  # one alone
        with times.running():
            clock[0] += 4.0  # both
        clock[0] += 1.0
    times.add(cloud=3.0)
    times.add(cloud=2.0)
    # Six seconds on the clock, ten of passes.
    assert times.take() == TimeSplit(cloud=5.0 * 6 / 10)


def test_what_never_ran_takes_no_time() -> None:
    times = PassTimes()
    times.add(wire=1.0)
    assert times.take() == TimeSplit()


@pytest.mark.parametrize(
    ("device", "cloud", "wire", "count"),
    [
        (0.0, 0.0, 1.0, 2),  # nothing measured
        (1.0, 1.0, 0.0, 2),  # one at each side
        (0.0, 1.0, 0.0, 1),  # nothing but the cloud
        (0.001, 1.0, 0.001, 2),
        (1.0, 2.0, 5.0, 4),
        (2.0, 1.0, 5.0, 4),
        (0.1, 0.2, 61 * 0.1, 32),  # a round trip of 100 ms at each of 30 modules, twice
    ],
)
def test_as_many_at_once_as_keep_the_busier_side_busy(device, cloud, wire, count) -> None:
    assert passes_at_once(device, cloud, wire) == count


def test_a_longer_wire_never_asks_for_fewer() -> None:
    counts = [passes_at_once(1.0, 2.0, wire / 7) for wire in range(100)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_how_many_at_once_goes_by_the_passes_since_it_was_asked() -> None:
    times = PassTimes()
    assert times.at_once == 2
    for wire in (1.0, 3.0):
        times.finish(device=1.0, cloud=1.0, waiting=100.0, wire=wire)
    assert times.at_once == 4
    assert times.at_once == 4  # nothing new
    times.finish(device=1.0, cloud=1.0, waiting=0.0, wire=0.0)
    assert times.at_once == 2


def test_what_a_finished_pass_waited_for_is_counted(clock: list[float]) -> None:
    times = PassTimes()
    with times.running():
        clock[0] += 6.0
    times.finish(device=1.0, cloud=2.0, waiting=0.5, wire=2.5)
    assert times.take() == TimeSplit(cloud=2.0, waiting=0.5, wire=2.5)


def test_what_ended_passes_took_is_added_up_and_taken_once() -> None:
    times = PassTimes()
    times.add(waiting=9.0)  # of a pass that has not ended
    for _ in range(2):
        times.finish(device=1.0, cloud=2.0, waiting=0.5, wire=3.0)
    assert times.take_ended() == PassSeconds(device=2.0, cloud=4.0, waiting=1.0, wire=6.0)
    assert times.take_ended() == PassSeconds()
