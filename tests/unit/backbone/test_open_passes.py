"""A device never waits in a cloud for a place that it holds itself."""

from __future__ import annotations

import threading

import pytest

from tests.unit.hand_device import wait_until
from tidelock.backbone.open_passes import OpenPasses

pytestmark = pytest.mark.timeout(60)


class Run:
    def __init__(self):
        self.is_open = False

    def close(self):
        self.is_open = False


def test_the_first_may_wait_and_whoever_comes_beside_it_may_not():
    passes = OpenPasses()
    with passes.running(Run()) as first_holds, passes.running(Run()) as second_holds:
        assert (first_holds, second_holds) == (False, True)


def test_an_open_pass_that_rests_holds_a_place_and_a_closed_one_does_not():
    passes, resting = OpenPasses(), Run()
    with passes.running(resting):
        resting.is_open = True
    with passes.running(Run()) as holds:
        assert holds
    with passes.running(resting) as holds:
        assert not holds
    resting.close()
    with passes.running(Run()) as holds:
        assert not holds


def test_a_pass_that_is_forgotten_holds_nothing():
    passes, resting = OpenPasses(), Run()
    with passes.running(resting):
        resting.is_open = True
    del resting
    with passes.running(Run()) as holds:
        assert not holds


def test_alone_waits_for_those_that_run_closes_those_that_rest_and_keeps_others_out():
    passes, resting = OpenPasses(), Run()
    order: list[object] = []
    with passes.running(resting):
        resting.is_open = True
    inside, leave = threading.Event(), threading.Event()

    def go_alone():
        with passes.alone(Run()) as holds:
            order.append(("alone", holds, resting.is_open))
            inside.set()
            leave.wait(20)

    def go_beside():
        with passes.running(Run()):
            order.append("beside")

    runner = Run()
    with passes.running(runner):
        alone = threading.Thread(target=go_alone)
        alone.start()
        assert not inside.wait(0.1)
        assert resting.is_open
    assert inside.wait(20)
    beside = threading.Thread(target=go_beside)
    beside.start()
    wait_until(beside.is_alive, "the other thread")
    assert order == [("alone", False, False)]
    leave.set()
    alone.join()
    beside.join()
    assert order[1:] == ["beside"]


def test_others_go_on_after_an_error():
    passes = OpenPasses()
    with pytest.raises(ZeroDivisionError), passes.alone(Run()):
        raise ZeroDivisionError
    with passes.running(Run()) as holds:
        assert not holds
