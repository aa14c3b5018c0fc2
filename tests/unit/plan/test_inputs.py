"""What a profile may be, and what is said of one that is not."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.unit.plan.pools import random_pool
from tidelock.errors import DataError
from tidelock.plan.cost import Costs
from tidelock.plan.inputs import parse_profile, read_profile


@pytest.fixture
def values():
    return random_pool(random.Random(0), 3, 2).model_dump(mode="json")


def set_at(values, path: tuple[str | int, ...], value) -> None:
    for part in path[:-1]:
        values = values[part]
    values[path[-1]] = value


def test_what_was_written_is_read(tmp_path: Path, values):
    path = tmp_path / "pool.json"
    path.write_text(json.dumps(values))
    assert read_profile(path).model_dump(mode="json") == values


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("format",), "other", "format: Input should be 'tidelock-pool-profile', got 'other'"),
        (("version",), 2, "version: Input should be 1, got 2"),
        (("blocks",), [], "blocks: "),
        (("blocks", 1, "parameter_bytes"), -1, "blocks.1.parameter_bytes: Input should be greater than or equal to 0"),
        (("blocks", 1, "parameter_bytes"), "12", "blocks.1.parameter_bytes: Input should be a valid integer, got '12'"),
        (("blocks", 0, "colour"), 1, "blocks.0.colour: Extra inputs are not permitted"),
        (("devices", 0, "memory_bytes"), None, "devices.0.memory_bytes: "),
        (("devices", 1, "name"), "device-0", "expected a name for each device, got 'device-0' 2 times"),
        (("devices", 0, "rows"), [4, 2], "expected rows that rise, got [4, 2] (device-0)"),
        (("devices", 0, "rows"), [0, 2], "devices.0.rows.0: "),
        (("devices", 0, "forward_seconds"), [[1.0]], "lists, one for each of rows"),
        (("devices", 0, "backward_seconds", 0), [1.0], "expected seconds of 3 blocks in each list, got 1"),
        (("devices", 0, "backward_seconds", 0, 0), -1.0, "devices.0.backward_seconds.0.0: "),
        (("links", "default", "bytes_per_second"), 0, "links.default.bytes_per_second: Input should be greater than 0"),
        (("links", "default", "latency_seconds"), float("inf"), "latency_seconds: "),
    ],
)
def test_what_breaks_a_rule_is_named(values, path: tuple[str | int, ...], value, said: str):
    if path == ("devices", 0, "forward_seconds"):
        values["devices"][0]["rows"] = [1, 2]
    set_at(values, path, value)
    with pytest.raises(DataError) as error:
        parse_profile(json.dumps(values), "pool.json")
    assert said in error.value.message
    assert error.value.message.startswith("Profile: expected the form of docs/pool.md; ")
    assert error.value.message.endswith("(pool.json). Mend it there.")


@pytest.mark.parametrize(
    ("between", "said"),
    [
        ([["device-0", "x"]], "expected links between devices of the profile, got x"),
        ([["device-0", "device-0"]], "expected links between two devices, got 'device-0' twice"),
        ([["device-0", "device-1"], ["device-1", "device-0"]], "one link for each pair, got 'device-0 and device-1' 2"),
    ],
)
def test_a_link_is_between_two_known_devices_once(values, between, said: str):
    default = values["links"]["default"]
    values["links"]["between"] = [default | {"devices": pair} for pair in between]
    with pytest.raises(DataError, match=said):
        parse_profile(json.dumps(values), "pool.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_a_file_that_holds_no_profile(tmp_path: Path, content: bytes):
    path = tmp_path / "pool.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"Profile: .*pool\.json"):
        read_profile(path)


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(DataError, match="got No such file or directory"):
        read_profile(tmp_path / "none.json")


def test_times_between_measured_sizes_and_beyond(values):
    device = values["devices"][0]
    device["rows"] = [2, 4]
    device["forward_seconds"] = [[2.0, 2.0, 5.0], [4.0, 2.0, 3.0]]
    device["backward_seconds"] = [[0.0] * 3, [0.0] * 3]
    costs = Costs(parse_profile(json.dumps(values), "pool.json"), 8, 1)
    first, second, third = (costs.seconds(costs.forward[0], (block, block + 1)) for block in range(3))
    assert first == [0, 2, 2, 3, 4, 5, 6, 7, 8]
    assert second == [0, 2, 2, 2, 2, 2.5, 3, 3.5, 4]
    assert third == [0, 5, 5, 5, 5, 5, 5, 5.25, 6]  # never less than for fewer rows
