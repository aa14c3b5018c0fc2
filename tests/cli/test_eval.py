"""`tidelock eval`, and `train --task` with what follows it: measured, exported, loaded elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import tidelock
from tests.cli.conftest import CloudAccess
from tidelock.cli.main import run
from tidelock.errors import CheckpointError, ConfigError, DataError

Capture = pytest.CaptureFixture[str]
WORDS = ("house", "lake", "key")
LEARN = ("--learning-rate", "0.02", "--max-steps", "40", "--batch-size", "4", "--threads", "1")


def tide(*args: object) -> int:
    return run([str(arg) for arg in args])


def row(number: int, label: int) -> dict[str, Any]:
    held_out = number >= 4
    return {"text_a": f"where is {number}", "text_b": f"the {WORDS[label]}", "label": label,
            "split": "held_out" if held_out else "train"}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return labelled pairs, 12 to learn from and 6 held out."""
    path = tmp_path_factory.mktemp("data") / "places.jsonl"
    path.write_text("".join(json.dumps(row(number, label)) + "\n" for number in range(6) for label in range(3)))
    return path


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, chat_model: Path, places: Path, cloud_access: CloudAccess
) -> Path:
    """Return the folder of a classifier that was trained through the cloud."""
    out = tmp_path_factory.mktemp("finished") / "run"
    task = ("--task", "classification", "--split", "train", "--eval-split", "held_out", "--model", chat_model)
    assert tide("train", places, "--out", out, *task, *LEARN, *cloud_access.options(), "--json") == 0
    return out


def measured(capsys: Capture, *args: object) -> dict[str, Any]:
    capsys.readouterr()
    assert tide("eval", *args, "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    values: dict[str, Any] = json.loads(line)
    return values


def test_a_classifier_is_measured(capsys: Capture, finished: Path, places: Path) -> None:
    values = measured(capsys, finished, "--data", places, "--split", "held_out")
    assert (values["event"], values["task"], values["examples"], values["labels"]) == (
        "evaluated",
        "classification",
        6,
        6,
    )
    assert values["metrics"].keys() == {"loss", "accuracy", "matthews"}
    assert values["metrics"]["accuracy"] > 0.8
    assert tide("eval", finished, "--data", places) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{places}: 18 examples"
    assert [line.split()[0] for line in lines[1:]] == ["loss", "accuracy", "matthews"]


def test_training_and_measuring_agree(capsys: Capture, finished: Path, places: Path) -> None:
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "eval_loss" in row][-1]
    metrics = measured(capsys, finished, "--data", places, "--split", "held_out")["metrics"]
    assert metrics == pytest.approx({name: last[f"eval_{name}"] for name in metrics}, rel=1e-4)


def test_a_cloud_elsewhere_measures_the_same(
    capsys: Capture, finished: Path, places: Path, cloud_access: CloudAccess, chat_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "here"
    task = ("--task", "classification", "--model", chat_model, "--max-steps", 1, "--threads", 1, "--json")
    assert tide("train", places, "--out", out, *task, "--adapter", finished / "adapter", "--learning-rate", 1e-12) == 0
    here = measured(capsys, out, "--data", places)
    there = measured(capsys, out, "--data", places, *cloud_access.options(backbone=None))
    # Two micro-batches in flight there, and one here.
    assert there.pop("metrics") == pytest.approx(here["metrics"], rel=1e-4)
    assert there == {name: value for name, value in here.items() if name != "metrics"}
    assert here["metrics"]["accuracy"] > 0.8


def test_a_language_model_is_measured(capsys: Capture, chat_model: Path, facts: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert tide("train", facts, "--split", "train", "--model", chat_model, "--out", out, *LEARN, "--json") == 0
    values = measured(capsys, out, "--data", facts, "--split", "held_out")
    assert (values["task"], values["examples"]) == ("causal-lm", 2)
    assert values["labels"] > 2
    assert values["metrics"]["perplexity"] == pytest.approx(torch.tensor(values["metrics"]["loss"]).exp().item())


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_an_exported_classifier_classifies_elsewhere(
    capsys: Capture, finished: Path, chat_model: Path, tmp_path: Path, form: str
) -> None:
    capsys.readouterr()
    assert tide("export", finished, tmp_path / form, "--to", form, "--model", chat_model) == 0
    shown = capsys.readouterr()
    assert "AutoModelForSequenceClassification.from_pretrained(" in shown.out
    assert "MISSING" not in shown.err
    if form == "peft":
        assert ", num_labels=3)" in shown.out
        model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / form, num_labels=3)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / form)
        assert model.config.num_labels == 3
    assert classes(model, chat_model) == [0, 1, 2]


def classes(model: Any, chat_model: Path) -> list[int]:
    """Return what a model takes the held-out pairs for, one at a time, so that no padding is needed."""
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    texts = [f"{pair['text_a']}\n{pair['text_b']}" for pair in (row(5, label) for label in range(3))]
    with torch.no_grad():
        return [int(model.eval()(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]


def test_a_serial_adapter_with_a_head_classifies_elsewhere(
    capsys: Capture, chat_model: Path, places: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    task = ("--task", "classification", "--split", "train", "--method", "adapter", "--bottleneck", 16)
    assert tide("train", places, "--model", chat_model, "--out", out, *task, *LEARN, "--json") == 0
    capsys.readouterr()
    assert tide("export", out, tmp_path / "out", "--to", "adapter", "--model", chat_model) == 0
    line = (
        f'tidelock.attach_adapter(AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=3), "{tmp_path}'
    )
    assert line in capsys.readouterr().out
    model = AutoModelForSequenceClassification.from_pretrained(chat_model, num_labels=3, dtype=torch.float32)
    tidelock.attach_adapter(model, tmp_path / "out")
    assert classes(model, chat_model) == [0, 1, 2]


def test_what_does_not_fit_the_task_is_refused(
    capsys: Capture, finished: Path, facts: Path, chat_model: Path, places: Path, tmp_path: Path
) -> None:
    for args, code, said in (
        (("eval", finished, "--data", facts), DataError.exit_code, "expected a text with a label"),
        (("generate", finished, "--prompt", "hi"), ConfigError.exit_code, "expected a run with --task causal-lm"),
        (("eval", tmp_path, "--data", facts), CheckpointError.exit_code, "expected one with a run.toml"),
        (
            ("train", places, "--model", chat_model, "--out", tmp_path / "a", "--num-labels", 3),
            ConfigError.exit_code,
            "--num-labels: expected it with --task classification only",
        ),
        (
            ("train", places, "--model", chat_model, "--out", tmp_path / "a", "--task", "classification",
             "--num-labels", 2),
            DataError.exit_code,
            "'label': expected a class from 0 to 1, got another number (places.jsonl:3)",
        ),
    ):  # fmt: skip
        capsys.readouterr()
        assert tide(*args) == code
        assert said in capsys.readouterr().err
    assert not (tmp_path / "a" / "run.toml").exists()
