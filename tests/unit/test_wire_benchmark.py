"""The figures of shaped links: how runs are summed up, that the page shows them, and that the benchmark runs."""

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

PATH = ROOT / "benchmarks" / "wire.py"
FEW, CORE = "8 of 30 modules, bf16", "core, int8"


@pytest.fixture(scope="module")
def benchmark():
    return load_script(PATH)


def a_run(link: str, variant: str, seconds: list[float], size: int, tokens: int = 100) -> dict[str, Any]:
    """Return a run beside which `peft` took 2 s for 100 tokens."""
    run = {"link": link, "variant": variant, "round": 0, "seconds": seconds, "bytes": size}
    peft = {"seconds": [2.0] * len(seconds), "tokens": [100] * len(seconds)}
    return {**run, "tokens": [tokens] * len(seconds), "peft": peft}


def test_runs_are_summed_up_by_hand(benchmark) -> None:
    runs = [
        a_run("loopback", "naive", [4.0, 2.0], 200_000),
        a_run("loopback", CORE, [2.0, 2.2], 2_000),
        a_run("50/100", "naive", [50.0], 100_000),
        a_run("50/100", CORE, [3.0], 1_000),
        a_run("50/100", CORE, [5.0], 1_000),
        a_run("50/100", CORE, [6.0], 1_000),
        a_run("50/100", FEW, [3.0], 5_000, tokens=50),
    ]
    tenants = {"devices": 3, "seconds": 30.0, "model": "llama", "alone": 10, "together": [4, 2, 5]}
    found = benchmark.summarise({"runs": runs, "tenants": tenants})
    row = found["summary"]["loopback"]["naive"]
    assert (row["seconds"], row["ratio"], row["bytes_per_token"], row["steps"]) == (3.0, 1.5, 1000.0, 2)
    row = found["summary"]["50/100"][CORE]
    assert (row["seconds"], row["peft"], row["ratio"], row["ratios"], row["steps"]) == (5.0, 2.0, 2.5, [1.5, 3.0], 3)
    # Half the tokens in half as much time more.
    assert found["summary"]["50/100"][FEW]["ratio"] == 3.0
    aims: dict[str, Any] = {aim["aim"]: (pytest.approx(aim["reached"]), aim["met"]) for aim in found["aims"]}
    assert aims == {
        f"{CORE}: time to peft's, loopback": (1.05, True),
        f"{CORE}: time to peft's, 50/100": (2.5, False),
        f"{FEW}: time to peft's, 50/100": (3.0, False),
        "naive: time to peft's, 50/100": (25.0, True),
        "naive's bytes a token over those of core, int8": (100.0, True),
        "many devices' steps over one's": (1.1, True),
        "slowest of many devices over the fastest": (0.4, False),
    }
    shown = benchmark.tables({**found, "tenants": tenants})
    assert "Loopback:\n\n| | s a step | to peft's | kB a token | steps |" in shown
    assert "50 ms round trip, 100 Mbit/s:" in shown
    assert "| naive | 50.00 | 25.00x | 1.0 | 1 |" in shown
    assert "3 devices at one cloud for 30 s" in shown
    assert "| slowest of many devices over the fastest | at least 0.8 | 0.40 | missed |" in shown


def test_links_by_name(benchmark) -> None:
    assert benchmark.parse_link("loopback") is None
    assert benchmark.parse_link("50/100") == Link(delay_seconds=0.025, mbit_per_second=100.0)


@pytest.mark.parametrize(
    ("variant", "link", "steps"),
    [
        ("naive", "loopback", 3),
        ("naive", "20/1000", 3),
        ("naive", "50/100", 1),
        ("naive", "1/10", 0),
        (CORE, "1/10", 3),
    ],
)
def test_what_is_slow_takes_fewer_steps(benchmark, variant: str, link: str, steps: int) -> None:
    assert benchmark.steps_of(benchmark.VARIANTS[variant], benchmark.parse_link(link), 3) == steps


@pytest.mark.slow
def test_it_measures_and_draws(tmp_path: Path) -> None:
    model, task, out = save_chat_model(tmp_path / "model"), tmp_path / "piqa", tmp_path / "wire.json"
    task.mkdir()
    with gzip.open(task / "train.jsonl.gz", "wt") as file:
        for number in range(8):
            row = {"prompt": "where is the key?" * (1 + number), "choices": ["no", "in the old house"], "answer": 1}
            file.write(json.dumps(row) + "\n")
    variants = ["naive", "+ length-grouped", "side, bf16, first epoch"]
    sizes = ["--batch", "2", "--steps", "1", "--threads", "1", "--tenants", "2", "--seconds", "1"]
    options = ["--data", str(tmp_path), "--model", str(model), "--links", "2/1000", "--variants", *variants, *sizes]
    subprocess.run([sys.executable, str(PATH), *options, "--out", str(out)], check=True, capture_output=True)
    result = json.loads(out.read_text())
    rows = result["summary"]["2/1000"]
    assert list(rows) == [*variants, "side, later epochs"]
    assert rows["naive"]["bytes_per_token"] > rows["+ length-grouped"]["bytes_per_token"] > 0
    assert rows["side, later epochs"]["bytes_per_token"] == 0
    assert len(result["tenants"]["together"]) == 2
    assert min(result["tenants"]["together"]) > 0
    assert out.with_suffix(".png").stat().st_size > 5000
    more = [*options, "--more", "--seconds", "0", "--variants", "naive", "core, int8, rank 24", "--out", str(out)]
    subprocess.run([sys.executable, str(PATH), *more], check=True, capture_output=True)
    later = json.loads(out.read_text())
    assert later["tenants"] == result["tenants"]
    assert later["runs"][: len(result["runs"])] == result["runs"]
    assert [run["variant"] for run in later["runs"][len(result["runs"]) :]] == ["core, int8, rank 24"]


def test_the_page_shows_the_tables_of_the_results(benchmark) -> None:
    result = json.loads(benchmark.RESULTS.read_text())
    assert benchmark.summarise(result) == {name: result[name] for name in ("summary", "aims")}
    page = (ROOT / "docs" / "wire.md").read_text(encoding="utf-8")
    _, begin, rest = page.partition("<!-- wire: begin -->\n")
    shown, end, _ = rest.partition("\n<!-- wire: end -->")
    assert begin
    assert end
    assert shown == benchmark.tables(result)
