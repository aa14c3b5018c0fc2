"""A peer of a pool that dies or hangs is noticed by all others within the deadline, and nobody waits for ever."""

from __future__ import annotations

import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.faults.world import World
from tests.support.tidelock_process import TidelockProcess
from tidelock.errors import PeerError

PEERS = 3
TIMEOUT = 5
# Each of them hands something to each other one.
STAGES = ("--stage", "0-1@0,1", "--stage", "2-2@2")


def start(world: World, name: str, stack: ExitStack) -> list[TidelockProcess]:
    """Return the peers of a run that would take for ever."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    shared = ("--model", world.model, "--cache-key", world.folder / "pool.key", "--threads", 1, "--json")
    lead = ("pool", "train", world.folder / "facts.jsonl", "--listen", where, "--peers", PEERS, *STAGES)
    size = ("--batch-size", 4, "--epochs", 100000, "--reduction", 2, "--timeout", TIMEOUT)
    commands: list[tuple[object, ...]] = [(*lead, *size)]
    commands += [("pool", "join", where, "--peer", number, "--timeout", TIMEOUT) for number in range(1, PEERS)]
    return [
        stack.enter_context(
            world.start(f"{name}-{number}", *command, *shared, "--out", world.folder / f"{name}-{number}")
        )
        for number, command in enumerate(commands)
    ]


@pytest.mark.parametrize("victim", range(PEERS))
@pytest.mark.parametrize("steps", [1, 8], ids=["in the first epoch", "in a cached epoch"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_a_lost_peer_is_noticed(world: World, victim: int, steps: int, number: signal.Signals) -> None:
    with ExitStack() as stack:
        peers = start(world, f"pool-{victim}-{steps}-{number.name}", stack)
        peers[victim].wait_until(lambda: [e for e in peers[victim].events() if e.get("step", 0) >= steps])
        peers[victim].send(number)
        began = time.monotonic()
        others = [peer for place, peer in enumerate(peers) if place != victim]
        codes = [peer.wait() for peer in others]
        # A deadline, not a speed: each wait ends by itself, and not only when the test's patience does.
        assert time.monotonic() - began < 6 * TIMEOUT
        assert codes == [PeerError.exit_code] * len(others), "\n".join(peer.stderr for peer in others)
        for peer in others:
            assert "error: Pool: expected an answer while " in peer.stderr


def test_local_peers_end_with_peer_0(world: World, tmp_path: Path) -> None:
    command = ("pool", "train", world.folder / "facts.jsonl", "--model", world.model, "--local", 2, "--batch-size", 4)
    more = ("--epochs", 100000, "--reduction", 2, "--cache-key", world.folder / "pool.key", "--json")
    with world.start("pool-local", *command, *more, "--out", tmp_path / "run") as lead:
        lead.wait_until(lambda: [event for event in lead.events() if event.get("step", 0) >= 4])
        (other,) = psutil.Process(lead.pid).children()
        lead.send(signal.SIGINT)
        assert lead.wait() == 130
        assert not other.is_running()
