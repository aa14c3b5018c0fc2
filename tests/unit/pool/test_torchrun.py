"""What `torchrun` says to its processes, and how they find peer 0 by it."""

from __future__ import annotations

from typing import Any, cast

import pytest
from torch import distributed

from tidelock.errors import ConfigError, PeerError
from tidelock.pool.torchrun import Launch

ENVIRONMENT = {
    "RANK": "1",
    "WORLD_SIZE": "3",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


def test_a_process_knows_which_it_is() -> None:
    assert Launch.of(ENVIRONMENT) == Launch(1, 3, "127.0.0.1", 29500, "tidelock none 0")


def test_without_torchrun_there_is_nothing() -> None:
    assert Launch.of({"RANK": "0", "WORLD_SIZE": "2"}) is None


def test_a_rendezvous_without_a_store_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected torchrun to share its store"):
        Launch.of({**ENVIRONMENT, "TORCHELASTIC_USE_AGENT_STORE": "False"})


def test_peer_0_is_found_by_what_it_leaves_in_the_agents_store() -> None:
    agent = cast("Any", distributed).TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    places = {**ENVIRONMENT, "MASTER_PORT": str(agent.port)}
    launches = [Launch.of({**places, "TORCHELASTIC_RESTART_COUNT": attempt}) for attempt in ("0", "0", "1")]
    first, second, later = (launch for launch in launches if launch is not None)
    first.tell_port(4711, 5)
    assert second.ask_port(5) == 4711
    with pytest.raises(PeerError, match="waiting for the port of peer 0"):  # of a start before this one
        later.ask_port(0.1)
