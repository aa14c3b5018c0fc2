"""A link as people write it: what is read out of it, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidelock.errors import ConfigError
from tidelock.plan.link import CloudLink, parse_link


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("40ms,50mbit", CloudLink(0.04, 50e6, 50e6)),
        ("40ms,20mbit/100mbit", CloudLink(0.04, 20e6, 100e6)),
        ("1.5s, 512kbit", CloudLink(1.5, 512e3, 512e3)),
        ("250US,1Gbit", CloudLink(250e-6, 1e9, 1e9)),
        ("0ms,1mbit", CloudLink(0.0, 1e6, 1e6)),
    ],
)
def test_it_reads_delay_and_rates(text: str, link: CloudLink) -> None:
    read = parse_link(text)
    assert read.round_trip_seconds == pytest.approx(link.round_trip_seconds)
    assert (read.up_bits_per_second, read.down_bits_per_second) == (link.up_bits_per_second, link.down_bits_per_second)


@pytest.mark.parametrize(
    "text",
    [
        *("", "40ms", "50mbit", "50mbit,40ms", "40,50", "40ms,50", "40ms,0mbit", "40ms,1mbit/0mbit", "-1ms,1mbit"),
        *("40ms,50MB", "40ms,1mbit/2mbit/3mbit", "40ms,1mbit,1mbit", "40min,1mbit", "nanms,1mbit", "1e3ms,1mbit"),
    ],
)
def test_anything_else_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--link: expected RTT,RATE or RTT,UP/DOWN .* got") as caught:
        parse_link(text)
    assert repr(text) in caught.value.message


@given(st.integers(0, 10_000), st.integers(1, 10**6), st.integers(1, 10**6))
def test_what_is_written_is_read(milliseconds: int, up: int, down: int) -> None:
    link = parse_link(f"{milliseconds}ms,{up}kbit/{down}mbit")
    assert link.round_trip_seconds == pytest.approx(milliseconds / 1000)
    assert (link.up_bits_per_second, link.down_bits_per_second) == (up * 1e3, down * 1e6)
