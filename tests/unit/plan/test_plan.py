"""The plan in figures and words: what it counts, what holds it up, why not otherwise, and what is missing."""

from __future__ import annotations

import json
import random

import pytest

from tests.unit.plan.pools import random_pool
from tidelock.errors import ConfigError
from tidelock.plan.inputs import Profile, parse_profile
from tidelock.plan.plan import make_plan
from tidelock.plan.words import plan_text, plan_values


def pool(memory: tuple[int, ...], blocks: int = 4, seconds: float = 1.0, bandwidth: float = 1000.0) -> Profile:
    """Return equal blocks of 100 bytes on devices that differ in memory only."""
    block = {
        "parameter_bytes": 100,
        "gradient_bytes": 4,
        "optimizer_bytes": 8,
        "kept_bytes_per_row": 5,
        "working_bytes_per_row": 3,
        "forward_bytes_per_row": 9,
        "backward_bytes_per_row": 1,
    }
    times = {"rows": [1], "forward_seconds": [[seconds] * blocks], "backward_seconds": [[2 * seconds] * blocks]}
    values = {
        "format": "tidelock-pool-profile",
        "version": 1,
        "title": "four blocks",
        "blocks": [block | {"name": str(number)} for number in range(blocks)],
        "devices": [{"name": f"d{number}", "memory_bytes": size, **times} for number, size in enumerate(memory)],
        "links": {"default": {"bytes_per_second": bandwidth, "latency_seconds": 0.0}},
    }
    return parse_profile(json.dumps(values), "pool.json")


def test_a_pipeline_of_two_is_counted_as_by_hand():
    plan = make_plan(pool((300, 300)), 4, 4)
    assert (plan.micro_batches, plan.ahead, plan.is_proved, plan.left_out) == (4, 2, True, ())
    first, last = plan.stages
    assert (first.first_block, first.last_block, last.first_block, last.last_block) == (0, 1, 2, 3)
    assert (first.in_flight, last.in_flight) == (3, 1)
    # Weights, gradients, moments of two blocks; three micro-batches kept and as many messages each way; work on one.
    assert [d.memory_bytes for d in first.devices] == [2 * 112 + 3 * 2 * 5 + 3 + 3 * (9 + 1)]
    assert [d.memory_bytes for d in last.devices] == [2 * 112 + 2 * 5 + 3 + 3 * (9 + 1)]
    assert (first.forward_seconds, first.backward_seconds) == (8, 16)
    assert (first.forward_bytes, first.backward_bytes, last.forward_bytes, last.backward_bytes) == (36, 0, 0, 4)
    # The last stage begins after one forward and a transfer; the first ends a transfer and a backward after it.
    assert plan.seconds == pytest.approx(2 + 0.009 + 24 + 0.001 + 4)
    assert plan.bottleneck == "stage 1 computes for 24 s of 30 s"


def test_with_room_for_everything_devices_share_the_rows():
    plan = make_plan(pool((1000, 1000)), 4, 1)
    (stage,) = plan.stages
    assert [(device.rows, device.memory_bytes) for device in stage.devices] == [(2, 4 * 112 + 2 * (4 * 5 + 3))] * 2
    assert stage.all_reduce_bytes == 16
    assert stage.all_reduce_seconds == pytest.approx(0.016)
    assert plan.seconds == pytest.approx(2 * 12 + 0.016)


def test_all_numbers_of_micro_batches_are_tried():
    best = make_plan(pool((420, 420)), 6)
    assert best.seconds == min(make_plan(pool((420, 420)), 6, count).seconds for count in (1, 2, 3, 6))
    assert best.micro_batches == 6


def test_a_device_that_would_not_help_is_left_out():
    values = pool((1000, 1000)).model_dump(mode="json")
    values["devices"][1]["forward_seconds"] = [[100.0] * 4]
    plan = make_plan(parse_profile(json.dumps(values), "pool.json"), 4)
    assert plan.left_out == ("d1",)
    assert "Left out, since it would not help: d1." in plan_text(plan)


def test_a_slow_network_is_the_bottleneck():
    plan = make_plan(pool((300, 300), seconds=0.001, bandwidth=1.0), 4, 4)
    assert plan.bottleneck.startswith("the link from stage 1 to 2 is taken for 36 s of ")


def test_why_not_otherwise():
    plan = make_plan(pool((300, 300, 300, 300)), 8, 4)
    names = [other.name for other in plan.alternatives]
    assert names == ["next best", "data parallel", "pipeline of single devices"]
    following, parallel, single = plan.alternatives
    assert following.seconds is not None
    assert single.seconds is not None
    assert plan.seconds < following.seconds <= single.seconds
    assert (parallel.seconds, parallel.groups) == (None, ())
    assert parallel.reason.startswith("d0, d1 with blocks 0 to 3 each need 471 B and have 300 B, 171 B too little")
    text = plan_text(plan)
    assert "Data parallel: does not fit: d0, d1 with blocks" in text
    assert "% more: " in text


def test_what_memory_is_missing_where():
    with pytest.raises(ConfigError) as error:
        make_plan(pool((120, 250)), 4, 4)
    assert error.value.message.startswith(
        "Plan: expected memory in the pool for 4 blocks, got too little: no layout has it; closest: d1 with blocks "
    )
    assert "B too little" in error.value.message
    assert error.value.message.endswith("or add a device.")


def test_no_rows_for_all_devices_is_no_lack_of_memory():
    plan = make_plan(pool((1000,) * 3), 1)
    assert len(plan.left_out) == 2
    assert [device.rows for stage in plan.stages for device in stage.devices] == [1]


@pytest.mark.parametrize(
    ("batch_rows", "micro_batches", "said"),
    [
        (0, None, "expected at least 1 row in a batch, got 0"),
        (8, 3, "divides the 8 rows of a batch, got 3. Give --micro-batches one of 1, 2, 4, 8."),
        (8, 0, "got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(batch_rows: int, micro_batches: int | None, said: str):
    with pytest.raises(ConfigError, match=said):
        make_plan(pool((1000,)), batch_rows, micro_batches)


def test_values_for_json_are_the_plan():
    plan = make_plan(random_pool(random.Random(5), 5, 4, (4.0, 8.0)), 6)
    values = json.loads(json.dumps(plan_values(plan)))
    assert values["seconds"] == plan.seconds
    assert values["rows_per_second"] == 6 / plan.seconds
    assert len(values["stages"]) == len(plan.stages)
    assert max(bar["end"] for bar in values["timeline"]) == pytest.approx(plan.seconds)
    busy = [
        stage["forward_seconds"] + stage["backward_seconds"] + stage["all_reduce_seconds"] for stage in values["stages"]
    ]
    for stage, seconds in zip(values["stages"], busy, strict=True):
        assert stage["idle_seconds"] == pytest.approx(plan.seconds - seconds, abs=1e-9)


def test_the_same_profile_gives_the_same_plan():
    profile = random_pool(random.Random(7), 9, 7, (2.0, 8.0))
    assert make_plan(profile, 4, 4) == make_plan(profile, 4, 4)
