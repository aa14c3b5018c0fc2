"""Sizes and times: read as people write them, and written as people read them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidelock.errors import ConfigError
from tidelock.units import format_bytes, format_seconds, format_short_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0), ("4096", 4096), ("1B", 1), ("8GiB", 8 << 30), ("8gib", 8 << 30), (" 1.5 KiB ", 1536),
        ("500 MB", 500_000_000), ("2kB", 2000), ("1 TB", 10**12),
        ("1TiB", 1 << 40), ("3MiB", 3 << 20), ("7GB", 7 * 10**9),
    ],
)  # fmt: skip
def test_a_size_is_read(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 parsec", "1,5 GB", "1e9", "0x10", "1 G B", ".5GB", "1."])
def test_another_form_of_size_is_refused(text):
    with pytest.raises(ConfigError, match="Size: expected a number with a unit"):
        parse_bytes(text)


@given(st.text(max_size=20))
def test_no_short_text_raises_anything_else(text):
    with contextlib.suppress(ConfigError):
        assert parse_bytes(text) >= 0


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1 << 20, "1.0 MB"), (189_000_000, "189.0 MB"),
        (10**9, "1.0 GB"), (25 * 10**11, "2.5 TB"), (10**16, "10000.0 TB"),
    ],
)  # fmt: skip
def test_a_size_is_written(count, text):
    assert format_bytes(count) == text


@given(st.integers(0, 10**15))
def test_a_written_size_can_be_read_again(count):
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.051)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"), (0.25, "0.2 s"), (59.9, "59.9 s"), (60, "1 min 0 s"), (75, "1 min 15 s"),
        (3599, "59 min 59 s"), (3600, "1 h 0 min"), (90_061, "25 h 1 min"),
    ],
)  # fmt: skip
def test_a_time_is_written(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 ms"), (0.0123, "12.3 ms"), (0.9, "900 ms"), (1, "1 s"), (59.94, "59.9 s"), (75, "1 min 15 s")],
)
def test_a_short_time_is_written(seconds, text):
    assert format_short_seconds(seconds) == text
