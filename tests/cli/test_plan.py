"""`tidelock plan pool`: what it prints, in words and as JSON, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.architecture.source import ROOT
from tidelock.cli.main import run
from tidelock.errors import ConfigError, DataError

Capture = pytest.CaptureFixture[str]
EXAMPLE = ROOT / "examples" / "nanos-bart-large.json"


def tide(*args: object) -> int:
    return run(["plan", "pool", *map(str, args)])


def test_the_example_is_planned(capsys: Capture) -> None:
    assert tide(EXAMPLE, "--batch-rows", 16, "--micro-batches", 4) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.startswith(
        "BART-Large with a side network on 4 Jetson Nanos: 2 stages, 4.36 s a step of 16 rows in "
    )
    for words in (
        "Stage 1: blocks 0 to 13, 3 in flight",
        "Bottleneck: stage 1 computes for ",
        "Data parallel: does not fit",
    ):
        assert words in shown.out
    assert shown.out.count("2 rows of each micro-batch, ") == 4


def test_json_is_one_object(capsys: Capture) -> None:
    assert tide(EXAMPLE, "--micro-batches", 4, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["event"], values["micro_batches"], values["is_proved"]) == ("plan", 4, True)
    assert [len(stage["devices"]) for stage in values["stages"]] == [2, 2]
    assert {bar["work"] for bar in values["timeline"]} == {
        *("forward", "backward", "send-forward", "send-backward", "all-reduce"),
    }


def test_too_little_memory_is_refused_with_what_is_missing(capsys: Capture) -> None:
    assert tide(EXAMPLE, "--batch-rows", 64, "--micro-batches", 1) == ConfigError.exit_code
    said = capsys.readouterr().err
    assert said.startswith("error: Plan: expected memory in the pool for 24 blocks, got too little: no layout has it; ")
    assert "MB too little" in said
    assert "give a larger --micro-batches" in said


def test_a_malformed_profile_is_refused(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "pool.json"
    path.write_text(EXAMPLE.read_text().replace('"memory_bytes": 1500000000', '"memory_bytes": "much"', 1))
    assert tide(path, "--json") == DataError.exit_code
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["message"] == (
        "Profile: expected the form of docs/pool.md; devices.0.memory_bytes: Input should be a valid integer, "
        f"got 'much' ({path}). Mend it there."
    )
