"""A device that is killed or interrupted, and resumed, ends with the same adapter as one that was not, bit for bit."""

from __future__ import annotations

import json
import shutil
import signal

import pytest

from tests.faults.inject import Place, strike
from tests.faults.world import STEPS_PER_EPOCH, Cloud, Run, World, check_equal

KILL, CTRL_C = signal.SIGKILL, signal.SIGINT


@pytest.mark.parametrize(
    ("place", "count", "resumes_after"),
    [
        pytest.param(Place.BATCH_DONE, 3, None, id="before the first checkpoint"),
        pytest.param(Place.SITE_BACKWARD, 14 * 3 + 2, 8, id="between checkpoints"),
        pytest.param(Place.OPTIMIZER_MOVED, 5 + 1, 4, id="after the optimizer has moved"),
        pytest.param(Place.HALF_SAVED, 3, 4, id="in a half-written checkpoint"),
        pytest.param(Place.UNMARKED, 3, 4, id="in a checkpoint that is not marked as complete"),
        pytest.param(Place.SAVED, 3, 6, id="after the checkpoint at the end of an epoch"),
    ],
)
def test_killed_and_resumed(
    world: World, cloud: Cloud, undisturbed: Run, place: Place, count: int, resumes_after: int | None
) -> None:
    killed = world.train(f"killed-{place.name.lower()}", cloud.address, hook=strike(place, count, KILL))
    assert killed.process.wait() == -KILL
    assert killed.checkpoints == ([] if resumes_after is None else [resumes_after])
    assert not (killed.out / "adapter").exists()
    resumed = world.resume(killed)
    check_equal(resumed, undisturbed)
    began = "the beginning: there is no whole checkpoint yet"
    where = began if resumes_after is None else f"{killed.out}/checkpoints/checkpoint-{resumes_after}"
    assert f"Going on from {where}." in resumed.process.stderr


def test_a_run_that_rounds_at_random_with_two_in_flight_is_killed_and_resumed(world: World, cloud: Cloud) -> None:
    options = [
        "--codec",
        "int8",
        "--gradient-codec",
        "int4",
        "--stochastic-rounding",
        "--micro-batches",
        2,
        "--in-flight",
        2,
    ]
    whole = world.train("rounded", cloud.address, *options)
    assert whole.process.wait() == 0, whole.process.stderr
    strikes = strike(Place.SITE_BACKWARD, 2 * (14 * 3 + 2), KILL)
    killed = world.train("rounded-killed", cloud.address, *options, hook=strikes)
    assert killed.process.wait() == -KILL
    assert killed.checkpoints == [8]
    check_equal(world.resume(killed), whole)


def test_what_crossed_twice_is_counted_twice(world: World, cloud: Cloud, undisturbed: Run) -> None:
    run = world.train("counted", cloud.address, hook=strike(Place.UNMARKED, 2, KILL))
    assert run.process.wait() == -KILL
    check_equal(world.resume(run), undisturbed)
    counted, once = (json.loads((each.out / "ledger.json").read_text()) for each in (run, undisturbed))
    # Steps 3 and 4, of three batches, and the evaluation between them came to nothing: at least their sizes of site
    # outputs are in the sum.
    assert counted["sent"]["site_output"] > once["sent"]["site_output"] * 1.1


def test_killed_twice_from_outside(world: World, cloud: Cloud, undisturbed: Run) -> None:
    run = world.train("killed-from-outside", cloud.address)
    for step in (4, 8):
        run.process.wait_until((run.out / "checkpoints" / f"checkpoint-{step}").exists)
        assert run.process.kill() == -KILL
        run = world.resume(run)
    check_equal(run, undisturbed)


@pytest.mark.parametrize(
    ("place", "count", "stops_after"),
    [
        pytest.param(Place.SITE_FORWARD, 7, 2, id="in a step"),
        pytest.param(Place.BATCH_DONE, 8, 5, id="in an epoch"),
        pytest.param(Place.BATCH_DONE, 10, 2 * STEPS_PER_EPOCH, id="in the last step of an epoch"),
    ],
)
def test_interrupted_and_resumed(
    world: World, cloud: Cloud, undisturbed: Run, place: Place, count: int, stops_after: int
) -> None:
    run = world.train(f"interrupted-{stops_after}", cloud.address, hook=strike(place, count, CTRL_C))
    assert run.process.wait() == 130
    assert run.checkpoints == [stops_after]
    advice = f"Go on with: tidelock train --resume --out {run.out}"
    assert run.process.stdout.startswith(f"Stopped after step {stops_after}; all up to it is saved. {advice}\n")
    assert "Traceback" not in run.process.stderr
    check_equal(world.resume(run), undisturbed)


@pytest.mark.parametrize(
    ("place", "count", "saved"),
    [
        pytest.param(Place.SITE_BACKWARD, 6 * 3 - 1, 3, id="in a pass"),
        # The weights belong to no step there, so that they must not be saved as those of one.
        pytest.param(Place.OPTIMIZER_MOVED, 4 + 1, 2, id="after the optimizer has moved"),
    ],
)
def test_a_second_interrupt_stops_at_once(
    world: World, cloud: Cloud, undisturbed: Run, place: Place, count: int, saved: int
) -> None:
    run = world.train(f"interrupted-twice-{saved}", cloud.address, hook=strike(place, count, CTRL_C, times=2))
    assert run.process.wait() == 130
    assert run.process.stdout == ""
    assert run.process.stderr.endswith("\nInterrupted.\n")
    assert "Traceback" not in run.process.stderr
    assert run.checkpoints == [saved]
    assert not (run.out / "adapter").exists()
    check_equal(world.resume(run), undisturbed)


def test_an_interrupt_in_the_last_step_is_too_late(world: World, cloud: Cloud, undisturbed: Run) -> None:
    run = world.train("interrupted-late", cloud.address, hook=strike(Place.BATCH_DONE, 20, CTRL_C))
    check_equal(run, undisturbed)
    assert run.process.stdout.startswith("Done: 12 steps in ")


def test_a_finished_run_that_was_moved_and_is_resumed_stays_as_it_is(
    world: World, cloud: Cloud, undisturbed: Run
) -> None:
    moved = world.folder / "moved"
    shutil.copytree(undisturbed.out, moved)
    check_equal(world.resume(Run(moved, undisturbed.process)), undisturbed)
