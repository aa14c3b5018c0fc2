"""How long a device waits for a cloud that went away, and how often it tries again.

May import errors.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, final

from tidelock.errors import CloudUnreachable

if TYPE_CHECKING:
    from tidelock.errors import TidelockError

logger = logging.getLogger(__name__)

_FIRST_RETRY_SECONDS = 0.2
_SLOWEST_RETRY_SECONDS = 5.0


@final
class Patience:
    """Waits between the attempts at one thing, longer each time.

    Args:
        seconds: How long in all. They run from the first loss: an attempt that computed for long before it was lost has
            not used them up.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._delay = _FIRST_RETRY_SECONDS
        self._give_up: float | None = None

    def wait(self, error: TidelockError, cause: Exception) -> None:
        """Wait until the next attempt.

        Args:
            error: Why the last one failed, in our words.
            cause: What it failed with.

        Raises:
            TidelockError: That error, when another attempt would not help or patience is over.
        """
        self._give_up = self._give_up or time.monotonic() + self._seconds
        if not isinstance(error, CloudUnreachable) or time.monotonic() + self._delay > self._give_up:
            raise error from cause
        logger.warning("%s Trying again.", error)
        time.sleep(self._delay)
        self._delay = min(2 * self._delay, _SLOWEST_RETRY_SECONDS)
