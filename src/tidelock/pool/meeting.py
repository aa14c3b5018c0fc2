"""How peers find each other and get their numbers: at the beginning, and again whenever the pool changes.

Peer 0 holds the meeting place. Whoever comes there leaves an arrival, and gets a seat: the number of the round and, in
it, its own and how many there are. A round ends when a peer is lost or another one has come; then all that are left
come again. So peer 0 need not know who was lost, only who is there.

May import `pool`, errors and libraries.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast, final

from torch import distributed

from tidelock.errors import ConfigError, ListenRefused, PeerError
from tidelock.pool.notices import Notices, in_time, lost
from tidelock.pool.peers import Peers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch._C._distributed_c10d import TCPStore

# Its types leave out what is used here.
_distributed: Any = distributed

_ARRIVALS = "arrivals"
_POLL_SECONDS = 0.05
# After a loss, peer 0 waits for this share of the time after which a silent peer counts as lost. Who comes later gets a
# seat in the next round.
_SHARE_OF_TIMEOUT = 0.25


@final
@dataclass(frozen=True, slots=True)
class Seat:
    """A peer's place in one round.

    Attributes:
        round: Its number.
        peer: This peer's number in it.
        count: How many peers it has.
    """

    round: int
    peer: int
    count: int


@final
@dataclass(frozen=True, slots=True)
class _Arrival:
    """Somebody who has come.

    Attributes:
        ticket: Tells arrivals apart.
        wish: The number that it would like to have.
        insists: Whether it wants that one or none.
        was: Its seat in the round before; None of one that comes anew.
    """

    ticket: int
    wish: int | None
    insists: bool
    was: Seat | None


@final
class MeetingPlace:
    """Where peers meet, seen from one of them; see `host` and `find`.

    Args:
        notices: For all who come.
        host: Address at which this peer listens for the others.

    Attributes:
        notices: As given.
    """

    def __init__(self, notices: Notices, host: str) -> None:
        self.notices = notices
        self._host = host
        self._seen = 0

    @classmethod
    def host(cls, host: str, port: int, *, timeout_s: float) -> tuple[MeetingPlace, int]:
        """Return a meeting place that this peer holds, and its port.

        Args:
            host: Address of this device; it listens there and nowhere else.
            port: 0 takes a free one.
            timeout_s: Seconds after which a silent peer counts as lost.

        Raises:
            ListenRefused: This peer cannot listen there.
        """
        try:
            listening = socket.create_server((host, port))  # by itself the store would listen at every address
        except OSError as error:
            msg = (
                f"Pool: expected to listen at {host}:{port}, got {error.strerror}. Choose a free port, and an "
                "address of this device."
            )
            raise ListenRefused(msg) from error
        port = listening.getsockname()[1]
        with lost(f"opening the meeting place at {host}:{port}"):
            store: TCPStore = _distributed.TCPStore(
                host,
                port,
                is_master=True,
                timeout=timedelta(seconds=timeout_s),
                wait_for_workers=False,
                master_listen_fd=listening.detach(),
            )
        return cls(Notices(store, timeout_s), host), port

    @classmethod
    def find(cls, host: str, port: int, *, own_host: str, timeout_s: float) -> MeetingPlace:
        """Return the meeting place that another peer holds.

        Args:
            host: That peer's address.
            port: Likewise.
            own_host: Address at which this peer listens for the others.
            timeout_s: As for `host`.

        Raises:
            PeerError: It is not there in time.
        """
        with lost(f"looking for peer 0 at {host}:{port}"):
            timeout = timedelta(seconds=timeout_s)
            # Has a deadline for who is not there, and none for who is and hangs.
            store = in_time(2 * timeout_s, lambda: _distributed.TCPStore(host, port, timeout=timeout, is_master=False))
        return cls(Notices(store, timeout_s), own_host)

    def open(self, seat: Seat) -> Peers:
        """Return the peers of a round, once all of them are there; errors as `Peers`."""
        return Peers(self.notices.under(f"round {seat.round}"), seat.peer, seat.count, host=self._host)

    def arrive(self, *, wish: int | None = None, insists: bool = False, was: Seat | None = None) -> Seat:
        """Come, as another peer than 0, and return the seat once peer 0 gives one, however long that takes.

        Args:
            wish: The number to have, when the first round begins.
            insists: Whether it is that one or none.
            was: The seat in the round before.

        Raises:
            ConfigError: Nobody can have that number.
            PeerError: Peer 0 is lost.
        """
        ticket = self.notices.count(_ARRIVALS, 1)
        arrival = _Arrival(ticket, wish, insists, was)
        self.notices.tell(f"arrival {ticket}", json.dumps(asdict(arrival)))
        found = json.loads(self.notices.ask(f"seat {ticket}", however_long=True))
        if isinstance(found, str):
            raise ConfigError(found)
        return Seat(**found)

    def seat_first(self, count: int) -> Seat:
        """Wait for all peers, give them their numbers, and return the seat of peer 0.

        Raises:
            PeerError: Fewer came in time.
        """
        numbers: dict[int, _Arrival] = {}
        others: list[_Arrival] = []
        end = time.monotonic() + self.notices.timeout_s
        while len(numbers) + len(others) < count - 1:
            arrival = self._next(end)
            if arrival is None:
                came = 1 + len(numbers) + len(others)
                msg = (
                    f"Pool: expected {count} peers within {self.notices.timeout_s:g} s, got {came}. "
                    "Start the others with `tidelock pool join`, or give --timeout more."
                )
                raise PeerError(msg)
            if not arrival.insists or arrival.wish is None:
                others.append(arrival)
            elif arrival.wish in range(1, count) and arrival.wish not in numbers:
                numbers[arrival.wish] = arrival
            else:
                self._refuse(arrival, [number for number in range(1, count) if number not in numbers])
        for arrival in list(others):
            if arrival.wish in range(1, count) and arrival.wish not in numbers:
                numbers[cast("int", arrival.wish)] = arrival
                others.remove(arrival)
        free = [number for number in range(1, count) if number not in numbers]
        numbers.update(zip(free, others, strict=True))
        return self._give(Seat(0, 0, count), [numbers[number] for number in range(1, count)])

    def seat_again(self, was: Seat) -> Seat:
        """Wait for those that are left and for who has come; give them numbers, and return the seat of peer 0."""
        left: dict[int, _Arrival] = {}
        anew: list[_Arrival] = []
        end = time.monotonic() + self.notices.timeout_s * _SHARE_OF_TIMEOUT
        while (len(left) < was.count - 1 or self.somebody_waits()) and (arrival := self._next(end)):
            if arrival.was is not None and arrival.was.round == was.round:
                left[arrival.was.peer] = arrival
            else:
                anew.append(arrival)
        arrivals = [left[number] for number in sorted(left)] + anew
        return self._give(Seat(was.round + 1, 0, 1 + len(arrivals)), arrivals)

    def somebody_waits(self) -> bool:
        """Return whether somebody has come who has no seat yet; for peer 0."""
        return self.notices.count(_ARRIVALS) > self._seen

    def _next(self, end: float) -> _Arrival | None:
        """Return who came next; None when nobody does until then."""
        while time.monotonic() < end:
            if not self.somebody_waits():
                time.sleep(_POLL_SECONDS)
                continue
            self._seen += 1
            with contextlib.suppress(PeerError):  # lost between the two steps of coming
                values = json.loads(self.notices.ask(f"arrival {self._seen}"))
                was = None if values["was"] is None else Seat(**values["was"])
                return _Arrival(**{**values, "was": was})
        return None

    def _refuse(self, arrival: _Arrival, free: Sequence[int]) -> None:
        expected = f"one of {', '.join(map(str, free))}" if free else "no peer besides peer 0"
        msg = f"Joining a pool: expected {expected}, got {arrival.wish}. Choose another --peer, or leave it out."
        self.notices.tell(f"seat {arrival.ticket}", json.dumps(msg))

    def _give(self, own: Seat, arrivals: Sequence[_Arrival]) -> Seat:
        for number, arrival in enumerate(arrivals, 1):
            self.notices.tell(f"seat {arrival.ticket}", json.dumps(asdict(replace(own, peer=number))))
        return own
