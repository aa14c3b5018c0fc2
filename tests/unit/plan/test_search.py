"""The search against a brute force that shares no code with it, and what must hold for any pool."""

from __future__ import annotations

import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.plan.pools import BruteForce, compositions, random_pool
from tidelock.plan import climb
from tidelock.plan import search as searching
from tidelock.plan.cost import Costs
from tidelock.plan.inputs import Profile, parse_profile
from tidelock.plan.partition import Shape
from tidelock.plan.search import Result, search
from tidelock.plan.shares import share_rows
from tidelock.plan.simulate import gantt

SIZES = list(itertools.product(range(1, 8), range(1, 6)))


def search_any(profile: Profile, rows: int, micro_batches: int) -> Result:
    devices = len(profile.devices)
    return search(Costs(profile, rows, micro_batches), Shape("any", devices, devices))


def seconds_of(result: Result) -> float:
    return result.layouts[0].seconds if result.layouts else float("inf")


@pytest.mark.parametrize(("blocks", "devices"), SIZES)
def test_the_same_optimum_as_a_brute_force(blocks: int, devices: int):
    for seed in range(4):
        draw = random.Random(f"{blocks} {devices} {seed}")
        profile = random_pool(draw, blocks, devices)
        rows, micro_batches = draw.randint(1, 5), draw.choice([1, 2, 3, 5])
        result = search_any(profile, rows, micro_batches)
        assert result.complete
        brute = BruteForce(profile, rows, micro_batches)
        brute.known = seconds_of(result) * (1 + 1e-9)
        assert seconds_of(result) == pytest.approx(brute.best(), rel=1e-9)


def test_the_brute_force_finds_pools_that_fit_and_pools_that_do_not():
    fits = [BruteForce(random_pool(random.Random(seed), 4, 3), 3, 2).best() < float("inf") for seed in range(40)]
    assert 4 < sum(fits) < 40


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 7))
@settings(max_examples=200, deadline=None)
def test_shares_are_those_that_no_other_share_beats_both_ways(seed: int, devices: int, rows: int):
    draw = random.Random(seed)
    tables = [
        [list(itertools.accumulate([0, *(draw.choice([0, 1, 2, 5]) for _ in range(rows))])) for _ in range(devices)]
        for _ in range(2)
    ]
    forward, backward = tables
    room = [draw.randint(0, rows) for _ in range(devices)]
    every = {
        tuple(max(table[d][r] for d, r in enumerate(shares)) for table in tables)
        for shares in (compositions(rows, devices) if rows >= devices else [])
        if all(share <= most for share, most in zip(shares, room, strict=True))
    }
    best = {one for one in every if not any(o != one and o[0] <= one[0] and o[1] <= one[1] for o in every)}
    found = share_rows(forward, backward, room, rows)
    assert {(share.forward, share.backward) for share in found} == best
    for share in found:
        assert sum(share.rows) == rows
        assert all(1 <= count <= most for count, most in zip(share.rows, room, strict=True))
        assert share.forward == max(forward[d][count] for d, count in enumerate(share.rows))
        assert share.backward == max(backward[d][count] for d, count in enumerate(share.rows))


def changed(profile: Profile, change) -> Profile:
    values = profile.model_dump(mode="json")
    change(values)
    return parse_profile(json.dumps(values), "changed")


def quicker(values) -> None:
    for name in ("forward_seconds", "backward_seconds"):
        values["devices"][0][name] = [[0.7 * seconds for seconds in line] for line in values["devices"][0][name]]


def quicker_backward_of_one_block(values) -> None:
    for line in values["devices"][-1]["backward_seconds"]:
        line[0] *= 0.5


def more_memory(values) -> None:
    values["devices"][0]["memory_bytes"] *= 2


def more_bandwidth(values) -> None:
    for link in (values["links"]["default"], *values["links"]["between"]):
        link["bytes_per_second"] *= 2


def less_latency(values) -> None:
    values["links"]["default"]["latency_seconds"] /= 2


@pytest.mark.parametrize("change", [quicker, quicker_backward_of_one_block, more_memory, more_bandwidth, less_latency])
def test_a_better_pool_is_never_slower(change):
    better = 0
    for seed in range(40):
        draw = random.Random(seed)
        profile = random_pool(draw, draw.randint(2, 7), draw.randint(2, 5))
        before, after = search_any(profile, 4, 3), search_any(changed(profile, change), 4, 3)
        assert before.complete
        assert after.complete
        assert seconds_of(after) <= seconds_of(before) * (1 + 1e-12)
        better += seconds_of(after) < seconds_of(before)
    assert better > 3


def test_a_thousand_plans_never_exceed_a_devices_memory():
    fitting = 0
    for seed in range(1000):
        draw = random.Random(seed)
        profile = random_pool(draw, draw.randint(1, 9), draw.randint(1, 8), (1.0, 12.0))
        rows, micro_batches = draw.randint(1, 8), draw.randint(1, 6)
        costs = Costs(profile, rows, micro_batches)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(searching, "_MOST_LOOKS", 200)
            patch.setattr(climb, "_CLIMB_WORK", 500)
            layouts = search(costs, Shape("any", 8, 8)).layouts
        fitting += bool(layouts)
        for layout in layouts:
            assert [block for stage in layout.stages for block in range(stage.first, stage.end)] == list(
                range(costs.blocks)
            )
            used = [device for stage in layout.stages for device in stage.group]
            assert len(used) == len(set(used))
            assert all(sum(stage.shares) == rows and min(stage.shares) >= 1 for stage in layout.stages)
            for device, peak in peaks(profile, costs, layout):
                assert peak <= profile.devices[device].memory_bytes
    assert 500 < fitting < 1000


def peaks(profile: Profile, costs: Costs, layout):
    """Yield each device with the most bytes that it holds at once in the simulated step, counted event by event."""
    bars = {
        (bar.stage, bar.work, bar.micro_batch): bar
        for bar in gantt(costs.times(layout.stages, layout.ahead), costs.micro_batches)
    }
    for index, stage in enumerate(layout.stages):
        held = profile.blocks[stage.first : stage.end]
        fixed = sum(block.parameter_bytes + block.gradient_bytes + block.optimizer_bytes for block in held)
        working = max(block.working_bytes_per_row for block in held)
        spans = []  # bytes a row, since when, until when
        for number in range(costs.micro_batches):
            forward, backward = bars[index, "forward", number], bars[index, "backward", number]
            spans.append((sum(block.kept_bytes_per_row for block in held), forward.begin, backward.end))
            if stage.first:
                there, here = bars[index - 1, "send-forward", number], bars[index, "send-backward", number]
                block = profile.blocks[stage.first - 1]
                spans.append((block.forward_bytes_per_row, there.begin, forward.end))
                spans.append((block.backward_bytes_per_row, backward.end, here.end))
            if stage.end < len(profile.blocks):
                here, there = bars[index, "send-forward", number], bars[index + 1, "send-backward", number]
                spans.append((held[-1].forward_bytes_per_row, forward.end, here.end))
                spans.append((held[-1].backward_bytes_per_row, there.begin, backward.end))
        # At one time an end comes before a beginning; times are rounded, since a bar's beginning is a difference.
        changes = [(round(at, 6), size) for size, begin, end in spans for at, size in ((begin, size), (end, -size))]
        most = max(itertools.accumulate(size for _, size in sorted(changes)))
        for device, rows in zip(stage.group, stage.shares, strict=True):
            yield device, fixed + rows * (most + working)


def test_devices_that_are_alike_are_tried_in_one_order_only():
    profile = random_pool(random.Random(3), 6, 5, (8.0, 8.0))
    equal = changed(
        profile,
        lambda values: values.update(
            devices=[values["devices"][0] | {"name": f"device-{number}"} for number in range(5)],
            links={"default": values["links"]["default"], "between": []},
        ),
    )
    assert climb.Found(Costs(equal, 5, 3)).kinds == [0] * 5
    brute = BruteForce(equal, 5, 3)
    result = search_any(equal, 5, 3)
    assert result.complete
    assert result.layouts[0].seconds == pytest.approx(brute.best(), rel=1e-9)


def test_without_a_complete_search_the_result_says_so(monkeypatch: pytest.MonkeyPatch):
    profile = random_pool(random.Random(1), 7, 5, (4.0, 8.0))
    best = search_any(profile, 4, 4)
    monkeypatch.setattr(searching, "_MOST_GROUPS", 0)
    other = search_any(profile, 4, 4)
    assert best.complete
    assert not other.complete
    assert seconds_of(best) <= seconds_of(other) < 1.5 * seconds_of(best)


@pytest.mark.parametrize(("shape", "expected"), [(Shape("one stage", 1, 4), 1), (Shape("alone", 4, 1), 4)])
def test_a_shape_is_kept(shape: Shape, expected: int):
    for seed in range(20):
        for layout in search(Costs(random_pool(random.Random(seed), 6, 4, (4.0, 8.0)), 4, 4), shape).layouts:
            assert len(layout.stages) <= shape.max_stages
            assert max(len(stage.group) for stage in layout.stages) <= shape.max_group
