"""Passes in flight over a link: schedules worked out by hand, and what holds for all of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidelock.plan.flight import Act, Flight, Processors, fly
from tidelock.plan.link import CloudLink

ALONE = Processors(turns=8, crowding=0.0, shared=False)
# A tenth of a second each way; 8 bits a second up are a byte, 16 down are two.
LINK = CloudLink(round_trip_seconds=0.2, up_bits_per_second=8.0, down_bits_per_second=16.0)


def a_pass(device: float = 1.0, up: float = 2.0, cloud: float = 3.0, down: float = 4.0, last: float = 0.5) -> list[Act]:
    return [Act("device", device), Act("up", up), Act("cloud", cloud), Act("down", down), Act("device", last)]


def test_one_pass_does_one_thing_after_another() -> None:
    # 1 s, then 2 s of bytes and the way, 3 s, then 4 bytes at 2 a second and the way, 0.5 s.
    flight = fly([a_pass()], 1, ALONE, LINK)
    assert flight.seconds == pytest.approx(1 + 2.1 + 3 + 2.1 + 0.5)
    assert (flight.device, flight.cloud, flight.wire) == pytest.approx((1.5, 3, 4.2))
    assert (flight.waiting, flight.alone, flight.inside) == pytest.approx((0, 8.7, 8.7))


def test_without_a_link_messages_take_no_time_but_their_lag() -> None:
    acts = [Act("up", 1e9), Act("lag", 0.25), Act("cloud", 1.0), Act("down", 1e9), Act("lag", 0.5)]
    flight = fly([acts], 1, ALONE, None)
    assert (flight.seconds, flight.wire, flight.cloud) == pytest.approx((1.75, 0.75, 1.0))


def test_lag_begins_when_the_message_has_arrived() -> None:
    acts = [Act("up", 1.0), Act("lag", 0.25), Act("cloud", 1.0)]
    assert fly([acts], 1, ALONE, LINK).seconds == pytest.approx(1 + 0.1 + 0.25 + 1)


def test_messages_share_a_link_in_the_order_of_sending() -> None:
    # Both have computed after 1 s; the second one's bytes go from 3 to 5, so that it is in the cloud from 5.1 on.
    flight = fly([a_pass(), a_pass()], 2, ALONE, LINK)
    assert flight.seconds == pytest.approx(5.1 + 3 + 2.1 + 0.5)
    assert flight.wire == pytest.approx(4.2 + 6.2)


def test_a_pass_waits_for_its_turn() -> None:
    passes = [[Act("cloud", 2.0)], [Act("cloud", 3.0)], [Act("cloud", 1.0)]]
    flight = fly(passes, 3, Processors(turns=1, crowding=0.0, shared=False), None)
    assert (flight.seconds, flight.waiting, flight.cloud, flight.alone) == pytest.approx((6, 2 + 5, 6, 2 + 5 + 6))


def test_as_many_are_on_their_way_as_may_be() -> None:
    passes = [[Act("device", 2.0)]] * 4
    assert fly(passes, 4, ALONE, None).seconds == pytest.approx(2)
    assert fly(passes, 3, ALONE, None).seconds == pytest.approx(4)
    assert fly(passes, 1, ALONE, None).seconds == pytest.approx(8)


@pytest.mark.parametrize(
    ("crowding", "shared", "seconds"), [(1.0, True, 4), (0.5, True, 3), (0.0, True, 2), (1.0, False, 2)]
)
def test_computing_at_once_slows_down_on_one_machine(crowding: float, shared: bool, seconds: float) -> None:
    flight = fly([[Act("device", 2.0)], [Act("cloud", 2.0)]], 2, Processors(2, crowding, shared), None)
    assert flight.seconds == pytest.approx(seconds)


def test_speed_changes_when_another_one_ends() -> None:
    # Both at half speed for 2 s; then 1 of the longer one's 2 s is left, at full speed.
    flight = fly([[Act("device", 1.0)], [Act("device", 2.0)]], 2, Processors(2, 1.0, shared=True), None)
    assert flight.seconds == pytest.approx(3)


def test_the_cloud_goes_on_while_what_it_has_sent_is_on_its_way() -> None:
    taps = [Act("up", 1.0), Act("cloud", 1.0), Act("down", 2.0), Act("cloud", 1.0), Act("down", 2.0)]
    # 1.1 s there; the second tap leaves when it is computed, 2 s later, takes a second and travels.
    flight = fly([taps], 1, ALONE, LINK)
    assert (flight.seconds, flight.cloud) == pytest.approx((1.1 + 2 + 1 + 0.1, 2))


AMOUNTS = st.floats(0, 5, allow_nan=False)
PASSES = st.lists(st.tuples(*[AMOUNTS] * 5).map(lambda amounts: a_pass(*amounts)), min_size=1, max_size=5)
LINKS = st.builds(CloudLink, AMOUNTS, st.floats(0.5, 100), st.floats(0.5, 100))


@given(st.tuples(*[AMOUNTS] * 5), LINKS, st.floats(0, 3), st.floats(1, 4))
def test_a_longer_or_slower_link_never_makes_a_pass_quicker(
    amounts: tuple[float, ...], link: CloudLink, more: float, slower: float
) -> None:
    before = fly([a_pass(*amounts)], 1, ALONE, link).seconds
    worse = (
        CloudLink(link.round_trip_seconds + more, link.up_bits_per_second, link.down_bits_per_second),
        CloudLink(link.round_trip_seconds, link.up_bits_per_second / slower, link.down_bits_per_second),
        CloudLink(link.round_trip_seconds, link.up_bits_per_second, link.down_bits_per_second / slower),
    )
    assert all(fly([a_pass(*amounts)], 1, ALONE, other).seconds >= before - 1e-9 for other in worse)


@given(PASSES, LINKS, st.integers(1, 5), st.integers(1, 3))
def test_passes_take_no_less_than_the_longest_and_no_more_than_all_in_turn(
    passes: list[list[Act]], link: CloudLink, at_once: int, turns: int
) -> None:
    processors = Processors(turns, 0.0, shared=True)
    alone = [fly([acts], 1, processors, link).seconds for acts in passes]
    flight = fly(passes, at_once, processors, link)
    assert max(alone) - 1e-6 <= flight.seconds <= sum(alone) + 1e-6
    assert flight.alone == pytest.approx(flight.device + flight.cloud + flight.wire + flight.waiting, abs=1e-6)
    in_turn = fly(passes, 1, processors, link)
    assert in_turn.seconds == pytest.approx(sum(alone), abs=1e-6)
    assert in_turn.waiting == pytest.approx(0, abs=1e-9)


@given(PASSES, LINKS, st.floats(0, 2))
def test_a_link_carries_no_more_than_its_rate(passes: list[list[Act]], link: CloudLink, crowding: float) -> None:
    flight = fly(passes, len(passes), Processors(2, crowding, shared=True), link)
    up = sum(acts[1].amount for acts in passes)
    assert flight.seconds >= 8 * up / link.up_bits_per_second - 1e-6


def test_flights_one_after_another_add_up() -> None:
    one, other = fly([a_pass()], 1, ALONE, LINK), fly([a_pass()], 1, ALONE, None)
    both = one + other
    assert isinstance(both, Flight)
    assert both.seconds == pytest.approx(one.seconds + other.seconds)
    assert both.device == pytest.approx(3)
