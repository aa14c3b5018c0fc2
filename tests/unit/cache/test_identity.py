"""What a cache is of: every part of it changes the names of entries, and a wrong value is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.cache.conftest import IDENTITY
from tidelock.cache import identity as module
from tidelock.cache.identity import entry_name
from tidelock.errors import ConfigError

KEY = bytes(32)
CHANGES: dict[str, Any] = {
    "model": "c" * 64,
    "tokenizer": "c" * 64,
    "dtype": "bf16",
    "taps": (0, 1),
    "tap_width": 4,
    "codec": "bf16",
    "wire_codec": "int8",
}


def test_every_field_has_a_change() -> None:
    assert set(CHANGES) == set(IDENTITY.__slots__)


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_changes_names_and_folder(field: str) -> None:
    other = replace(IDENTITY, **{field: CHANGES[field]})
    assert entry_name(other, [[1, 2]], KEY) != entry_name(IDENTITY, [[1, 2]], KEY)
    assert other.group != IDENTITY.group
    assert replace(IDENTITY).group == IDENTITY.group


def test_another_format_changes_names(monkeypatch: pytest.MonkeyPatch) -> None:
    before = entry_name(IDENTITY, [[1, 2]], KEY)
    monkeypatch.setattr(module, "_FORMAT", 2)
    assert entry_name(IDENTITY, [[1, 2]], KEY) != before


ROWS = st.lists(st.lists(st.integers(0, 2**31), min_size=1, max_size=4), min_size=1, max_size=3)


@given(ROWS, ROWS)
def test_names_are_equal_where_the_ids_are(one: list[list[int]], other: list[list[int]]) -> None:
    assert (entry_name(IDENTITY, one, KEY) == entry_name(IDENTITY, other, KEY)) == (one == other)


def test_names_depend_on_where_rows_end_and_on_the_key() -> None:
    examples = [((1, 2), (3,)), ((1,), (2, 3)), ((1, 2, 3),), ((3, 2, 1),), ((1, 2),)]
    assert len({entry_name(IDENTITY, ids, KEY) for ids in examples}) == len(examples)
    assert entry_name(IDENTITY, ((1,),), KEY) != entry_name(IDENTITY, ((1,),), bytes(31) + b"k")


@pytest.mark.parametrize("ids", [(), ((),), ((1, 2), ())])
def test_an_example_without_tokens_is_refused(ids: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ConfigError, match=r"An example of a cache: expected token ids, got rows of"):
        entry_name(IDENTITY, ids, KEY)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "c" * 63),
        ("tokenizer", "C" * 64),
        ("dtype", "fp16"),
        ("taps", ()),
        ("taps", (1, 1)),
        ("taps", (2, 1)),
        ("taps", (-1, 1)),
        ("tap_width", 0),
        ("codec", "int4"),
        ("wire_codec", "int2"),
    ],
)
def test_a_wrong_value_is_refused(field: str, value: object) -> None:
    changes: dict[str, Any] = {field: value}
    with pytest.raises(ConfigError, match=rf"What a cache is of, {field}: expected .*, got "):
        replace(IDENTITY, **changes)
