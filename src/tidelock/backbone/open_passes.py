"""Which passes of this device have a stream open, so that the device never waits in a cloud for itself.

A training pass keeps its place in the cloud from its forward to its backward. If another pass of the same device waited
for a place meanwhile, and that one for the first to end, both would wait until their deadline. So whoever holds a place
asks for another without waiting; when there is none, the device gives its idle places back and goes on with one pass
alone. What was given back is repeated at its backward.

May import errors and libraries.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, final
from weakref import WeakSet

if TYPE_CHECKING:
    from collections.abc import Iterator


class Closable(Protocol):
    """A pass that may be closed while nobody runs it."""

    @property
    def is_open(self) -> bool:
        """Whether it holds a place in the cloud."""
        ...

    def close(self) -> None:
        """Give its place in the cloud back."""
        ...


@final
class OpenPasses:
    """The passes of one connection, some of which run while others wait for their backward."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._running = 0
        self._alone = False
        self._idle: WeakSet[Closable] = WeakSet()

    @contextmanager
    def running(self, run: Closable) -> Iterator[bool]:
        """Run a pass inside, beside others; yields whether this device may hold a place already."""
        with self._condition:
            self._condition.wait_for(lambda: not self._alone)
            self._idle.discard(run)
            holds = self._running > 0 or any(other.is_open for other in self._idle)
            self._running += 1
        try:
            yield holds
        finally:
            self._stop(run)

    @contextmanager
    def alone(self, run: Closable) -> Iterator[bool]:
        """Run a pass inside while no other of this device runs or holds a place; yields False, as `running` would."""
        with self._condition:
            self._condition.wait_for(lambda: not self._alone and self._running == 0)
            for other in list(self._idle):
                other.close()
            self._alone = True
            self._running += 1
        try:
            yield False
        finally:
            self._alone = False  # before _stop wakes the others
            self._stop(run)

    def _stop(self, run: Closable) -> None:
        with self._condition:
            self._running -= 1
            self._idle.add(run)
            self._condition.notify_all()
