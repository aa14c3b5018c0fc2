"""A peer is held to its memory by what its process takes."""

from __future__ import annotations

import numpy as np
import pytest

from tidelock.errors import MemoryExceeded
from tidelock.pool.memory import MemoryLimit

MEGABYTE = 1 << 20


def test_what_the_process_takes_is_seen() -> None:
    limits = [MemoryLimit(most) for most in (100 * MEGABYTE, 400 * MEGABYTE, None)]
    taken = np.ones(200 * MEGABYTE, dtype=np.uint8)
    for limit in limits:
        limit.look()
    assert [limit.is_exceeded for limit in limits] == [True, False, False]
    assert taken.all()
    for limit in limits[1:]:
        limit.hold()
    with pytest.raises(MemoryExceeded, match=r"expected at most 104\.9 MB beside Python .* got [12]\d\d\.\d MB"):
        limits[0].hold()


def test_once_exceeded_it_stays_so_until_it_is_answered_for() -> None:
    sizes = iter([5, 20, 20])
    limit = MemoryLimit(10, lambda: next(sizes))
    limit.look()
    assert limit.is_exceeded
    limit.look()  # does not ask again


def test_what_is_only_kept_for_later_does_not_count() -> None:
    sizes = iter([5, 20, 12])
    limit = MemoryLimit(10, lambda: next(sizes))
    limit.look()
    assert not limit.is_exceeded
