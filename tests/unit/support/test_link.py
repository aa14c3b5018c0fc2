"""The arithmetic of links, by hand: a clock is a number here."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.link import Lane, Link

PIECES = st.lists(st.tuples(st.floats(0, 1), st.integers(1, 1 << 16)), min_size=1, max_size=20)


def test_a_delay_keeps_nobody_busy():
    lane = Lane(Link(delay_seconds=0.5))
    assert [lane.send(10.0, 1 << 20) for _ in range(3)] == [(10.0, 10.5)] * 3


def test_bandwidth_is_one_piece_after_another_and_the_delay_comes_once():
    lane = Lane(Link(delay_seconds=0.5, mbit_per_second=8.0))  # a megabyte a second
    assert lane.send(10.0, 250_000) == pytest.approx((10.25, 10.75))
    assert lane.send(10.1, 500_000) == pytest.approx((10.75, 11.25))
    assert lane.send(20.0, 1_000_000) == pytest.approx((21.0, 21.5))  # nothing is saved up while it is idle


def test_a_stall_holds_what_has_not_left():
    lane = Lane(Link(delay_seconds=0.5))
    assert lane.send(10.0, 1) == (10.0, 10.5)
    lane.stall(12.0)
    assert lane.send(10.1, 1) == (12.0, 12.5)
    assert lane.send(13.0, 1) == (13.0, 13.5)


@given(PIECES, st.integers(0, 9))
def test_with_jitter_pieces_are_late_within_bounds_and_stay_in_order(pieces, seed):
    link = Link(delay_seconds=0.05, jitter_seconds=0.02, mbit_per_second=100.0)
    lane, steady = Lane(link, seed), Lane(Link(delay_seconds=0.05, mbit_per_second=100.0))
    now, before = 0.0, 0.0
    for pause, size in pieces:
        now += pause
        (left, due), (steady_left, steady_due) = lane.send(now, size), steady.send(now, size)
        assert left == steady_left >= now + size * 8 / 100e6
        assert due >= before
        assert steady_due <= due <= max(before, steady_due + 0.02)
        before = due


def test_jitter_is_drawn_by_the_seed():
    dues = [[Lane(Link(jitter_seconds=1.0), seed).send(0.0, 1)[1] for _ in range(2)] for seed in (1, 2)]
    assert dues[0][0] == dues[0][1] != dues[1][0]


@pytest.mark.parametrize(("mbit", "size"), [(None, 1 << 16), (1.0, 2048), (100.0, 12_500), (1e6, 1 << 16)])
def test_a_piece_is_a_milliseconds_bytes(mbit, size):
    assert Link(mbit_per_second=mbit).piece_bytes == size
