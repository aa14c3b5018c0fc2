"""Where the time of training passes goes: the cloud, waiting in it, the wire, and the rest, which is the device's.

How many passes at once are worth having follows from it. May import libraries.
"""

from __future__ import annotations

import math
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from collections.abc import Iterator


@final
@dataclass(frozen=True, slots=True)
class TimeSplit:
    """Seconds in which training passes waited for something else than this device.

    Attributes:
        cloud: For the cloud's computing.
        waiting: In the cloud, for a place, for memory or for a turn; or for a cloud that was away.
        wire: For bytes to cross, encoding and decoding in the cloud included.
    """

    cloud: float = 0.0
    waiting: float = 0.0
    wire: float = 0.0


# Before anything is measured: one for each side.
_AT_FIRST = 2


def passes_at_once(device: float, cloud: float, wire: float) -> int:
    """Return how many passes at once keep the busier side busy, out of the seconds that one takes.

    While that side computes one pass, the others are at the other side or on the wire. Waiting is left out: it is for
    that side, and would be no shorter with more of them.

    Args:
        device: Computing on the device.
        cloud: Computing in the cloud.
        wire: Bytes on their way.
    """
    busier = max(device, cloud)
    return math.ceil((device + cloud + wire) / busier) if busier > 0 else _AT_FIRST


@final
@dataclass(frozen=True, slots=True)
class PassSeconds:
    """What training passes took that have come to their end, summed over them whether or not they overlapped.

    Attributes:
        device: Computing on the device.
        cloud: Computing in the cloud.
        waiting: In the cloud, for a place, for memory or for a turn.
        wire: For bytes to cross, encoding and decoding in the cloud included.
    """

    device: float = 0.0
    cloud: float = 0.0
    waiting: float = 0.0
    wire: float = 0.0


@final
class PassTimes:
    """Adds up the times of passes, several of which may run at once; safe to use from several threads.

    Two passes that wait at once wait only once on the clock. So their sums are scaled down to the time in which any
    pass ran: with two in flight all the time, to half.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._since = 0.0
        self._inside = 0.0  # on the clock, with any pass running
        self._alone = 0.0  # the sum over passes
        self._split = TimeSplit()
        self._unseen = (0.0, 0.0, 0.0)  # device, cloud and wire of passes that ended since `at_once` was asked
        self._at_once = _AT_FIRST
        self._ended = PassSeconds()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run a part of a pass inside."""
        began = time.perf_counter()
        with self._lock:
            if not self._running:
                self._since = began
            self._running += 1
        try:
            yield
        finally:
            now = time.perf_counter()
            with self._lock:
                self._running -= 1
                self._alone += now - began
                if not self._running:
                    self._inside += now - self._since

    def add(self, *, cloud: float = 0.0, waiting: float = 0.0, wire: float = 0.0) -> None:
        """Count what a pass waited for."""
        with self._lock:
            before = self._split
            self._split = TimeSplit(before.cloud + cloud, before.waiting + waiting, before.wire + wire)

    def finish(self, *, device: float, cloud: float, waiting: float, wire: float) -> None:
        """Count a pass that has come to its end."""
        self.add(cloud=cloud, waiting=waiting, wire=wire)
        with self._lock:
            before = self._unseen
            self._unseen = (before[0] + device, before[1] + cloud, before[2] + wire)
            ended = self._ended
            self._ended = PassSeconds(
                ended.device + device, ended.cloud + cloud, ended.waiting + waiting, ended.wire + wire
            )

    @property
    def at_once(self) -> int:
        """How many passes at once are worth having, judged by those that ended since this was last asked."""
        with self._lock:
            if any(self._unseen):
                self._at_once = passes_at_once(*self._unseen)
                self._unseen = (0.0, 0.0, 0.0)
            return self._at_once

    def take_ended(self) -> PassSeconds:
        """Return what the passes took that have ended since the last call."""
        with self._lock:
            ended, self._ended = self._ended, PassSeconds()
            return ended

    def take(self) -> TimeSplit:
        """Return what was counted since the last call, as seconds on the clock."""
        with self._lock:
            split, scale = self._split, self._inside / self._alone if self._alone else 0.0
            self._split, self._inside, self._alone = TimeSplit(), 0.0, 0.0
            return TimeSplit(split.cloud * scale, split.waiting * scale, split.wire * scale)
