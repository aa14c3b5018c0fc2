"""A pool whose peers are threads of this process, on loopback."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar, cast

from torch import distributed

from tidelock.pool.notices import Notices
from tidelock.pool.peers import Peers

T = TypeVar("T")


def in_pool(count: int, work: Callable[[Peers], T], *, timeout_s: float = 20) -> list[T | Exception]:
    """Return what each peer's work returned or raised, by the peers' numbers."""
    store = cast("Any", distributed).HashStore()
    store.set_timeout(timedelta(seconds=timeout_s))

    def run(peer: int) -> T | Exception:
        try:
            return work(Peers(Notices(store, timeout_s), peer, count))
        except Exception as error:  # noqa: BLE001  (the test looks at it)
            return error

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, range(count)))


def all_of(results: list[T | Exception]) -> list[T]:
    """Return what the peers returned; raise what one of them raised."""
    for result in results:
        if isinstance(result, Exception):
            raise result
    return cast("list[T]", results)
