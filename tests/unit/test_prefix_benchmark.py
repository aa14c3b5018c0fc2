"""The figures of shared prefixes: how runs are summed up, that the page shows them, and that the benchmark runs."""

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
from tests.support.scripts import load_script

PATH = ROOT / "benchmarks" / "prefix.py"


@pytest.fixture(scope="module")
def benchmark():
    return load_script(PATH)


def a_run(shared: bool, seconds: float, size: int, tokens: int, loss: float) -> dict[str, Any]:
    taken = {"seconds": seconds, "bytes": size, "tokens": tokens, "losses": [loss, 9.0]}
    return {"variant": "LoRA", "shared": shared, "round": 0, **taken}


def test_runs_are_summed_up_by_hand(benchmark) -> None:
    runs = [
        a_run(False, 10.0, 4_000_000, 400, 2.0),
        a_run(True, 6.0, 1_000_000, 100, 2.001),
        a_run(False, 20.0, 4_000_000, 400, 1.0),
        a_run(True, 10.0, 1_000_000, 100, 1.0),
        a_run(False, 10.0, 4_000_000, 400, 1.0),
        a_run(True, 9.0, 1_000_000, 100, 1.0),
    ]
    setting = {"batch": 8, "tokens_of_an_example": 50.4, "prefix": 30, "rounds": 3, "runs": runs}
    summary = benchmark.summarise(setting)
    assert summary["LoRA"] == {
        "bytes": 0.25,
        "megabytes": [2.0, 0.5],
        "tokens": 0.25,
        "seconds": 0.6,
        "seconds_range": [0.5, 0.9],
        "loss_difference": pytest.approx(0.0005),
    }
    shown = benchmark.table({**setting, "summary": summary})
    assert "8 chats of 50 tokens in the mean a step, of which the first 30 are the same; one thread, 3 rounds:" in shown
    assert "| LoRA | 2.0 | 0.5 | 0.25 | 0.60 (0.50 to 0.90) |" in shown


@pytest.mark.slow
def test_it_measures(tmp_path: Path) -> None:
    model, task, out = save_chat_model(tmp_path / "model"), tmp_path / "piqa", tmp_path / "prefix.json"
    task.mkdir()
    with gzip.open(task / "train.jsonl.gz", "wt") as file:
        for number in range(4):
            row = {"prompt": "where is the key?" * (1 + number % 2), "choices": ["no", "in the house"], "answer": 1}
            file.write(json.dumps(row) + "\n")
    options = ["--data", str(tmp_path), "--model", str(model), "--system", "you are the key"]
    sizes = ["--batch", "4", "--core-rank", "4", "--rounds", "1"]
    subprocess.run([sys.executable, str(PATH), *options, *sizes, "--out", str(out)], check=True, capture_output=True)
    result = json.loads(out.read_text())
    for row in result["summary"].values():
        assert row["bytes"] < 0.9
        assert row["tokens"] < 0.9
        assert row["loss_difference"] < 0.05
        assert row["seconds"] > 0


def test_the_page_shows_the_table_of_the_results(benchmark) -> None:
    result = json.loads(benchmark.RESULTS.read_text())
    assert benchmark.summarise(result) == result["summary"]
    page = (ROOT / "docs" / "wire.md").read_text(encoding="utf-8")
    _, begin, rest = page.partition("<!-- prefix: begin -->\n")
    shown, end, _ = rest.partition("\n<!-- prefix: end -->")
    assert begin
    assert end
    assert shown == benchmark.table(result)
