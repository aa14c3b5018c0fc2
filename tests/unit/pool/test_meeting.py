"""Peers find each other and get numbers, at the beginning and whenever the pool changes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, cast

import pytest
from torch import distributed

from tidelock.errors import ConfigError, ListenRefused, PeerError
from tidelock.pool.meeting import MeetingPlace, Seat
from tidelock.pool.notices import Notices, in_time

TIMEOUT = 10.0


@pytest.fixture
def places():
    """Return what makes the meeting place as another peer sees it; they share the store."""
    store = cast("Any", distributed).HashStore()
    return lambda timeout_s=TIMEOUT: MeetingPlace(Notices(store, timeout_s), "127.0.0.1")


@contextmanager
def coming(places, *arrivals):
    """Have others come one after another; give their seats, to be asked for within the block."""
    with ThreadPoolExecutor(max(1, len(arrivals))) as threads:
        seats = []
        for number, arrival in enumerate(arrivals, 1):
            place = places()
            seats.append(threads.submit(place.arrive, **arrival))
            while number > place.notices.count("arrivals"):
                time.sleep(0.005)
        yield seats


def test_a_peer_gets_the_number_that_it_wants_or_a_free_one(places):
    arrivals = [{}, {"wish": 2, "insists": True}, {"wish": 3}, {"wish": 2}]
    with coming(places, *arrivals) as seats:
        assert places().seat_first(5) == Seat(0, 0, 5)
        assert [seat.result().peer for seat in seats] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("wish", "expected"),
    [(0, "expected one of 2, got 0"), (3, "expected one of 2, got 3"), (1, "expected one of 2, got 1")],
)
def test_a_number_that_cannot_be_is_refused(places, wish, expected):
    arrivals = [{"wish": 1, "insists": True}, {"wish": wish, "insists": True}, {}]
    with coming(places, *arrivals) as (first, refused, last):
        places().seat_first(3)
        assert (first.result().peer, last.result().peer) == (1, 2)
        with pytest.raises(ConfigError, match=expected):
            refused.result()


def test_too_few_come(places):
    with pytest.raises(PeerError, match=r"expected 2 peers within 0.2 s, got 1\. Start the others"):
        places(0.2).seat_first(2)


def test_those_that_are_left_keep_their_order_and_others_come_after_them(places):
    was = Seat(3, 0, 4)
    arrivals = [{"was": None}, {"was": Seat(3, 3, 4)}, {"was": Seat(2, 1, 4)}, {"was": Seat(3, 1, 4)}]
    with coming(places, *arrivals) as seats:
        place = places(4)
        assert place.somebody_waits()
        began = time.monotonic()
        assert place.seat_again(was) == Seat(4, 0, 5)
        # Peer 2 of the last round is waited for, though not for ever.
        assert 1 <= time.monotonic() - began < 4
        assert not place.somebody_waits()
        assert [seat.result() for seat in seats] == [Seat(4, n, 5) for n in (3, 2, 4, 1)]


def test_when_all_are_there_nobody_is_waited_for(places):
    with coming(places, {"was": Seat(0, 1, 2)}, {}) as seats:
        place = places(1000)
        assert place.seat_again(Seat(0, 0, 2)) == Seat(1, 0, 3)
        assert [seat.result().peer for seat in seats] == [1, 2]


def test_who_comes_when_all_seats_are_taken_waits_for_the_next_round(places):
    with coming(places, {}, {}) as (first, late):
        place = places()
        own = place.seat_first(2)
        assert first.result() == Seat(0, 1, 2)
        assert place.somebody_waits()
        with coming(places, {"was": first.result()}) as (again,):
            place.seat_again(own)
            assert (again.result(), late.result()) == (Seat(1, 1, 3), Seat(1, 2, 3))


def test_one_that_was_lost_while_it_came_holds_nobody_up(places):
    place = places(1)
    place.notices.count("arrivals", 1)
    assert place.seat_again(Seat(0, 0, 1)) == Seat(1, 0, 1)


def test_what_takes_too_long_is_left_alone():
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0.1 s"):
        in_time(0.1, lambda: time.sleep(5))
    assert time.monotonic() - began < 4
    assert in_time(5, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        in_time(5, lambda: 1 // 0)


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenRefused, match=f"expected to listen at 127.0.0.1:{port}, got Address already in use"):
            MeetingPlace.host("127.0.0.1", port, timeout_s=1)


def host(told):
    """Hold a meeting place, and say where; run in a process of its own."""
    place, port = MeetingPlace.host("127.0.0.1", 0, timeout_s=TIMEOUT)
    place.notices.tell("something", "there")
    told.send(port)
    time.sleep(60)


@contextmanager
def another_process():
    """Give a process that holds a meeting place, and the place's port."""
    context = multiprocessing.get_context("forkserver")
    heard, told = context.Pipe()
    process = context.Process(target=host, args=(told,))
    process.start()
    try:
        yield process, heard.recv()
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=lambda number: number.name)
@pytest.mark.parametrize("what", ["ask", "tell", "arrive"])
def test_a_meeting_place_that_hangs_or_is_gone_is_noticed(what, number):
    """`torch.distributed` itself would wait for a stopped one for ever."""
    with another_process() as (process, port):
        place = MeetingPlace.find("127.0.0.1", port, own_host="127.0.0.1", timeout_s=TIMEOUT)
        assert place.notices.ask("something") == "there"
        place.notices.timeout_s = 0.5
        os.kill(process.pid, number)
        began = time.monotonic()
        acts: dict[str, Callable[[], object]] = {
            "ask": lambda: place.notices.ask("nothing"),
            "arrive": place.arrive,
            "tell": lambda: place.notices.tell("a", "b"),
        }

        def act_until_it_is_noticed():
            while True:  # what is told first may only have reached the network
                acts[what]()
                place.notices.ask("something")

        with pytest.raises(PeerError, match="expected an answer while"):
            act_until_it_is_noticed()
        assert time.monotonic() - began < TIMEOUT


def test_a_meeting_place_that_hangs_before_it_is_found_is_noticed():
    with another_process() as (process, port):
        os.kill(process.pid, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(PeerError, match=f"looking for peer 0 at 127.0.0.1:{port}, got: no answer within 2 s"):
            MeetingPlace.find("127.0.0.1", port, own_host="127.0.0.1", timeout_s=1)
        assert time.monotonic() - began < TIMEOUT
