"""Which rows of a micro-batch each device of a group computes.

PAC (arXiv 2408.10746, section 4.2) shares them evenly, which is right for equal devices. Here each device gets what it
can do in the same time, in whole rows, within its memory.

May import nothing of tidelock.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from heapq import heapify, heapreplace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence


class Share(NamedTuple):
    """Rows of a micro-batch for each device of a group, and what the slowest one takes, in seconds."""

    rows: tuple[int, ...]
    forward: float
    backward: float


def share_rows(
    forward: Sequence[Sequence[float]], backward: Sequence[Sequence[float]], room: Sequence[int], rows: int
) -> list[Share]:
    """Return ways to share rows: for any way there is one among them that is as quick both forward and backward.

    A group is as slow as its slowest device, in the forward and in the backward. So devices of unlike ratio between the
    two leave a choice.

    Args:
        forward: For each device, its seconds by rows; `forward[d][r]`, from 0 rows on, never falling.
        backward: Likewise.
        room: Most rows for each device.
        rows: To be shared; each device gets at least one.

    Returns:
        From the quickest forward to the quickest backward; empty when there is no way.
    """
    found: list[Share] = []
    shares = _least_time(forward, room, rows)
    while shares is not None:
        limit = max(times[share] for times, share in zip(forward, shares, strict=True))
        within = [_most(times, limit, most) for times, most in zip(forward, room, strict=True)]
        best = _least_time(backward, within, rows) or shares
        slow = max(times[share] for times, share in zip(backward, best, strict=True))
        found.append(Share(tuple(best), limit, slow))
        # Next: quicker backward, and slower forward as far as it must be.
        room = [min(most, bisect_left(times, slow) - 1) for times, most in zip(backward, room, strict=True)]
        shares = _least_time(forward, room, rows)
    return found


def _most(times: Sequence[float], limit: float, most: int) -> int:
    """Return how many rows a device can do within a time and its room."""
    return min(most, bisect_right(times, limit) - 1)


def _least_time(times: Sequence[Sequence[float]], room: Sequence[int], rows: int) -> list[int] | None:
    """Return the shares whose slowest device is quickest: row by row to who is then done first."""
    if sum(room) < rows or min(room) < 1 or len(room) > rows:
        return None
    shares = [1] * len(room)
    infinite = float("inf")
    heap = [(times[device][2] if room[device] > 1 else infinite, device) for device in range(len(room))]
    heapify(heap)
    for _ in range(rows - len(room)):
        device = heap[0][1]
        shares[device] += 1
        more = shares[device] + 1
        heapreplace(heap, (times[device][more] if more <= room[device] else infinite, device))
    return shares
