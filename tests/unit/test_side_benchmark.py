"""The figures of side networks: how runs are summed up, and that the benchmark runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.architecture.source import ROOT
from tests.support.scripts import load_script

PATH = ROOT / "benchmarks" / "side.py"


@pytest.fixture(scope="module")
def benchmark():
    return load_script(PATH)


def a_run(variant: str, seconds: list[float], rss: int, accuracy: float) -> dict[str, Any]:
    """Return a run whose first epoch took more memory, which does not count."""
    return {
        "model": "smollm2",
        "variant": variant,
        "seed": 0,
        "seconds": seconds,
        "rss_bytes": [99_000, *[rss] * (len(seconds) - 1)],
        "gpu_bytes": [],
        "import_bytes": 400,
        "trained": 7,
        "accuracy": accuracy,
    }


def test_aims_are_met_or_missed_by_hand(benchmark) -> None:
    runs = [
        a_run("full", [30.0, 30.0, 30.0], 5400, 0.9),
        a_run("lora", [20.0, 20.0, 20.0], 2400, 0.88),
        a_run("side, cached", [10.0, 1.0, 3.0], 900, 0.871),
    ]
    crossed = {"tokens": 10, "examples": 1, "lora, fp32": {"embedding": 600, "site_input": 400}}
    crossed |= {"side, bf16": {"tap": 100}, "side, fp32, taps of d/8": {"tap": 20, "embedding": 15}}
    found = benchmark.summarise({"runs": runs, "bytes": crossed})
    assert found["shares"] == {"side, bf16": 0.02, "side, fp32, taps of d/8": 0.007}
    aims: dict[str, Any] = {aim["aim"]: (pytest.approx(aim["reached"]), aim["met"]) for aim in found["aims"]}
    assert aims == {
        "a LoRA epoch's time over a cached epoch's": (10.0, True),
        "LoRA's time for all epochs over the cached side's": (60 / 14, True),
        "peak memory of cached epochs, saved of full's": (1 - 900 / 5400, False),
        "peak memory of cached epochs, saved of LoRA's": (1 - 900 / 2400, False),
        "peak memory above the libraries' of cached epochs, saved of full's": (0.9, True),
        "peak memory above the libraries' of cached epochs, saved of LoRA's": (0.75, True),
        "accuracy, of LoRA's less one point": (0.871, True),
        "bytes of side, bf16, of LoRA's over five epochs": (0.02, True),
        "bytes of side, fp32, taps of d/8, of LoRA's over five epochs": (0.007, False),
    }
    assert found["summary"]["smollm2"]["side, cached"]["epoch"] == 2.0
    shown = benchmark.tables({**found, "runs": runs, "bytes": crossed})
    assert "| 1 texts of 10 tokens, each once |" in shown
    assert "| side, cached | 7 | 0.500 | 0.100 | 0.233 | 0 MB | 0 MB | 0.871 |" in shown


@pytest.mark.slow
def test_it_runs_every_variant_in_a_process_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "side.json"
    options = ["--models", "tiny-t5", "--pairs", "4", "--epochs", "2", "--threads", "1", "--out", str(out)]
    subprocess.run([sys.executable, str(PATH), *options], check=True, capture_output=True)
    result = json.loads(out.read_text())
    assert [run["variant"] for run in result["runs"]] == ["full", "lora", "side", "side, cached"]
    assert all(len(run["seconds"]) == len(run["rss_bytes"]) == 2 for run in result["runs"])
    assert all(0 < run["import_bytes"] < min(run["rss_bytes"]) for run in result["runs"])
    assert result["aims"]


def test_the_page_shows_the_tables_of_the_results(benchmark) -> None:
    result = json.loads(benchmark.RESULTS.read_text())
    assert benchmark.summarise(result) == {name: result[name] for name in ("summary", "shares", "aims")}
    page = (ROOT / "docs" / "side.md").read_text(encoding="utf-8")
    _, begin, rest = page.partition("<!-- side: begin -->\n")
    shown, end, _ = rest.partition("\n<!-- side: end -->")
    assert begin
    assert end
    assert shown == benchmark.tables(result)
