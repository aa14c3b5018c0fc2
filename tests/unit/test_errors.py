"""The tree of errors: one root, one exit code each, and the drawing of it is true."""

from __future__ import annotations

import re

import pytest

from tidelock import errors
from tidelock.errors import INTERRUPTED_EXIT_CODE, TidelockError

EVERY = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, TidelockError)]


def test_every_error_has_an_exit_code_of_its_own():
    codes = [error.exit_code for error in EVERY]
    assert len(set(codes)) == len(codes)
    assert INTERRUPTED_EXIT_CODE not in codes


def test_the_drawing_shows_every_error_with_its_code():
    drawn = dict(re.findall(r"^\s*[├└]── (\w+)\s+(\d+) ", errors.__doc__, re.MULTILINE))
    assert drawn == {error.__name__: str(error.exit_code) for error in EVERY if error is not TidelockError}
    assert re.search(r"^    TidelockError\s+1 ", errors.__doc__, re.MULTILINE)


@pytest.mark.parametrize("error", EVERY, ids=lambda error: error.__name__)
def test_an_error_is_its_message(error):
    raised = error("Asked: expected a, got b (here). Do this.")
    assert str(raised) == raised.message == "Asked: expected a, got b (here). Do this."
    assert isinstance(raised, TidelockError)
    # 2-9: on this machine; 10-19: on the other side.
    assert error is TidelockError or 2 <= error.exit_code <= 19
