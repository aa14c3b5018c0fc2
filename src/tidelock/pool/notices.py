"""Texts that peers leave for each other at peer 0, each question with a deadline; and what a lost peer is said as.

May import errors and libraries.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar, final

from torch import distributed

from tidelock.errors import PeerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch._C._distributed_c10d import Store

T = TypeVar("T")

# Its types leave out what is used here.
_distributed: Any = distributed

_POLL_SECONDS = 0.02


@final
class Notices:
    """What all peers can read and write.

    Args:
        store: Where it is.
        timeout_s: Seconds after which a peer that does not answer counts as lost.

    Attributes:
        store: As given, for Gloo.
        timeout_s: As given.
    """

    def __init__(self, store: Store, timeout_s: float) -> None:
        self.store = store
        self.timeout_s = timeout_s

    def under(self, prefix: str) -> Notices:
        """Return those with names of their own."""
        return Notices(_distributed.PrefixStore(prefix, self.store), self.timeout_s)

    def tell(self, name: str, text: str) -> None:
        """Leave a text for everybody.

        Raises:
            PeerError: Peer 0 is lost.
        """
        with lost("leaving a notice"):
            in_time(self.timeout_s, lambda: self.store.set(name, text))

    def ask(self, name: str, *, however_long: bool = False) -> str:
        """Return the text that somebody leaves, once it is there.

        Args:
            name: Its name.
            however_long: Wait as long as peer 0 answers: its own thread does so as long as its process runs.

        Raises:
            PeerError: Peer 0 is lost, or the text was not there in time.
        """
        end = time.monotonic() + self.timeout_s
        with lost(f"waiting for the {name}"):
            while not in_time(self.timeout_s, lambda: self.store.check([name])):
                if not however_long and time.monotonic() > end:
                    msg = f"nothing within {self.timeout_s:g} s."
                    raise TimeoutError(msg)
                time.sleep(_POLL_SECONDS)
            return in_time(self.timeout_s, lambda: self.store.get(name)).decode()

    def count(self, name: str, more: int = 0) -> int:
        """Return how many have been counted under a name, after so many more.

        Raises:
            PeerError: Peer 0 is lost.
        """
        with lost("coming to the meeting place"):
            return in_time(self.timeout_s, lambda: self.store.add(name, more))


def in_time(seconds: float, work: Callable[[], T]) -> T:
    """Return what some work gives, done in a thread that is left alone when it takes too long.

    A `TCPStore` asks a host that hangs, without any deadline.

    Raises:
        TimeoutError: It takes longer.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except Exception as error:  # noqa: BLE001  (raised where it is waited for)
            done.set_exception(error)

    Thread(target=run, daemon=True).start()
    try:
        return done.result(seconds)
    except FutureTimeoutError as error:
        msg = f"no answer within {seconds:g} s."
        raise TimeoutError(msg) from error


@contextmanager
def lost(what: str) -> Iterator[None]:
    """Raise as `PeerError` what `torch.distributed` raises when a peer is lost.

    Args:
        what: What this peer was doing, for the message.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        # Gloo begins with its own file and line, and ends with advice of its own.
        reason = (str(error).partition("]")[2].strip() or str(error)).splitlines()[0].partition(". This is ")[0]
        msg = (
            f"Pool: expected an answer while {what}, got: {reason.rstrip('.')}. Look whether that peer runs and is "
            "reached. What is cached and saved stays."
        )
        raise PeerError(msg) from error
