"""A run with a side network that is killed or interrupted, and resumed, ends as one that was not, bit for bit."""

from __future__ import annotations

import json
import signal

import pytest

from tests.faults.inject import Place, strike
from tests.faults.world import STEPS, STEPS_PER_EPOCH, Cloud, Run, World, check_equal

KILL, CTRL_C = signal.SIGKILL, signal.SIGINT
# Nine examples to learn from; of the three to measure on, all are alike.
EXAMPLES = 10


@pytest.fixture(scope="module")
def undisturbed_side(world: World) -> Run:
    """Return the run that nothing happens to."""
    run = world.train_side("side", "--cache-key", world.folder / "cache.key")
    assert run.process.wait() == 0, run.process.stderr
    assert [row["step"] for row in run.metrics if "loss" in row] == list(range(1, STEPS + 1))
    return run


def test_without_a_cache_it_ends_alike(world: World, undisturbed_side: Run) -> None:
    run = world.train_side("side-uncached", "--no-cache")
    check_equal(run, undisturbed_side)


@pytest.mark.parametrize(
    ("place", "count", "resumes_after", "cached"),
    [
        pytest.param(Place.EXAMPLE_CACHED, 4, None, 3, id="as the first examples are cached"),
        pytest.param(Place.TAPS_READ, 5, 2, 8, id="in the first epoch, after a checkpoint"),
        pytest.param(Place.HALF_SAVED, 1, None, 8, id="in a half-written checkpoint of the first epoch"),
        pytest.param(Place.LET_GO, 1, 2, EXAMPLES, id="as the blocks are let go"),
        pytest.param(Place.BATCH_ANNOUNCED, 17, 6, EXAMPLES, id="while it reads ahead"),
        pytest.param(Place.OPTIMIZER_MOVED, 8 + 1, 6, EXAMPLES, id="after the optimizer has moved"),
    ],
)
def test_killed_and_resumed(
    world: World, undisturbed_side: Run, place: Place, count: int, resumes_after: int | None, cached: int
) -> None:
    key = ("--cache-key", world.folder / "cache.key")
    killed = world.train_side(f"side-{place.name.lower()}", *key, hook=strike(place, count, KILL))
    assert killed.process.wait() == -KILL
    assert killed.checkpoints == ([] if resumes_after is None else [resumes_after])
    assert not (killed.out / "adapter").exists()
    resumed = world.resume(killed)
    check_equal(resumed, undisturbed_side)
    assert f"Activation cache: {cached} of {EXAMPLES} examples are in it; " in resumed.process.stderr


def test_interrupted_and_resumed(world: World, undisturbed_side: Run) -> None:
    key = ("--cache-key", world.folder / "cache.key")
    run = world.train_side("side-interrupted", *key, hook=strike(Place.TAPS_READ, 3, CTRL_C))
    assert run.process.wait() == 130
    assert run.process.stdout.startswith("Stopped after step 2; all up to it is saved. ")
    check_equal(world.resume(run), undisturbed_side)


def test_a_cache_may_be_elsewhere_or_none_when_a_run_is_resumed(world: World, undisturbed_side: Run) -> None:
    """What a cache holds changes nothing, so that it may be lost."""
    key = ("--cache-key", world.folder / "cache.key")
    killed = world.train_side("side-moved", *key, hook=strike(Place.SAVED, STEPS_PER_EPOCH, KILL))
    assert killed.process.wait() == -KILL
    elsewhere = ("--cache", undisturbed_side.out / "cache")
    moved = Run(killed.out, world.start("side-moved-resumed", "train", "--resume", "--out", killed.out, *elsewhere))
    check_equal(moved, undisturbed_side)
    assert f"Activation cache: {EXAMPLES} of {EXAMPLES} examples are in it; " in moved.process.stderr


@pytest.fixture(scope="module")
def undisturbed_random(world: World) -> Run:
    """Return the run that nothing happens to, from the start that a device without the whole model has."""
    run = world.train_side("side-random", "--side-init", "random", "--cache-key", world.folder / "cache.key")
    assert run.process.wait() == 0, run.process.stderr
    return run


def test_a_cloud_may_die_after_the_first_epoch(world: World, undisturbed_random: Run) -> None:
    with world.cloud("side-cloud") as cloud:
        options = (*world.at(cloud.address), "--cache-key", world.folder / "cache.key")
        kills = strike(Place.LET_GO, 1, KILL, pid=cloud.process.pid)
        run = world.train_side("side-in-a-cloud", *options, hook=kills)
        check_equal(run, undisturbed_random)
        assert cloud.process.wait() == -KILL
    assert "the cloud is not needed any more, and its connection is closed." in run.process.stderr
    assert "On the wire, once for each example: its embeddings and its taps in fp32, exact; " in run.process.stderr
    crossed = json.loads((run.out / "ledger.json").read_text())
    assert crossed["sent"].keys() == {"embedding", "control"}
    # All of it in the first epoch.
    assert [row["epoch"] for row in crossed["epochs"]] == [0, 1]


@pytest.mark.parametrize(
    ("place", "count", "cached"),
    [
        pytest.param(Place.EXAMPLE_CACHED, 4, 3, id="as the first examples come"),
        pytest.param(Place.TAPS_READ, 5, 8, id="after a checkpoint"),
        pytest.param(Place.BATCH_ANNOUNCED, 17, EXAMPLES, id="when the cloud is not needed any more"),
    ],
)
def test_an_upload_that_is_killed_goes_on_where_it_was(
    world: World, cloud: Cloud, undisturbed_random: Run, place: Place, count: int, cached: int
) -> None:
    options = (*world.at(cloud.address), "--in-flight", 1, "--cache-key", world.folder / "cache.key")
    killed = world.train_side(f"side-cloud-{place.name.lower()}", *options, hook=strike(place, count, KILL))
    assert killed.process.wait() == -KILL
    resumed = world.resume(killed)
    check_equal(resumed, undisturbed_random)
    assert f"Activation cache: {cached} of {EXAMPLES} examples are in it; " in resumed.process.stderr


def test_a_cloud_killed_and_restarted_in_the_first_epoch_changes_nothing(world: World, undisturbed_random: Run) -> None:
    with world.cloud("side-restarted") as cloud:
        options = (*world.at(cloud.address), "--cache-key", world.folder / "cache.key")
        kills = strike(Place.TAPS_READ, 3, KILL, pid=cloud.process.pid)
        run = world.train_side("side-restarted-run", *options, hook=kills)
        assert cloud.process.wait() == -KILL
    with world.cloud("side-again", port=cloud.port):
        check_equal(run, undisturbed_random)
