"""Whose turn it is to compute: a few passes at a time, first come first served, given up after every segment.

May import errors and libraries.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from collections.abc import Iterator


@final
class ComputeQueue:
    """A fair lock: whoever asked first computes next.

    Args:
        at_once: Passes that compute at the same time. More than there are processors for would only get in each
            other's way.
    """

    def __init__(self, at_once: int = 1) -> None:
        self.at_once = at_once
        self._condition = threading.Condition()
        self._line: deque[object] = deque()

    def enter(self) -> object:
        """Wait for the turn; return the ticket to give back."""
        ticket = object()
        with self._condition:
            self._line.append(ticket)
            self._condition.wait_for(lambda: ticket in itertools.islice(self._line, self.at_once))
        return ticket

    def leave(self, ticket: object) -> None:
        """Give the turn to the next in line."""
        with self._condition:
            self._line.remove(ticket)
            self._condition.notify_all()

    @property
    def waiting(self) -> int:
        """How many are in line, the one whose turn it is included."""
        return len(self._line)


@final
class Turn:
    """One pass's use of the compute queue.

    Args:
        line: The queue.
        waited_seconds: How long the pass has waited for other things before.

    Attributes:
        seconds: How long it has computed.
        waited_seconds: How long it has waited in all.
    """

    def __init__(self, line: ComputeQueue, waited_seconds: float = 0.0) -> None:
        self.waited_seconds = waited_seconds
        self._line = line
        self._ticket: object | None = None
        self._since = 0.0
        self.seconds = 0.0

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Hold the turn inside, so far as it is not given up."""
        self._take()
        try:
            yield
        finally:
            self._give()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Give the turn up inside, while something else than the processor is waited for."""
        self._give()
        try:
            yield
        finally:
            self._take()

    def give_way(self) -> None:
        """Let those compute who asked meanwhile."""
        if self._line.waiting > self._line.at_once:
            with self.waiting():
                pass

    def _take(self) -> None:
        asked = time.perf_counter()
        self._ticket = self._line.enter()
        self._since = time.perf_counter()
        self.waited_seconds += self._since - asked

    def _give(self) -> None:
        self.seconds += time.perf_counter() - self._since
        self._line.leave(self._ticket)
