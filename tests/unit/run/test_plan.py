"""The parts of a plan for training: phases of a schedule, the crowding that explains a measure, and acts of passes."""

from __future__ import annotations

from typing import Any

import pytest

from tidelock.backbone.crossings import Crossing
from tidelock.plan.flight import Processors
from tidelock.run.config import RunConfig
from tidelock.run.plan_passes import Pace, PlannedBatch, PlannedPass, fly_batch, traffic_of
from tidelock.run.plan_phases import Phase, scheduled_phases, side_phases, steps_of
from tidelock.run.plan_probe import fit_crowding, peak_bytes
from tidelock.schedule.schedule import Schedule
from tidelock.wire.ledger import Kind

BLOCKS = tuple(range(8))
ALONE = Processors(turns=2, crowding=0.0, shared=True)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"epochs": 3.0}, (4, 12)),
        ({"epochs": 0.5}, (4, 2)),
        ({"max_steps": 7}, (4, 7)),
        ({"accumulate": 3, "epochs": 2.0}, (2, 4)),
    ],
)
def test_steps_are_counted_as_trainer_does(options: dict[str, Any], steps: tuple[int, int]) -> None:
    config = RunConfig(data="", out="", model="m", batch_size=8, **options)
    assert steps_of(config, 29) == steps


def test_without_a_schedule_all_steps_are_alike() -> None:
    assert scheduled_phases(Schedule(), BLOCKS, None, 5, 20) == [Phase("all steps", 0, 20, (BLOCKS,))]


def test_after_the_warm_up_so_many_modules_are_active_evenly_spread() -> None:
    schedule = Schedule("kill-revive", budget=3, warm_up=2)
    first, rest = scheduled_phases(schedule, BLOCKS, None, 5, 20)
    assert (first.steps, first.turns) == (10, (BLOCKS,))
    assert (rest.steps, rest.turns) == (10, ((0, 2, 5),))


def test_a_warm_up_in_turns_and_a_clouds_limit() -> None:
    schedule = Schedule("kill-revive", budget=6, period=4, warm_up_active=5)
    first, rest = scheduled_phases(schedule, BLOCKS, 4, 5, 20)
    assert (first.steps, first.turns) == (4, ((0, 2, 4, 6), (1, 3, 5, 7)))
    assert rest.turns == ((0, 2, 4, 6),)


def test_a_run_that_ends_in_the_warm_up_has_nothing_after_it() -> None:
    assert [phase.name for phase in scheduled_phases(Schedule("fixed"), BLOCKS, None, 5, 3)] == ["warm-up"]


def test_a_phase_takes_its_own_steps_of_an_epoch() -> None:
    assert Phase("after it", first=3, steps=3).sample(4) == [3, 0, 1]
    assert Phase("after it", first=3, steps=9).sample(4) == [3, 0, 1, 2]


def test_a_side_network_needs_the_blocks_in_the_first_epoch() -> None:
    assert side_phases(5, 12, caches=True) == [Phase("first epoch", 0, 5), Phase("later epochs", 5, 7, cached=True)]
    assert side_phases(5, 4, caches=True) == [Phase("first epoch", 0, 4)]
    assert side_phases(5, 12, caches=False) == [Phase("all steps", 0, 12)]


def test_crowding_is_what_explains_the_measure() -> None:
    assert fit_crowding(lambda crowding: 2 + crowding, 2.5) == pytest.approx(0.5, abs=1e-6)
    assert fit_crowding(lambda crowding: 2 + crowding, 1.0) == 0.0


def test_a_process_has_a_peak() -> None:
    assert peak_bytes() > 10**7


def crossing(kind: Kind, size_bytes: int) -> Crossing:
    sent = {Kind.EMBEDDING, Kind.SITE_OUTPUT, Kind.FINAL_GRADIENT, Kind.INPUT_GRADIENT}
    return Crossing(kind, sent=kind in sent, size_bytes=size_bytes)


FORWARD = [
    Crossing(Kind.CONTROL, sent=True, size_bytes=1),
    *(crossing(kind, 10) for kind in (Kind.EMBEDDING, Kind.SITE_INPUT, Kind.SITE_OUTPUT, Kind.FINAL_STATE)),
]
BACKWARD = [
    *(crossing(kind, 10) for kind in (Kind.FINAL_GRADIENT, Kind.SITE_GRADIENT)),
    Crossing(Kind.CONTROL, sent=False, size_bytes=2),
]
PACE = Pace(device=0.1, cloud=0.2, wire=0.3, own=0.5, update=7.0)


def test_a_pass_takes_its_parts_whatever_their_order() -> None:
    one = PlannedPass(tokens=10, rows=3, width=4, positions=12, forward=FORWARD, backward=BACKWARD)
    flight = fly_batch(PlannedBatch([one], own_tokens=6), PACE, 1, ALONE, None)
    assert (flight.device, flight.cloud, flight.wire) == pytest.approx((10 * 0.1, 12 * 0.2, 10 * 0.3))
    assert flight.seconds == pytest.approx(1 + 2.4 + 3 + 6 * 0.5)
    assert one.round_trips == 3


def test_taps_come_while_the_cloud_goes_on() -> None:
    forward = [*FORWARD[:2], *(crossing(Kind.TAP, 10) for _ in range(3)), crossing(Kind.FINAL_STATE, 10)]
    one = PlannedPass(tokens=10, rows=1, width=10, positions=10, forward=forward, backward=[])
    flight = fly_batch(PlannedBatch([one], own_tokens=10), PACE, 1, ALONE, None)
    assert (flight.cloud, flight.wire, flight.seconds) == pytest.approx((2, 3, 5 + 5))
    cached = fly_batch(PlannedBatch([], own_tokens=10), PACE, 1, ALONE, None)
    assert cached.seconds == pytest.approx(5)


def test_traffic_is_by_kind_and_way() -> None:
    one = PlannedPass(tokens=10, rows=3, width=4, positions=12, forward=FORWARD, backward=BACKWARD)
    traffic = traffic_of([PlannedBatch([one, one], 0)])
    assert traffic.sent == {"control": 2, "embedding": 20, "site_output": 20, "final_gradient": 20}
    assert traffic.received == {"site_input": 20, "final_state": 20, "site_gradient": 20, "control": 4}
    assert traffic.total == 126
