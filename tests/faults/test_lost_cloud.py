"""A cloud that dies, stays away, comes back with other weights or freezes, in mid-run."""

from __future__ import annotations

import signal

import pytest

from tests.faults.inject import Place, strike
from tests.faults.world import Run, World, check_equal

KILL = signal.SIGKILL
RETRY = "Trying again."


@pytest.mark.parametrize(
    ("place", "count"),
    [
        pytest.param(Place.SITE_FORWARD, 23, id="on the way up"),
        pytest.param(Place.SITE_FORWARD, 17, id="in an evaluation"),
        pytest.param(Place.SITE_BACKWARD, 7 * 3 - 1, id="on the way down"),
    ],
)
def test_a_cloud_killed_and_restarted_changes_nothing(world: World, undisturbed: Run, place: Place, count: int) -> None:
    name = f"lost-{place.name.lower()}-{count}"
    with world.cloud(name) as cloud:
        run = world.train(f"{name}-run", cloud.address, hook=strike(place, count, KILL, pid=cloud.process.pid))
        assert cloud.process.wait() == -KILL
    run.process.wait_until(lambda: RETRY in run.process.stderr)
    with world.cloud(f"{name}-again", port=cloud.port):
        check_equal(run, undisturbed)
    assert f"Cloud at {cloud.address}: expected an answer, got UNAVAILABLE" in run.process.stderr


@pytest.mark.parametrize(
    ("place", "count"),
    [
        pytest.param(Place.SITE_BACKWARD, 7 * 3 - 1, id="in a step"),
        pytest.param(Place.SITE_FORWARD, 17, id="in an evaluation"),
    ],
)
def test_a_cloud_that_stays_away_ends_the_run_with_all_finished_steps_saved(
    world: World, undisturbed: Run, place: Place, count: int
) -> None:
    name = f"away-{count}"
    with world.cloud(name) as cloud:
        hook = strike(place, count, KILL, pid=cloud.process.pid)
        run = world.train(f"{name}-run", cloud.address, "--patience", 0.5, hook=hook)
        assert cloud.process.wait() == -KILL
    assert run.process.wait() == 11
    assert RETRY in run.process.stderr
    last = run.process.stderr.splitlines()[-1]
    assert last.startswith(f"error: Cloud at {cloud.address}: expected an answer, got UNAVAILABLE")
    assert last.endswith("Is it running, and reachable from here?")
    assert "Traceback" not in run.process.stderr
    # Step 3 was done, and no checkpoint was due there.
    assert run.checkpoints == [3]
    with world.cloud(f"{name}-again", port=cloud.port):
        check_equal(world.resume(run), undisturbed)


def test_a_cloud_that_comes_back_with_other_weights_is_refused_and_nothing_is_lost(
    world: World, undisturbed: Run
) -> None:
    with world.cloud("changed") as cloud:
        hook = strike(Place.SITE_FORWARD, 23, KILL, pid=cloud.process.pid)
        run = world.train("changed-run", cloud.address, hook=hook)
        assert cloud.process.wait() == -KILL
    with world.cloud("changed-other", model=world.other_model, port=cloud.port):
        assert run.process.wait() == 14
    assert RETRY in run.process.stderr
    assert "The cloud was restarted with other weights" in run.process.stderr.splitlines()[-1]
    assert run.checkpoints == [3]
    with world.cloud("changed-right", port=cloud.port):
        check_equal(world.resume(run), undisturbed)


@pytest.mark.slow
def test_a_cloud_that_freezes_is_noticed(world: World, undisturbed: Run) -> None:
    """A frozen process keeps its connections and says nothing: only unanswered pings tell, after about a minute."""
    with world.cloud("frozen") as cloud:
        hook = strike(Place.SITE_BACKWARD, 7 * 3 - 1, signal.SIGSTOP, pid=cloud.process.pid)
        run = world.train("frozen-run", cloud.address, "--patience", 1, hook=hook)
        assert run.process.wait(200) == 11
        assert "ping timeout" in run.process.stderr
        assert run.checkpoints == [3]
        cloud.process.send(signal.SIGCONT)
        check_equal(world.resume(run), undisturbed)
