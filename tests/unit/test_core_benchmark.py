"""The figures of cores: how runs are summed up, that the benchmark runs, and that the page shows what was measured."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.architecture.source import ROOT
from tests.support.chat_model import save_chat_model
from tests.support.scripts import load_script
from tidelock.peft.core import CoreConfig
from tidelock.run.config import RunConfig

ROWS: dict[str, dict[str, Any]] = {
    "sst2": {"text_a": "a house by the lake", "label": 1},
    "stsb": {"text_a": "a house", "text_b": "the house", "label": 3.2},
    "arc_easy": {"prompt": "Where is it?\nAnswer:", "choices": ["by the lake", "in the old house"], "answer": 0},
}


@pytest.fixture(scope="module")
def benchmark():
    return load_script(ROOT / "benchmarks" / "core.py")


def a_run(variant: str, frames: str | None, seed: int, score: float, task: str = "sst2") -> dict[str, Any]:
    shared = {"loss": 1 - score, "train_loss": 0.5, "parameters": 4000}
    return {"variant": variant, "frames": frames, "seed": seed, "task": task, "score": score, **shared}


def test_aims_are_met_or_missed_by_hand(benchmark) -> None:
    runs = [
        *(a_run("lora", None, seed, score) for seed, score in enumerate((0.5, 0.7))),
        *(a_run("near", "seeded", seed, score) for seed, score in enumerate((0.45, 0.5))),
        *(a_run("far", "svd", seed, score) for seed, score in enumerate((0.4, 0.5))),
        # Once only: no aim is looked at for it.
        a_run("tried", "svd", 0, 0.9),
        a_run("lora", None, 0, 0.5, "stsb"),
        a_run("near", "seeded", 0, 0.1, "stsb"),
    ]
    found = benchmark.summarise(runs)
    wanted = pytest.approx(0.6 - 0.02**0.5)
    assert found["aims"] == [
        {"task": "sst2", "variant": name, "against": "lora", "wanted": wanted, "reached": reached, "met": met}
        for name, reached, met in (("near", pytest.approx(0.475), True), ("far", pytest.approx(0.45), False))
    ]
    shown = benchmark.tables(found)
    assert "| lora | 4,000 | 0.600 (0.141), loss 0.400 (0.141), 2 seeds | 0.500, loss 0.500 | |" in shown
    assert "| `sst2`, near | lora | 0.459 | 0.475 | met |" in shown


def test_it_runs_what_is_missing(benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for task, row in ROWS.items():
        (tmp_path / task).mkdir()
        for split in ("train", "test"):
            content = "\n".join(json.dumps({"id": f"{number}", **row}) for number in range(5))
            (tmp_path / task / f"{split}.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    out, threads = tmp_path / "core.json", torch.get_num_threads()
    sizes = ["--examples", "4", "--tests", "4", "--longest", "160", "--epochs", "1", "--seeds", "0", "1"]
    folder = save_chat_model(tmp_path / "model")
    monkeypatch.setattr(
        sys, "argv", ["core", "--data", str(tmp_path), "--model", str(folder), "--out", str(out), *sizes]
    )
    lora, core = benchmark._lora(1e-3), benchmark.Variant("svd", 4, 16.0, 1e-3)
    monkeypatch.setattr(benchmark, "SCREEN", (core,))
    monkeypatch.setattr(benchmark, "FINAL", (lora,))
    try:
        benchmark.main()
        first = json.loads(out.read_text())["runs"]
        monkeypatch.setattr(benchmark, "SCREEN", (core, lora))
        benchmark.main()
    finally:
        torch.set_num_threads(threads)
    runs = json.loads(out.read_text())["runs"]
    assert runs[: len(first)] == first
    assert [(run["variant"], run["seed"], run["task"]) for run in runs] == [
        *((core.name, 0, task) for task in benchmark.TASKS),
        *((lora.name, 1, task) for task in benchmark.TASKS),
        *((lora.name, 0, task) for task in benchmark.TASKS),
    ]


def test_the_page_shows_the_tables_of_the_results(benchmark) -> None:
    result = json.loads(benchmark.RESULTS.read_text())
    assert benchmark.summarise(result["runs"]) == {name: result[name] for name in ("summary", "aims")}
    page = (ROOT / "docs" / "core.md").read_text(encoding="utf-8")
    _, begin, rest = page.partition("<!-- core: begin -->\n")
    shown, end, _ = rest.partition("\n<!-- core: end -->")
    assert begin
    assert end
    assert shown == benchmark.tables(result)
    assert f"takes {result['svd_cpu_seconds']:.1f} seconds of one CPU" in " ".join(page.split())


def test_the_defaults_are_what_was_measured(benchmark) -> None:
    *_, core = benchmark.FINAL
    assert core.config() == CoreConfig()
    knobs = {name: knob.default for name, knob in RunConfig.__dataclass_fields__.items()}
    assert (knobs["core_rank"], knobs["core_scale"], knobs["core_frames"]) == (core.rank, core.scale, core.frames)
