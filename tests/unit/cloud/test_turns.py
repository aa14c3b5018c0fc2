"""Turns: one computes at a time, tenants as long as each other, and whoever waits for a device holds up nobody."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest

from tests.unit.hand_device import wait_until
from tidelock.cloud.turns import ComputeQueue, Turn


def test_a_tenants_passes_compute_in_the_order_of_asking():
    line, order = ComputeQueue(), []
    ticket = line.enter("anna")
    threads = []

    def compute(number):
        mine = line.enter("anna")
        order.append(number)
        line.leave(mine, 0.1)

    for number in range(6):
        threads.append(threading.Thread(target=compute, args=(number,)))
        threads[-1].start()
        # One after another, so that there is an order in which they asked.
        wait_until(lambda count=number + 2: line.length == count, "a thread in line")
    assert order == []
    line.leave(ticket, 0.1)
    for thread in threads:
        thread.join()
    assert order == list(range(6))
    assert line.length == 0


def served(line, ask, turns):
    """Return whose turns came, when each tenant has so many passes that ask again and again, for so many seconds."""
    order: list[str] = []
    passes = [(tenant, seconds) for tenant, (count, seconds) in ask.items() for _ in range(count)]

    def compute(tenant, seconds):
        while len(order) < turns:
            ticket = line.enter(tenant)
            order.append(tenant)
            # All ask before this turn is given on, but those that are over.
            wait_until(lambda: line.length >= len(passes) or len(order) >= turns, "all in line")
            line.leave(ticket, seconds)

    first = line.enter("first")
    threads = [threading.Thread(target=compute, args=each) for each in passes]
    for thread in threads:
        thread.start()
    wait_until(lambda: line.length == 1 + len(threads), "all in line")
    line.leave(first, 0.0)
    for thread in threads:
        thread.join()
    return order[:turns]


def test_a_tenant_with_more_passes_does_not_compute_more():
    order = served(ComputeQueue(), {"anna": (1, 0.1), "ben": (5, 0.1)}, turns=40)
    assert abs(order.count("anna") - order.count("ben")) <= 1


def test_a_tenant_whose_turns_are_longer_has_fewer():
    order = served(ComputeQueue(), {"anna": (2, 0.1), "ben": (2, 0.3)}, turns=40)
    assert abs(order.count("anna") - 3 * order.count("ben")) <= 3


def test_whoever_was_away_has_a_claim_to_little_of_what_the_others_used():
    line = ComputeQueue()
    line.leave(line.enter("anna"), 0.0)
    for _ in range(100):
        line.leave(line.enter("ben"), 1.0)
    order = served(line, {"anna": (2, 0.25), "ben": (2, 0.25)}, turns=20)
    # Ben was called at 99 the last time, and ends at 100. Anna begins at 98 1/2, as somebody is in line: six turns
    # below, or somewhat later where ben was there before her.
    first = order.index("ben")
    assert 5 <= first <= 6
    assert abs(order[first:].count("ben") - order[first:].count("anna")) <= 1


def test_what_many_have_in_hand_holds_nobody_up_for_long():
    line = ComputeQueue()
    for _ in range(1000):
        line.leave(line.enter("ben"), 0.1)
    order = served(line, {"ben": (1, 0.1), **{f"tenant {number}": (1, 0.1) for number in range(30)}}, turns=120)
    # One turn each, and a second that they have in hand: shared by how many are in line, 3 s in all and not 30.
    assert 30 <= order.index("ben") <= 30 + 45


def test_whoever_used_much_is_not_forgiven_by_leaving_the_line():
    line = ComputeQueue()
    line.leave(line.enter("anna"), 10.0)
    order = served(line, {"anna": (2, 1.0), "ben": (2, 1.0)}, turns=9)
    assert order == ["ben"] * 9


def test_never_two_at_once():
    line, inside, most = ComputeQueue(), [], []

    def compute():
        turn = Turn(line, "anna")
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
    assert line.length == 0


def test_a_turn_is_given_up_while_waiting_and_taken_again():
    line = ComputeQueue()
    turn = Turn(line, "anna")
    with turn.computing():
        assert line.length == 1
        with turn.waiting():
            assert line.length == 0
        assert line.length == 1
    assert line.length == 0


@pytest.mark.parametrize("nested", [False, True])
def test_an_error_leaves_the_line_free(nested):
    line = ComputeQueue()
    turn = Turn(line, "anna")
    inner = turn.waiting() if nested else contextlib.nullcontext()
    with pytest.raises(ZeroDivisionError), turn.computing(), inner:
        raise ZeroDivisionError
    assert line.length == 0


def test_giving_way_lets_the_next_one_compute_and_costs_nothing_alone():
    line, order = ComputeQueue(), []
    first = Turn(line, "anna")

    def second():
        with Turn(line, "anna").computing():
            order.append("second")

    with first.computing():
        first.give_way()  # nobody asks: the turn is kept
        assert line.length == 1
        thread = threading.Thread(target=second)
        thread.start()
        wait_until(lambda: line.length == 2, "the second one in line")
        order.append("first")
        first.give_way()
        order.append("first again")
    thread.join()
    assert order == ["first", "second", "first again"]


def test_seconds_are_those_of_computing(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    turn = Turn(ComputeQueue(), "anna")
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
