"""Holds this process to the memory that its device gives. May import errors, `model`, `units` and libraries."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import psutil

from tidelock.errors import MemoryExceeded
from tidelock.model.memory import give_back_memory
from tidelock.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable


def own_bytes() -> int:
    """Return what this process has in memory for itself: no files, which the system can drop and read again."""
    info = psutil.Process().memory_info()
    return int(info.rss - getattr(info, "shared", 0))


@final
class MemoryLimit:
    """What this process may take on top of what it has when this is made: Python, its libraries and the examples.

    The system's own limits (`setrlimit`) would end a process wherever it asks for memory next, in Gloo's threads too,
    and with it the step. Here it is looked at while a step is computed, and answered for when the step is done.

    Args:
        most_bytes: How much; None holds it to nothing.
        taken: Says how much the process has.
    """

    def __init__(self, most_bytes: int | None, taken: Callable[[], int] = own_bytes) -> None:
        self._most = most_bytes
        self._taken = taken
        if most_bytes is not None:
            give_back_memory()  # else what is given back later would hide what is taken
        self._before = taken()
        self._found = 0

    @property
    def is_exceeded(self) -> bool:
        """Whether it was exceeded when it was looked at."""
        return self._most is not None and self._found > self._most

    def look(self) -> None:
        """Look at what the process takes."""
        if self._most is None or self.is_exceeded:
            return
        self._found = self._taken() - self._before
        if self.is_exceeded:
            give_back_memory()  # what is only kept for later does not count
            self._found = self._taken() - self._before

    def hold(self) -> None:
        """Refuse to go on when it was exceeded.

        Raises:
            MemoryExceeded: It was.
        """
        if self._most is not None and self.is_exceeded:
            msg = (
                f"Memory of this peer: expected at most {format_bytes(self._most)} beside Python and its libraries, "
                f"got {format_bytes(self._found)}. All steps that were done are kept. Let it join again, or "
                "`tidelock pool resume`, with a larger --memory-limit; or begin a run with smaller batches or more "
                "peers."
            )
            raise MemoryExceeded(msg)
