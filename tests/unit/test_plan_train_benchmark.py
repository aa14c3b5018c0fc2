"""The figures of planned runs: how they are compared, that the page shows them, and that the benchmark runs."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.architecture.source import ROOT
from tests.support.chat_model import save_chat_model
from tests.support.link import Link
from tests.support.scripts import load_script

PATH = ROOT / "benchmarks" / "plan_train.py"


@pytest.fixture(scope="module")
def benchmark():
    return load_script(PATH)


def a_run() -> dict[str, Any]:
    """Return a run of two phases, planned at 2 s and 1 s a step of 100 tokens."""
    step = {"sent": {"embedding": 600.0}, "received": {"tap": 400.0}}
    planned = {
        "phases": [
            {"name": "warm-up", "steps": 3, "seconds": 2.0, "step": step},
            {"name": "after it", "steps": 2, "seconds": 1.0, "step": {"sent": {}, "received": {}}},
        ],
        "device_memory_bytes": 900,
        "cloud_memory_bytes": 2000,
    }
    steps = [{"seconds": 50.0, "tokens": 100}, {"seconds": 2.0, "tokens": 80}, {"seconds": 3.0, "tokens": 120}]
    steps += [{"seconds": 0.75, "tokens": 0}, {"seconds": 1.25, "tokens": 0}]
    measured = {"steps": steps, "bytes": 2500, "memory": 1000, "cloud_memory": 1600}
    return {"link": "40/50", "variant": "core", "planned": planned, "measured": measured}


def test_planned_and_measured_are_compared_by_hand(benchmark) -> None:
    found = benchmark.summarise({"runs": [a_run()]})
    first, rest = found["rows"]
    # The first step is left out: 2.5 s for 100 tokens, which is what a step of the three has in the mean.
    assert (first["title"], first["seconds"], first["seconds_off"]) == ("core: warm-up", 2.5, pytest.approx(-0.2))
    assert (rest["title"], rest["seconds"], rest["seconds_off"]) == ("core: after it", 1.0, 0.0)
    assert (first["bytes_planned"], first["bytes_off"]) == (3000.0, pytest.approx(0.2))
    assert first["memory_off"] == pytest.approx(-0.1)
    aims: dict[str, Any] = {aim["aim"]: (pytest.approx(aim["furthest"]), aim["met"]) for aim in found["aims"]}
    assert aims == {
        "seconds": (-0.2, False),
        "bytes": (0.2, False),
        "memory": (-0.1, True),
        "cloud_memory": (0.25, False),
    }
    shown = benchmark.table(found)
    assert "| 40 ms, 50 Mbit/s | core: warm-up | 2.00, 2.50 (-20.0 %) | " in shown
    assert "| 40 ms, 50 Mbit/s | core: after it | 1.00, 1.00 (+0.0 %) |  |  |" in shown
    assert "| the device's memory | -10.0 % | met |" in shown


def test_links_by_name(benchmark) -> None:
    assert benchmark.parse_link("loopback") is None
    assert benchmark.parse_link("40/50") == Link(delay_seconds=0.02, mbit_per_second=50.0)


@pytest.mark.slow
def test_it_plans_and_measures(tmp_path: Path) -> None:
    model, task, out = save_chat_model(tmp_path / "model"), tmp_path / "piqa", tmp_path / "plan_train.json"
    task.mkdir()
    with gzip.open(task / "train.jsonl.gz", "wt") as file:
        for number in range(12):
            row = {"prompt": "where is the key?" * (1 + number % 4), "choices": ["no", "in the house"], "answer": 1}
            file.write(json.dumps(row) + "\n")
    options = ["--data", str(tmp_path), "--model", str(model), "--links", "2/1000", "--variants", "side, bf16"]
    command = [sys.executable, str(PATH), *options, "--batch", "2", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads(out.read_text())
    first, later = result["rows"]
    assert first["title"].endswith("first epoch")
    assert later["title"].endswith("later epochs")
    # A side network's first epoch has the cloud's description beside what was planned.
    assert first["bytes_planned"] < first["bytes"] < first["bytes_planned"] + 5000
    assert first["seconds"] > 0
    assert later["seconds_planned"] > 0


def test_the_page_shows_the_table_of_the_results(benchmark) -> None:
    result = json.loads(benchmark.RESULTS.read_text())
    assert benchmark.summarise(result) == {name: result[name] for name in ("rows", "aims")}
    page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    _, begin, rest = page.partition("<!-- plan_train: begin -->\n")
    shown, end, _ = rest.partition("\n<!-- plan_train: end -->")
    assert begin
    assert end
    assert shown == benchmark.table(result)
