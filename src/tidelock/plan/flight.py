"""Passes in flight between a device and a cloud, event by event: who computes, what is on the wire, who waits.

A pass is a chain of acts, now at one side, now at the other. What one side sends takes the link for a time, in the
order of sending, then travels; the side that acts next begins once all has arrived. In the cloud so many passes compute
at once as have a turn. Computing at the same time slows down: each of k at once runs at 1 / (1 + crowding (k - 1)) of
its speed alone, where both sides count together if they are one machine.

May import `plan`.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tidelock.plan.link import CloudLink

Way = Literal["up", "down"]
_RECEIVED_AT: dict[str, Way] = {"device": "down", "cloud": "up"}


class Act(NamedTuple):
    """One thing of a pass.

    Attributes:
        what: `device` or `cloud` computes; `up` or `down` sends from or to the device; `lag` is the time that a message
            takes which is neither computing nor the link's: it begins when all that was sent has arrived.
        amount: Seconds; bytes of what is sent.
    """

    what: Literal["device", "cloud", "up", "down", "lag"]
    amount: float


@final
@dataclass(frozen=True, slots=True)
class Processors:
    """What computes on both sides.

    Attributes:
        turns: Passes that the cloud lets compute at once.
        crowding: What computing at once costs: 0 nothing, 1 as much as one after another.
        shared: Whether both sides are one machine.
    """

    turns: int
    crowding: float
    shared: bool


@final
@dataclass(slots=True)
class Flight:
    """What a group of passes took, in seconds.

    Attributes:
        seconds: From the first one's begin to the last one's end, and what its caller adds.
        inside: With any pass on its way.
        device: Computing on the device, summed over passes.
        cloud: Computing in the cloud, likewise.
        wire: Waiting for messages, likewise.
        waiting: Waiting for a turn in the cloud, likewise.
        alone: The time that each pass took, likewise.
    """

    seconds: float = 0.0
    inside: float = 0.0
    device: float = 0.0
    cloud: float = 0.0
    wire: float = 0.0
    waiting: float = 0.0
    alone: float = 0.0

    def __add__(self, other: Flight) -> Flight:
        """Return both, one after the other."""
        return Flight(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


@final
@dataclass(slots=True)
class _Pass:
    acts: Sequence[Act]
    next_act: int = 0
    began: float = 0.0
    since: float = 0.0  # when what it does or waits for began
    arrives: dict[str, float] = field(default_factory=lambda: {"up": 0.0, "down": 0.0})


def fly(passes: Iterable[Sequence[Act]], at_once: int, processors: Processors, link: CloudLink | None) -> Flight:
    """Return what passes take, of which so many are on their way at once and the others begin in order.

    Args:
        passes: The acts of each.
        at_once: How many; at least 1.
        processors: Who computes.
        link: Between them; None takes no time.
    """
    return _Flying(passes, processors, link).run(at_once)


@final
class _Flying:
    """The state of all passes at one time."""

    def __init__(self, passes: Iterable[Sequence[Act]], processors: Processors, link: CloudLink | None) -> None:
        self._processors = processors
        self._delay = 0.0 if link is None else link.round_trip_seconds / 2
        self._rates = {} if link is None else {"up": link.up_bits_per_second, "down": link.down_bits_per_second}
        self._free = {"up": 0.0, "down": 0.0}
        self._now = 0.0
        self._to_begin = deque(_Pass(acts) for acts in passes)
        # Those that wait for a time, those that wait for a turn, and those that compute with the seconds left.
        self._timed: list[tuple[float, int, _Pass]] = []
        self._line: deque[_Pass] = deque()
        self._computing: list[tuple[_Pass, str, float]] = []
        self._events = 0
        self._flight = Flight()

    def run(self, at_once: int) -> Flight:
        for _ in range(min(at_once, len(self._to_begin))):
            self._begin()
        while self._timed or self._computing:
            self._step()
        self._flight.seconds = self._flight.inside = self._now
        return self._flight

    def _begin(self) -> None:
        one = self._to_begin.popleft()
        one.began = one.since = self._now
        self._go_on(one)

    def _step(self) -> None:
        """Go to the next event: a computation that ends, or a time that comes."""
        speeds = {where: self._speed(where) for where in ("device", "cloud")}
        ends = min((self._now + left / speeds[where] for _, where, left in self._computing), default=float("inf"))
        comes = self._timed[0][0] if self._timed else float("inf")
        until = min(ends, comes)
        done, left_over = [], []
        for one, where, left in self._computing:
            rest = left - (until - self._now) * speeds[where]
            if ends <= comes and self._now + left / speeds[where] <= ends:
                done.append((one, where))
            else:
                left_over.append((one, where, rest))
        self._computing, self._now = left_over, until
        for one, where in done:
            self._count(where, one)
            one.next_act += 1
        for _, where in done:
            if where == "cloud" and self._line:
                self._take_turn(self._line.popleft())
        for one, _ in done:
            self._go_on(one)
        if not done:
            _, _, one = heapq.heappop(self._timed)
            self._count("wire", one)
            self._go_on(one)

    def _speed(self, where: str) -> float:
        count = sum(self._processors.shared or there == where for _, there, _ in self._computing)
        return 1.0 / (1.0 + self._processors.crowding * max(0, count - 1))

    def _go_on(self, one: _Pass) -> None:
        """Do what a pass does next, up to the first thing that takes time."""
        while one.next_act < len(one.acts):
            act = one.acts[one.next_act]
            if act.what in ("up", "down"):
                self._send(one, act)
                one.next_act += 1
                continue
            arrived = max(one.arrives.values()) if act.what == "lag" else one.arrives[_RECEIVED_AT[act.what]]
            if act.what == "lag":
                one.next_act += 1
                self._wait_until(max(arrived, self._now) + act.amount, one)
            elif arrived > self._now:
                self._wait_until(arrived, one)
            elif act.what == "device":
                self._computing.append((one, "device", act.amount))
            elif sum(where == "cloud" for _, where, _ in self._computing) < self._processors.turns:
                self._take_turn(one)
            else:
                self._line.append(one)
            return
        last = max(one.arrives.values())
        if last > self._now:
            self._wait_until(last, one)
            return
        self._flight.alone += self._now - one.began
        if self._to_begin:
            self._begin()

    def _send(self, one: _Pass, act: Act) -> None:
        rate = self._rates.get(act.what)
        self._free[act.what] = max(self._now, self._free[act.what]) + (8 * act.amount / rate if rate else 0.0)
        one.arrives[act.what] = self._free[act.what] + self._delay

    def _take_turn(self, one: _Pass) -> None:
        self._count("waiting", one)
        self._computing.append((one, "cloud", one.acts[one.next_act].amount))

    def _wait_until(self, time: float, one: _Pass) -> None:
        self._events += 1  # passes that wait for one time go on in the order in which they came
        heapq.heappush(self._timed, (time, self._events, one))

    def _count(self, what: str, one: _Pass) -> None:
        setattr(self._flight, what, getattr(self._flight, what) + self._now - one.since)
        one.since = self._now
