"""The figures of pools: how runs are summed up, and that the page shows what was measured."""

from __future__ import annotations

import json

import pytest

from tests.architecture.source import ROOT
from tests.support.scripts import load_script


@pytest.fixture(scope="module")
def benchmark():
    return load_script(ROOT / "benchmarks" / "pool.py")


def test_runs_are_summed_up_by_hand(benchmark):
    seconds = {
        "one peer": (4.0, 2.0),
        "two peers, data parallel": (2.0, 1.0),
        "two peers, straight pipeline": (2.5, 1.0),
    }
    seconds["two peers, as planned"] = (2.0, 1.25)
    seconds["LoRA, one peer (Standalone)"] = (6.0, 6.0)
    seconds["LoRA, two peers, data parallel (EDDL)"] = (4.0, 3.0)
    runs = [
        {
            "variant": name,
            "round": round_,
            "first_epoch": [first, first + round_],
            "cached": [cached],
            "planned": 3.0 + round_ if name.endswith("planned") else None,
            "memory": [500e6 + round_ * 20e6] * (1 if "one peer" in name else 2),
            "planned_memory": [399e6, 451e6] if name.endswith("planned") else [],
        }
        for round_ in (0, 1)
        for name, (first, cached) in seconds.items()
    ]
    found = benchmark.summarise(runs)
    assert found["one peer"] == {
        "first_epoch": 4.0,
        "cached": 2.0,
        "planned": None,
        "memory": [510e6],
        "planned_memory": [],
        "first_epoch_speed_up": 1.0,
        "cached_speed_up": 1.0,
    }
    assert found["two peers, data parallel"]["first_epoch_speed_up"] == 2.0
    assert found["two peers, straight pipeline"]["cached_speed_up"] == 2.0
    assert found["two peers, as planned"]["planned"] == 3.5
    assert found["LoRA, one peer (Standalone)"]["first_epoch_speed_up"] == 1.0
    assert found["LoRA, two peers, data parallel (EDDL)"]["cached_speed_up"] == 2.0
    shown = benchmark.tables(
        {
            "model": "m",
            "examples": {"count": 3, "mean_tokens": 7.4},
            "batch_size": 2,
            "epochs": 3,
            "rounds": 2,
            "bytes_of_libraries": 100e6,
            "summary": found,
        }
    )
    assert "m, 3 texts of 7 tokens in the mean" in shown
    assert "| one peer | 4.00 | 1.00x | 2.00 | 1.00x | 16 | | 410 | |" in shown
    planned = (
        "| two peers, as planned | 2.00 | 2.00x | 1.25 | 1.60x | 9 | 3.50 (+75%) | 410, 410 | 399 (-3%), 451 (+10%) |"
    )
    assert planned in shown
    assert "| LoRA, two peers, data parallel (EDDL) | 4.00 | 1.50x | 3.00 | 2.00x | 20 | | 410, 410 | |" in shown


def test_the_page_shows_the_tables_of_the_results(benchmark):
    page = (ROOT / "docs" / "pool.md").read_text(encoding="utf-8")
    _, begin, rest = page.partition("<!-- pool: begin -->\n")
    shown, end, _ = rest.partition("\n<!-- pool: end -->")
    assert begin
    assert end
    result = json.loads(benchmark.RESULTS.read_text())
    assert shown == benchmark.tables(result)
    assert result["summary"] == benchmark.summarise(result["runs"])
