"""Which peer of a pool a process is."""

from __future__ import annotations

import pytest

from tidelock.errors import ConfigError, StorageError
from tidelock.run.pool_processes import claim_number, remember_number, remembered_number


def a_pool():
    """Return what takes a number, once."""
    taken: set[int] = set()

    def claim(number: int) -> bool:
        if number in taken:
            return False
        taken.add(number)
        return True

    return claim


def test_a_peer_gets_its_own_number_or_the_first_free_one():
    claim = a_pool()
    assert [claim_number(given, 4, claim) for given in (2, None, None)] == [2, 1, 3]


@pytest.mark.parametrize(
    ("given", "count", "expected"),
    [
        (0, 3, "a free number from 1 to 2, got 0"),
        (3, 3, "a free number from 1 to 2, got 3"),
        (1, 3, "a free number from 1 to 2, got 1"),
        (None, 2, "a free number from 1 to 1, got none"),
        (None, 1, "no peer besides peer 0"),
    ],
)
def test_a_number_that_cannot_be_is_refused(given, count, expected):
    claim = a_pool()
    claim(1)
    with pytest.raises(ConfigError, match=expected):
        claim_number(given, count, claim)


def test_a_folder_remembers_its_number(tmp_path):
    assert remembered_number(tmp_path / "new") is None
    remember_number(tmp_path / "new", 2)
    assert remembered_number(tmp_path / "new") == 2
    (tmp_path / "new" / "peer").write_text("no number")
    assert remembered_number(tmp_path / "new") is None
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="expected one that can be written, got File exists"):
        remember_number(tmp_path / "file", 1)
