"""What a link does to the bytes on it, as arithmetic: no socket, and no clock of its own."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import final

_SMALLEST_PIECE = 2048
_LARGEST_PIECE = 1 << 16
_PIECE_SECONDS = 1e-3


@final
@dataclass(frozen=True)
class Link:
    """Both directions of a link are alike.

    Attributes:
        delay_seconds: From one end to the other; half of a round trip.
        jitter_seconds: The most that a piece takes longer, drawn evenly. Pieces keep their order, as in TCP.
        mbit_per_second: Bandwidth of each direction; None has no limit.
    """

    delay_seconds: float = 0.0
    jitter_seconds: float = 0.0
    mbit_per_second: float | None = None

    @property
    def piece_bytes(self) -> int:
        """Return how many bytes go as one piece: a millisecond's, so that a small message waits for no large one."""
        if self.mbit_per_second is None:
            return _LARGEST_PIECE
        return min(_LARGEST_PIECE, max(_SMALLEST_PIECE, int(self.mbit_per_second * 1e6 / 8 * _PIECE_SECONDS)))


@final
class Lane:
    """One direction of a link, which says when each piece has left and when it arrives.

    The sender's end is busy with one piece at a time, for as long as its bits take. The delay comes on top and keeps
    nobody busy: any number of pieces are on their way at once, and it does not limit how many bytes go in a second.

    Args:
        link: What it is a direction of.
        seed: Of the jitter.
    """

    def __init__(self, link: Link, seed: int = 0) -> None:
        self._link = link
        self._draw = random.Random(seed)
        self._free = 0.0
        self._last = 0.0

    def send(self, now: float, size: int) -> tuple[float, float]:
        """Return when a piece of so many bytes has left the sender's end, and when it arrives."""
        rate = self._link.mbit_per_second
        self._free = max(now, self._free) + (size * 8 / (rate * 1e6) if rate else 0.0)
        late = self._draw.uniform(0.0, self._link.jitter_seconds)
        self._last = max(self._last, self._free + self._link.delay_seconds + late)
        return self._free, self._last

    def stall(self, until: float) -> None:
        """Let nothing leave before a time; what is on its way arrives."""
        self._free = max(self._free, until)
