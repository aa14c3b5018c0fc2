"""Whose turn it is to compute: a few passes at a time, given up after every segment, to the tenant that had least.

Turns are shared as start-time fair queueing has it (Goyal, Vin and Cheng, doi 10.1145/248156.248171): each tenant has
an account of the seconds that it has computed, and the next turn is of the lowest one that asks. Who asks for nothing
saves up no claim, but for a little, since every pass waits for its device again and again.

May import errors and libraries.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast, final

if TYPE_CHECKING:
    from collections.abc import Iterator

# Passes that compute at the same time on a CPU: while one encodes and decodes, another's blocks run.
AT_ONCE_ON_CPU = 2
# What a tenant can have in hand that had nothing to compute for a while, in seconds, over how many are in line: while a
# device computes the accounts of many rise slowly, and whoever was there before has to wait for what all have in hand.
_CLAIM = 1.0


@final
@dataclass(eq=False, slots=True)
class Ticket:
    """A place in the compute queue."""

    tenant: str
    called: threading.Event = field(default_factory=threading.Event)


@final
class ComputeQueue:
    """A lock that is fair between tenants; of one tenant's passes, whichever asked first computes next.

    Args:
        at_once: Passes that compute at the same time. More than there are processors for would only get in each
            other's way.
    """

    def __init__(self, at_once: int = 1) -> None:
        self.at_once = at_once
        self._lock = threading.Lock()
        self._waiting: list[Ticket] = []
        self._computing: set[Ticket] = set()
        # Of each tenant, in seconds; there are as many as have a token.
        self._accounts: dict[str, float] = defaultdict(float)
        # The highest account that was called so far.
        self._now = 0.0

    def enter(self, tenant: str) -> Ticket:
        """Wait for the turn; return the ticket to give back.

        Args:
            tenant: Whose pass it is.
        """
        ticket = Ticket(tenant)
        with self._lock:
            if not any(other.tenant == tenant for other in (*self._waiting, *self._computing)):
                self._accounts[tenant] = max(self._accounts[tenant], self._now - _CLAIM / (1 + self.length))
            self._waiting.append(ticket)
            self._call()
        ticket.called.wait()
        return ticket

    def leave(self, ticket: Ticket, seconds: float) -> None:
        """Give the turn to the next in line.

        Args:
            ticket: Of the turn that ends.
            seconds: How long it was.
        """
        with self._lock:
            self._computing.remove(ticket)
            self._accounts[ticket.tenant] += seconds
            self._call()

    @property
    def length(self) -> int:
        """How many are in line, those whose turn it is included."""
        return len(self._waiting) + len(self._computing)

    def _call(self) -> None:
        while self._waiting and len(self._computing) < self.at_once:
            ticket = min(self._waiting, key=lambda waiting: self._accounts[waiting.tenant])
            self._waiting.remove(ticket)
            self._computing.add(ticket)
            self._now = max(self._now, self._accounts[ticket.tenant])
            ticket.called.set()


@final
class Turn:
    """One pass's use of the compute queue.

    Args:
        line: The queue.
        tenant: Whose pass it is.
        waited_seconds: How long the pass has waited for other things before.

    Attributes:
        seconds: How long it has computed.
        waited_seconds: How long it has waited in all.
    """

    def __init__(self, line: ComputeQueue, tenant: str, waited_seconds: float = 0.0) -> None:
        self.waited_seconds = waited_seconds
        self._line = line
        self._tenant = tenant
        self._ticket: Ticket | None = None
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
        if self._line.length > self._line.at_once:
            with self.waiting():
                pass

    def _take(self) -> None:
        asked = time.perf_counter()
        self._ticket = self._line.enter(self._tenant)
        self._since = time.perf_counter()
        self.waited_seconds += self._since - asked

    def _give(self) -> None:
        seconds = time.perf_counter() - self._since
        self.seconds += seconds
        self._line.leave(cast("Ticket", self._ticket), seconds)
