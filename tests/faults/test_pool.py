"""A peer of a pool that dies or hangs is noticed by all others within the deadline, and nobody waits for ever."""

from __future__ import annotations

import json
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.faults.world import World
from tests.support.tidelock_process import TidelockProcess
from tidelock.errors import PeerError

PEERS = 3
TIMEOUT = 5
# Each of them hands something to each other one.
STAGES = ("--stage", "0-1@0,1", "--stage", "2-2@2")


def start(
    world: World, name: str, stack: ExitStack, *, epochs: int = 100000, resumes: bool = False
) -> list[TidelockProcess]:
    """Return the peers of a run, which by default would take for ever."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    out = [world.folder / f"{name}-{number}" for number in range(PEERS)]
    place = ("--listen", where, "--peers", PEERS, "--timeout", TIMEOUT, "--json")
    model = ("--model", world.model, "--cache-key", world.folder / "pool.key", "--threads", 1)
    size = ("--batch-size", 4, "--epochs", epochs, "--reduction", 2, "--save-every", 2, "--keep", 1, "--out", out[0])
    lead: tuple[object, ...] = ("pool", "train", world.folder / "facts.jsonl", *model, *STAGES, *size, *place)
    if resumes:
        lead = ("pool", "resume", out[0], *place)
    commands = [lead]
    for number in range(1, PEERS):
        # A peer that comes back knows its number from its folder.
        which = () if resumes else ("--peer", number)
        commands.append(("pool", "join", where, *which, *model, "--timeout", TIMEOUT, "--json", "--out", out[number]))
    again = "again-" if resumes else ""
    return [stack.enter_context(world.start(f"{again}{out[n].name}", *command)) for n, command in enumerate(commands)]


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


@pytest.fixture(scope="module")
def undisturbed_pool(world: World) -> Path:
    """Return the folder of a run that nothing happens to."""
    with ExitStack() as stack:
        peers = start(world, "pool", stack, epochs=4)
        assert [peer.wait() for peer in peers] == [0] * PEERS, peers[0].stderr
    return world.folder / "pool-0"


@pytest.mark.parametrize("victim", [0, 2], ids=["peer 0", "another peer"])
@pytest.mark.parametrize(("steps", "saved"), [(1, 0), (2, 0), (3, 2), (7, 6)])
def test_it_goes_on_as_if_nothing_had_happened(
    world: World, undisturbed_pool: Path, victim: int, steps: int, saved: int
) -> None:
    name = f"pool-broken-{victim}-{steps}"
    with ExitStack() as stack:
        peers = start(world, name, stack, epochs=4)
        peers[victim].wait_until(lambda: [e for e in peers[victim].events() if e.get("step", 0) >= steps])
        peers[victim].kill()
        for peer in peers:
            peer.wait()
    out = world.folder / f"{name}-0"
    checkpoints = sorted(int(path.name.rpartition("-")[2]) for path in (out / "checkpoints").glob("checkpoint-*"))
    if (out / "adapter").exists():  # it was quicker than the signal
        pytest.fail("The run had ended before it was broken off: make it longer.")
    assert max(checkpoints, default=0) >= saved
    with ExitStack() as stack:
        resumed = start(world, name, stack, resumes=True)
        assert [peer.wait() for peer in resumed] == [0] * PEERS, resumed[0].stderr + resumed[1].stderr
    found, expected = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (out, undisturbed_pool)
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    rows = [
        [(row["step"], row["loss"]) for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]
        for folder in (out, undisturbed_pool)
    ]
    assert rows[0] == rows[1]
    assert [step for step, _ in rows[0]] == list(range(1, 13))


def test_local_peers_end_with_peer_0(world: World, tmp_path: Path) -> None:
    command = ("pool", "train", world.folder / "facts.jsonl", "--model", world.model, "--local", 2, "--batch-size", 4)
    more = ("--epochs", 100000, "--reduction", 2, "--cache-key", world.folder / "pool.key", "--json")
    with world.start("pool-local", *command, *more, "--out", tmp_path / "run") as lead:
        lead.wait_until(lambda: [event for event in lead.events() if event.get("step", 0) >= 4])
        (other,) = psutil.Process(lead.pid).children()
        lead.send(signal.SIGINT)
        assert lead.wait() == 130
        assert not other.is_running()
