"""A run with a side network that is killed or interrupted, and resumed, ends as one that was not, bit for bit."""

from __future__ import annotations

import signal

import pytest

from tests.faults.inject import Place, strike
from tests.faults.world import STEPS, STEPS_PER_EPOCH, Run, World, check_equal

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
