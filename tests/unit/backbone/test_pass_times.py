"""Times of passes that run at once: scaled to the clock, taken once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tidelock.backbone import pass_times
from tidelock.backbone.pass_times import PassTimes, TimeSplit


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
