"""Turns: one computes at a time, in the order of asking, and whoever waits for a device does not hold the others up."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest

from tests.unit.hand_device import wait_until
from tidelock.cloud.turns import ComputeQueue, Turn


def test_first_come_first_served():
    line, order = ComputeQueue(), []
    ticket = line.enter()
    threads = []

    def compute(number):
        mine = line.enter()
        order.append(number)
        line.leave(mine)

    for number in range(6):
        threads.append(threading.Thread(target=compute, args=(number,)))
        threads[-1].start()
        # One after another, so that there is an order in which they asked.
        wait_until(lambda count=number + 2: line.waiting == count, "a thread in line")
    assert order == []
    line.leave(ticket)
    for thread in threads:
        thread.join()
    assert order == list(range(6))
    assert line.waiting == 0


def test_never_two_at_once():
    line, inside, most = ComputeQueue(), [], []

    def compute():
        turn = Turn(line)
        for _ in range(20):
            with turn.computing():
                inside.append(turn)
                most.append(len(inside))
                turn.give_way() if len(inside) > 1 else None
                inside.remove(turn)

    threads = [threading.Thread(target=compute) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert line.waiting == 0


def test_a_turn_is_given_up_while_waiting_and_taken_again():
    line = ComputeQueue()
    turn = Turn(line)
    with turn.computing():
        assert line.waiting == 1
        with turn.waiting():
            assert line.waiting == 0
        assert line.waiting == 1
    assert line.waiting == 0


@pytest.mark.parametrize("nested", [False, True])
def test_an_error_leaves_the_line_free(nested):
    line = ComputeQueue()
    turn = Turn(line)
    inner = turn.waiting() if nested else contextlib.nullcontext()
    with pytest.raises(ZeroDivisionError), turn.computing(), inner:
        raise ZeroDivisionError
    assert line.waiting == 0


def test_giving_way_lets_the_next_one_compute_and_costs_nothing_alone():
    line, order = ComputeQueue(), []
    first = Turn(line)

    def second():
        with Turn(line).computing():
            order.append("second")

    with first.computing():
        first.give_way()  # nobody asks: the turn is kept
        assert line.waiting == 1
        thread = threading.Thread(target=second)
        thread.start()
        wait_until(lambda: line.waiting == 2, "the second one in line")
        order.append("first")
        first.give_way()
        order.append("first again")
    thread.join()
    assert order == ["first", "second", "first again"]


def test_seconds_are_those_of_computing(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    turn = Turn(ComputeQueue())
    with turn.computing():
        now[0] += 2
        with turn.waiting():
            now[0] += 50
        now[0] += 3
    now[0] += 70
    assert turn.seconds == 5
    with turn.computing():
        now[0] += 1
    assert turn.seconds == 6
