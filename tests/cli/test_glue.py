"""A few steps of real GLUE tasks, from their files to what GLUE measures, where the data is."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from tidelock.cli.main import run

MEASURES = {
    "sst2": ("classification", {"accuracy", "matthews", "f1", "mean_of_accuracy_and_f1"}),
    "mrpc": ("classification", {"accuracy", "matthews", "f1", "mean_of_accuracy_and_f1"}),
    "stsb": ("regression", {"pearson", "spearman", "mean_of_pearson_and_spearman"}),
}


def first_rows(path: Path, count: int) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in itertools.islice(file, count)]


@pytest.mark.parametrize("task", MEASURES)
def test_a_few_steps_of_a_glue_task(
    task_data: Path, chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    kind, measures = MEASURES[task]
    for split in ("train", "test"):
        rows = first_rows(task_data / task / f"{split}.jsonl.gz", 48)
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["--task", kind, "--model", chat_model, "--truncate", "--max-steps", 6, "--threads", 1, "--json"]
    data = [tmp_path / "train.jsonl", "--eval-data", tmp_path / "test.jsonl", "--out", tmp_path / "run"]
    assert run(["train", *map(str, [*data, *args])]) == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert done["eval_metrics"].keys() == measures
    assert run(["eval", str(tmp_path / "run"), "--data", str(tmp_path / "test.jsonl"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["examples"] == found["labels"] == 48
    assert found["metrics"] == pytest.approx({"loss": done["eval_loss"], **done["eval_metrics"]}, rel=1e-4, abs=1e-6)
