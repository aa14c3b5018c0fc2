"""A peer of a pool that dies or hangs is noticed within the deadline; the others go on, and nobody waits for ever."""

from __future__ import annotations

import re
import signal
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.faults.world import World
from tests.support.tidelock_process import TidelockProcess
from tidelock.errors import PeerError
from tidelock.run.folder import read_rows

PEERS = 3
TIMEOUT = 5
# Each of them hands something to each other one.
STAGES = ("--stage", "0-1@0,1", "--stage", "2-2@2")
SIDE = ("--reduction", 2)


@dataclass
class Pool:
    """A run of three peers.

    Attributes:
        peers: Their processes.
        out: Their folders.
        where: Where peer 0 is met.
        model: What each of them is told.
    """

    peers: list[TidelockProcess]
    out: list[Path]
    where: str
    model: tuple[object, ...]

    @property
    def lead(self) -> TidelockProcess:
        return self.peers[0]

    def join(self, world: World, stack: ExitStack, number: int) -> TidelockProcess:
        """Have a peer come again."""
        command = ("pool", "join", self.where, *self.model, "--out", self.out[number])
        process = stack.enter_context(world.start(f"back-{self.out[number].name}", *command))
        self.peers[number] = process
        return process

    def wait_for(self, number: int, steps: int) -> None:
        """Wait until a peer has done so many steps."""
        peer = self.peers[number]
        peer.wait_until(lambda: [event for event in peer.events() if event.get("step", 0) >= steps])

    def wait_for_lead(self, steps: int) -> None:
        """Likewise of peer 0, which prints for people."""
        self.lead.wait_until(lambda: len(metrics(self.out[0])) >= steps)

    def wait_for_change(self, count: int, times: int = 1) -> int:
        """Wait until peer 0 has gone on with so many peers that often, and does steps; return after which step."""
        said = re.compile(rf"The pool has changed: going on after step (\d+), {count} peers?\.")
        self.lead.wait_until(lambda: len(said.findall(self.lead.stderr)) >= times)
        first = int(said.findall(self.lead.stderr)[-1])
        self.wait_for_lead(max(first, len(metrics(self.out[0]))) + 3)
        return first


def start(
    world: World,
    name: str,
    stack: ExitStack,
    *,
    epochs: int = 100000,
    resumes: bool = False,
    count: int = PEERS,
    method: tuple[object, ...] = SIDE,
) -> Pool:
    """Return a run that by default would take for ever, and trains a side network."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    out = [world.folder / f"{name}-{number}" for number in range(count)]
    place = ("--listen", where, "--peers", count, "--timeout", TIMEOUT)
    key = ("--cache-key", world.folder / "pool.key") if method == SIDE else ()
    model = ("--model", world.model, *key, "--threads", 1)
    size = ("--batch-size", 4, "--epochs", epochs, "--save-every", 2, "--keep", 1, "--out", out[0])
    lead: tuple[object, ...] = ("pool", "train", world.folder / "facts.jsonl", *method, *model, *STAGES, *size, *place)
    if resumes:
        lead = ("pool", "resume", out[0], *place)
    commands = [lead]
    own = (*model, "--timeout", TIMEOUT, "--json")
    for number in range(1, count):
        # A peer that comes back knows its number from its folder.
        which = () if resumes else ("--peer", number)
        commands.append(("pool", "join", where, *which, *own, "--out", out[number]))
    again = "again-" if resumes else ""
    peers = [stack.enter_context(world.start(f"{again}{out[n].name}", *command)) for n, command in enumerate(commands)]
    return Pool(peers, out, where, own)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    whole = folder / "model" / "model.safetensors"  # of --method full
    return load_file(whole if whole.exists() else folder / "adapter" / "adapter_model.safetensors")


def metrics(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_rows(folder / "metrics.jsonl") if "loss" in row]


def assert_alike(found: Path, expected: Path) -> None:
    """Compare two runs of which one was done by others, which sum in another order."""
    assert [step for step, _ in metrics(found)] == [step for step, _ in metrics(expected)]
    assert [loss for _, loss in metrics(found)] == pytest.approx([loss for _, loss in metrics(expected)], rel=1e-3)
    for name, tensor in weights(expected).items():
        torch.testing.assert_close(weights(found)[name], tensor, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.parametrize("steps", [0, 1, 8], ids=["before the first step", "in the first epoch", "in a cached epoch"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_without_peer_0_all_end(world: World, steps: int, number: signal.Signals) -> None:
    with ExitStack() as stack:
        pool = start(world, f"pool-headless-{steps}-{number.name}", stack)
        if steps:
            pool.wait_for_lead(steps)
        else:
            pool.lead.wait_until(lambda: "Data: " in pool.lead.stderr)
        pool.lead.send(number)
        began = time.monotonic()
        codes = [peer.wait() for peer in pool.peers[1:]]
        # A deadline, not a speed: each wait ends by itself, and not only when the test's patience does.
        assert time.monotonic() - began < 6 * TIMEOUT
        assert codes == [PeerError.exit_code] * 2, "\n".join(peer.stderr for peer in pool.peers)
        for peer in pool.peers[1:]:
            assert "error: Pool: expected an answer while " in peer.stderr


@pytest.mark.parametrize("victim", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("steps", [1, 8], ids=["in the first epoch", "in a cached epoch"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_the_others_go_on_without_a_lost_peer_until_it_is_back(
    world: World, victim: int, steps: int, number: signal.Signals
) -> None:
    with ExitStack() as stack:
        pool = start(world, f"pool-{victim}-{steps}-{number.name}", stack)
        pool.wait_for(victim, steps)
        pool.peers[victim].send(number)
        began = time.monotonic()
        first = pool.wait_for_change(2)
        assert time.monotonic() - began < 6 * TIMEOUT
        assert first >= (steps if steps > 3 else 0)
        if number == signal.SIGSTOP:
            pool.peers[victim].send(signal.SIGCONT)
        else:
            pool.join(world, stack, victim)
        assert pool.wait_for_change(3) >= first
        pool.wait_for(victim, first + 1)
        steps_done = [step for step, _ in metrics(pool.out[0])]
        assert steps_done == list(range(1, len(steps_done) + 1))


@pytest.fixture(scope="module")
def undisturbed_pool(world: World) -> Path:
    """Return the folder of a run that nothing happens to."""
    with ExitStack() as stack:
        pool = start(world, "pool", stack, epochs=4)
        assert [peer.wait() for peer in pool.peers] == [0] * PEERS, pool.lead.stderr
    return world.folder / "pool-0"


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_a_run_that_loses_a_peer_ends_as_any_other(world: World, undisturbed_pool: Path, steps: int) -> None:
    name = f"pool-fewer-{steps}"
    with ExitStack() as stack:
        pool = start(world, name, stack, epochs=4)
        pool.wait_for_lead(steps)
        pool.peers[2].kill()
        assert [peer.wait() for peer in pool.peers[:2]] == [0, 0], pool.lead.stderr
        assert "The pool has changed" in pool.lead.stderr, "The run had ended before: make it longer."
    assert_alike(world.folder / f"{name}-0", undisturbed_pool)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
@pytest.mark.parametrize("method", ["lora", "adapter", "full"])
def test_so_does_one_that_trains_in_the_blocks(world: World, method: str, number: signal.Signals) -> None:
    chosen = ("--method", method)
    name = f"pool-{method}-{number.name}"
    with ExitStack() as stack:
        pool = start(world, f"{name}-undisturbed", stack, epochs=6, method=chosen)
        assert [peer.wait() for peer in pool.peers] == [0] * PEERS, pool.lead.stderr
    with ExitStack() as stack:
        pool = start(world, name, stack, epochs=6, method=chosen)
        pool.wait_for_lead(7)
        pool.peers[2].send(number)
        assert [peer.wait() for peer in pool.peers[:2]] == [0, 0], pool.lead.stderr
        assert "The pool has changed" in pool.lead.stderr, "The run had ended before: make it longer."
        pool.peers[2].kill()
    assert_alike(world.folder / f"{name}-0", world.folder / f"{name}-undisturbed-0")


def break_off(world: World, name: str, steps: int) -> Path:
    """Return the folder of a run whose peer 0 was killed after so many steps or a few more."""
    with ExitStack() as stack:
        pool = start(world, name, stack, epochs=4)
        pool.wait_for_lead(steps)
        pool.lead.kill()
        for peer in pool.peers:
            peer.wait()
    if (pool.out[0] / "adapter").exists():  # it was quicker than the signal
        pytest.fail("The run had ended before it was broken off: make it longer.")
    return pool.out[0]


@pytest.mark.parametrize(("steps", "saved"), [(1, 0), (2, 0), (3, 2), (7, 6)])
def test_it_goes_on_as_if_nothing_had_happened(world: World, undisturbed_pool: Path, steps: int, saved: int) -> None:
    name = f"pool-broken-{steps}"
    out = break_off(world, name, steps)
    checkpoints = sorted(int(path.name.rpartition("-")[2]) for path in (out / "checkpoints").glob("checkpoint-*"))
    assert max(checkpoints, default=0) >= saved
    with ExitStack() as stack:
        pool = start(world, name, stack, resumes=True)
        assert [peer.wait() for peer in pool.peers] == [0] * PEERS, pool.lead.stderr
    found, expected = weights(out), weights(undisturbed_pool)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert metrics(out) == metrics(undisturbed_pool)
    assert [step for step, _ in metrics(out)] == list(range(1, 13))


@pytest.mark.parametrize("count", [1, 2])
def test_it_goes_on_with_fewer_peers(world: World, undisturbed_pool: Path, count: int) -> None:
    name = f"pool-smaller-{count}"
    out = break_off(world, name, 7)
    with ExitStack() as stack:
        pool = start(world, name, stack, resumes=True, count=count)
        assert [peer.wait() for peer in pool.peers] == [0] * count, pool.lead.stderr
        assert "the blocks are run for them." in pool.lead.stderr
    assert_alike(out, undisturbed_pool)


def test_local_peers_end_with_peer_0(world: World, tmp_path: Path) -> None:
    command = ("pool", "train", world.folder / "facts.jsonl", "--model", world.model, "--local", 2, "--batch-size", 4)
    more = ("--epochs", 100000, "--reduction", 2, "--cache-key", world.folder / "pool.key", "--json")
    with world.start("pool-local", *command, *more, "--out", tmp_path / "run") as lead:
        lead.wait_until(lambda: [event for event in lead.events() if event.get("step", 0) >= 4])
        (other,) = psutil.Process(lead.pid).children()
        lead.send(signal.SIGINT)
        assert lead.wait() == 130
        assert not other.is_running()
