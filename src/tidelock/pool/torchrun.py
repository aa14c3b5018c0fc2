"""Peers that `torchrun` has started: which of them this process is, and where peer 0 is met.

`torchrun` gives all processes the same command, and a store in which they find each other. There peer 0 only leaves the
port of its meeting place: the store is that of `torchrun`'s agent, and goes on where peer 0 has died or hangs.

May import `pool`, errors and libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, final

from torch import distributed

from tidelock.errors import ConfigError
from tidelock.pool.notices import Notices, in_time, lost

if TYPE_CHECKING:
    from collections.abc import Mapping

# Its types leave out what is used here.
_distributed: Any = distributed

_PORT = "port of peer 0"


@final
@dataclass(frozen=True, slots=True)
class Launch:
    """What `torchrun` says to one of its processes.

    Attributes:
        peer: This process's number.
        count: How many there are.
        host: Address of peer 0.
        store_port: There, that of the agent's store.
        names: Begin the names that belong to this start.
    """

    peer: int
    count: int
    host: str
    store_port: int
    names: str

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Launch | None:
        """Return how this process was started; None when `torchrun` did not do it.

        Raises:
            ConfigError: It did, and shares no store.
        """
        if "TORCHELASTIC_RUN_ID" not in environment:
            return None
        if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            msg = (
                "Pool: expected torchrun to share its store, got a rendezvous that does not. Start it with "
                "--standalone, or with --rdzv-backend c10d."
            )
            raise ConfigError(msg)
        run, attempt = environment["TORCHELASTIC_RUN_ID"], environment["TORCHELASTIC_RESTART_COUNT"]
        return cls(
            int(environment["RANK"]),
            int(environment["WORLD_SIZE"]),
            environment["MASTER_ADDR"],
            int(environment["MASTER_PORT"]),
            f"tidelock {run} {attempt}",
        )

    def tell_port(self, port: int, timeout_s: float) -> None:
        """Say, as peer 0, where its meeting place is; errors as `Notices.tell`."""
        self._notices(timeout_s).tell(_PORT, str(port))

    def ask_port(self, timeout_s: float) -> int:
        """Return the port of peer 0's meeting place, once it says it; errors as `Notices.ask`."""
        return int(self._notices(timeout_s).ask(_PORT))

    def _notices(self, timeout_s: float) -> Notices:
        with lost(f"looking for torchrun's store at {self.host}:{self.store_port}"):
            timeout = timedelta(seconds=timeout_s)
            store = in_time(
                2 * timeout_s,
                lambda: _distributed.TCPStore(self.host, self.store_port, timeout=timeout, is_master=False),
            )
        return Notices(store, timeout_s).under(self.names)
