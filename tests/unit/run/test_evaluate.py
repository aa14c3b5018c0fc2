from __future__ import annotations

import json
import math
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.run.conftest import Notes
from tidelock.data.batch import Collator
from tidelock.data.source import read_examples
from tidelock.errors import CheckpointError, DataError
from tidelock.run.evaluate import evaluate, measure
from tidelock.run.examples import encode_examples
from tidelock.run.folder import RunFolder
from tidelock.run.generate import open_trained
from tidelock.run.open_model import load_tokenizer, open_model
from tidelock.run.train import train
from tidelock.wire.ledger import Ledger

REVIEWS = [{"text_a": f"the {word} {number}", "label": label} for number in range(6) for label, word in
           enumerate(("house", "lake", "key"))]  # fmt: skip
NUMBERS = [{"text_a": "the house", "text_b": "by the lake " * number, "label": number / 2} for number in range(6)]


class Tracked:
    """Notes what an evaluation tells."""

    def __init__(self) -> None:
        self.total = self.done = 0

    @contextmanager
    def __call__(self, total: int):
        self.total = total
        yield self

    def advance(self, n: int = 1) -> None:
        self.done += n


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def reviews(tmp_path: Path) -> str:
    return write(tmp_path / "reviews.jsonl", REVIEWS)


@pytest.fixture
def numbers(tmp_path: Path) -> str:
    return write(tmp_path / "numbers.jsonl", NUMBERS)


def test_language_modelling_is_measured_by_token(make_config, notes: Notes, tmp_path: Path) -> None:
    config = make_config()
    train(config, notes)
    rows = [{"prompt": "a ", "completion": "house"}, {"text": "the old house by the lake"}, {"text": "user"}]
    data, tracked = write(tmp_path / "more.jsonl", rows), Tracked()
    found = evaluate(RunFolder.open(Path(config.out)), config, data, None, tracked)
    assert (tracked.total, tracked.done) == (3, 3)
    model = open_trained(RunFolder.open(Path(config.out)), config).eval()
    encoded = encode_examples(config, model, load_tokenizer(model.ends.folder), read_examples(data))
    with torch.no_grad():
        # All in one batch, whose mean is over its tokens.
        expected = float(model(**Collator(0)(encoded)).loss)
    assert found.metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert (found.examples, found.labels) == (
        3,
        sum(label != -100 for row in encoded if "labels" in row for label in row["labels"][1:]),
    )


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_what_is_measured_does_not_depend_on_batches(make_config, reviews: str, batch_size: int) -> None:
    config = make_config(task="classification", num_labels=3)
    torch.manual_seed(3)
    model = open_model(config, Ledger())
    rows = encode_examples(config, model, load_tokenizer(model.ends.folder), read_examples(reviews))
    whole, found = measure(model, rows, 18, Tracked()), measure(model, rows, batch_size, Tracked())
    assert found.metrics == pytest.approx(whole.metrics, rel=1e-5)
    assert (found.examples, found.labels) == (18, 18)


def test_a_classifier_learns_and_its_metrics_are_in_the_journal(make_config, notes: Notes, reviews: str) -> None:
    config = replace(make_config(task="classification", epochs=20, learning_rate=2e-2), data=reviews, eval_data=reviews)
    result = train(config, notes)
    folder = RunFolder.open(Path(config.out))
    assert folder.config() == replace(config, num_labels=3)
    assert notes.said[0].endswith("trained parameters in 3 PEFT modules and a head of 3 on this device.")
    found = evaluate(folder, folder.config(), reviews, None, Tracked())
    assert found.metrics["accuracy"] > 0.9
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    measured = [row for row in rows if "eval_loss" in row]
    assert result.eval_metrics == {"accuracy": measured[-1]["eval_accuracy"], "matthews": measured[-1]["eval_matthews"]}
    assert found.metrics == pytest.approx({"loss": result.eval_loss, **result.eval_metrics}, rel=1e-4)
    assert measured[0]["eval_accuracy"] < measured[-1]["eval_accuracy"]
    facts = json.loads(folder.facts.read_text())
    assert facts["train"] == {"examples": 18, "tokens": facts["train"]["tokens"], "labelled": 18}


def test_a_number_is_learned(make_config, notes: Notes, numbers: str) -> None:
    config = replace(
        make_config(task="regression", method="adapter", rank=8, epochs=30, learning_rate=1e-2),
        data=numbers, eval_data=numbers,
    )  # fmt: skip
    result = train(config, notes)
    folder = RunFolder.open(Path(config.out))
    assert folder.config() == config
    found = evaluate(folder, folder.config(), numbers, None, Tracked())
    assert found.metrics["pearson"] > 0.9
    assert result.eval_metrics.keys() == {"pearson", "spearman", "mean_of_pearson_and_spearman"}
    assert found.metrics == pytest.approx({"loss": result.eval_loss, **result.eval_metrics}, rel=1e-4)


def test_data_of_another_task_is_refused(make_config, notes: Notes, reviews: str, numbers: str) -> None:
    config = replace(make_config(task="classification", max_steps=1), data=reviews, eval_data=None)
    train(config, notes)
    folder = RunFolder.open(Path(config.out))
    text = make_config().data
    for data, said in ((numbers, "expected a whole number for a class"), (text, "expected a text with a label")):
        with pytest.raises(DataError, match=said):
            evaluate(folder, folder.config(), data, None, Tracked())
    for task, data in (("causal-lm", reviews), ("regression", text), ("classification", numbers)):
        with pytest.raises(DataError):
            train(replace(make_config(f"to-{task}", task=task), data=data, eval_data=None), notes)
        assert not (Path(make_config(f"to-{task}").out) / "run.toml").exists()


def test_classes_of_the_evaluation_data_count_too(make_config, notes: Notes, tmp_path: Path, reviews: str) -> None:
    two = write(tmp_path / "two.jsonl", [row for row in REVIEWS if row["label"] != 2])
    config = replace(make_config(task="classification", max_steps=1), data=two, eval_data=reviews)
    train(config, notes)
    assert RunFolder.open(Path(config.out)).config().num_labels == 3
    given = replace(make_config("given", task="classification", max_steps=1, num_labels=5), data=two, eval_data=None)
    train(given, notes)
    assert RunFolder.open(Path(given.out)).config().num_labels == 5


def test_a_run_without_an_adapter_has_nothing_to_measure(make_config) -> None:
    config = make_config()
    folder = RunFolder.new(Path(config.out))
    folder.write_config(config)
    with pytest.raises(CheckpointError, match="expected a trained adapter in it, got none"):
        evaluate(folder, config, config.data, None, Tracked())
