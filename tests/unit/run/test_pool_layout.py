"""Layouts of a pool as a person writes them, and as a plan has them."""

from __future__ import annotations

import json

import pytest

from tests.architecture.source import ROOT
from tidelock.errors import ConfigError
from tidelock.plan.inputs import parse_profile, read_profile
from tidelock.plan.plan import make_plan
from tidelock.pool.layout import PoolLayout, Stage
from tidelock.run.folder import RunFolder
from tidelock.run.pool_layout import layout_from_json, layout_to_json, planned_layout, written_layout

PROFILE = ROOT / "examples" / "nanos-bart-large.json"


def test_as_written():
    assert written_layout(["0-1@1,0*3", "2-2@2"], 3, 3, None) == PoolLayout(
        (Stage(range(2), (1, 0), (1, 3), 2), Stage(range(2, 3), (2,), (1,), 1)), 2
    )
    assert written_layout(["0-2@0,1"], 3, 2, 4) == PoolLayout((Stage(range(3), (0, 1), (1, 1)),), 4)


def test_as_planned():
    profile = read_profile(PROFILE)
    plan = make_plan(profile, 16, 4)
    layout = planned_layout(plan, profile, len(profile.blocks))
    assert layout.micro_batches == 4
    names = [device.name for device in profile.devices]
    for stage, planned in zip(layout.stages, plan.stages, strict=True):
        assert (stage.blocks.start, stage.blocks[-1]) == (planned.first_block, planned.last_block)
        assert [names[peer] for peer in stage.peers] == [device.name for device in planned.devices]
        assert stage.shares == tuple(device.rows for device in planned.devices)
        assert stage.in_flight == planned.in_flight


def test_of_another_model():
    profile = read_profile(PROFILE)
    with pytest.raises(ConfigError, match=f"expected the model's 30 blocks, got {len(profile.blocks)}"):
        planned_layout(make_plan(profile, 16, 4), profile, 30)


def test_a_device_that_would_not_help():
    values = json.loads(PROFILE.read_text())
    values["devices"] = values["devices"][:2]
    values["links"]["between"] = []
    values["links"]["default"] = {"bytes_per_second": 1.0, "latency_seconds": 100.0}
    for device in values["devices"]:
        device["memory_bytes"] *= 100
    profile = parse_profile(json.dumps(values), "here")
    plan = make_plan(profile, 16, 4)
    assert plan.left_out
    layout = planned_layout(plan, profile, len(profile.blocks))
    assert [profile.devices[peer].name for peer in layout.idle] == list(plan.left_out)
    assert layout.num_peers == 2


def test_a_new_layout_does_away_with_what_was_done_by_another(tmp_path):
    folder = RunFolder.new(tmp_path / "run")
    folder.write_timelines('[{"peer": 0}]')
    folder.write_layout("{}")
    assert folder.timelines.read_text() == "[]\n"


def test_a_layout_comes_back_from_json():
    layout = PoolLayout((Stage(range(2), (0, 2), (1, 3), 2), Stage(range(2, 3), (1,), (1,))), 4, idle=(3,))
    assert layout_from_json(layout_to_json(layout)) == layout
