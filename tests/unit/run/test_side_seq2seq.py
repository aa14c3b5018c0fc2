"""Runs with a side network beside an encoder-decoder: text to text, and labels of whole texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

import tidelock
from tests.support.answer_model import save_answer_model
from tests.unit.run.conftest import Notes
from tests.unit.run.test_side import Tracker, adapter_bytes, losses
from tidelock.device.generate import GenerationSettings
from tidelock.errors import ConfigError, DataError, ModelError
from tidelock.run.cache_ahead import Cached, cache_ahead
from tidelock.run.config import RunConfig
from tidelock.run.evaluate import evaluate
from tidelock.run.export import ExportOrder, export, how_to_load
from tidelock.run.folder import RunFolder
from tidelock.run.generate import complete, open_trained, raw_prompt
from tidelock.run.open_model import load_tokenizer
from tidelock.run.train import train

MakeConfig = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def answer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_answer_model(tmp_path_factory.mktemp("answer") / "model")


@pytest.fixture
def side_config(make_config: MakeConfig, answer_model: Path, tmp_path: Path) -> MakeConfig:
    """Return a function that makes the configuration of a short run beside the encoder-decoder."""

    def make(name: str = "run", **knobs: object) -> RunConfig:
        settings: dict[str, object] = {"rank": 8, "dropout": 0.0, "epochs": 3, "learning_rate": 0.01, "threads": 1}
        settings |= {"model": str(answer_model), "task": "text-to-text", "reduction": 2}
        if not knobs.get("no_cache"):
            settings["cache_key"] = str(tmp_path / "cache.key")
        return make_config(name, method="side", **{**settings, **knobs})

    return make


@pytest.fixture
def labelled(tmp_path: Path) -> str:
    path = tmp_path / "labelled.jsonl"
    rows = [{"text_a": f"where is key {number}?", "label": number % 3} for number in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_it_learns_to_answer_and_never_runs_the_blocks_again(side_config: MakeConfig, notes: Notes) -> None:
    config = side_config(epochs=40)
    result = train(config, notes)
    model_line, data, cache, let_go = notes.said
    assert model_line.startswith("Model: t5, 3 and 2 blocks, ")
    assert " trained parameters in a side network beside 5 of them on this device." in model_line
    assert data == "Data: 4 examples to learn from, 4 to measure on."
    assert cache.startswith("Activation cache: 0 of 4 examples are in it; the others take ")
    assert let_go.startswith("All taps are cached; the frozen blocks are let go.")
    folder = RunFolder.open(Path(config.out))
    measured = evaluate(folder, config, config.data, None, Tracker)
    assert measured.metrics["loss"] == pytest.approx(result.eval_loss, rel=1e-5)
    assert measured.labels == sum(len(ids) for ids in _targets(config))
    assert measured.metrics["exact_match"] == 1
    model = open_trained(folder, config)
    tokenizer = load_tokenizer(model.ends.folder)
    prompts = [raw_prompt(tokenizer, f"where is key {number}? ") for number in (1, 2)]
    assert complete(model, tokenizer, prompts, GenerationSettings(max_new_tokens=12)) == ["in the box"] * 2
    model.close()


def _targets(config: RunConfig) -> list[list[int]]:
    assert config.model is not None
    rows = [json.loads(line) for line in Path(config.data).read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    return [[*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id] for row in rows]


@pytest.mark.parametrize("init", ["magnitude", "fisher"])
def test_with_a_cache_it_learns_what_it_learns_without_one(side_config: MakeConfig, notes: Notes, init: str) -> None:
    cached, plain = side_config("cached", side_init=init), side_config("plain", side_init=init, no_cache=True)
    for config in (cached, plain):
        train(config, notes)
    assert adapter_bytes(cached) == adapter_bytes(plain)
    assert losses(cached) == losses(plain)


def test_its_cache_can_be_filled_before(side_config: MakeConfig, notes: Notes, tmp_path: Path) -> None:
    config = side_config(cache=str(tmp_path / "taps"), side_init="random")
    assert cache_ahead(config, notes.say, Tracker) == Cached(examples=4, computed=4)
    train(config, notes)
    assert notes.said[-1].startswith("Activation cache: 4 of 4 examples are in it; the others take 0 B.")


def test_what_it_exports_answers_on_an_ordinary_model(
    side_config: MakeConfig, notes: Notes, tmp_path: Path, answer_model: Path
) -> None:
    config = side_config(epochs=40)
    train(config, notes)
    order = ExportOrder(Path(config.out), "adapter", tmp_path / "out", model=str(answer_model))
    export(order, notes.say)
    assert how_to_load(order) == (
        f'model = AutoModelForSeq2SeqLM.from_pretrained(MODEL); tidelock.attach_side(model, "{tmp_path / "out"}")'
    )
    model = AutoModelForSeq2SeqLM.from_pretrained(answer_model)
    tidelock.attach_side(model, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(answer_model)
    ids = torch.tensor([tokenizer("where is key 1? ")["input_ids"]])
    answer = model.generate(ids, max_new_tokens=12)[0]
    assert str(tokenizer.decode(answer[1:], skip_special_tokens=True)).strip() == "in the box"


def test_labels_of_whole_texts(
    side_config: MakeConfig, notes: Notes, labelled: str, tmp_path: Path, answer_model: Path
) -> None:
    made = side_config(task="classification", epochs=60)
    config = replace(made, data=labelled, eval_data=labelled)
    result = train(config, notes)
    assert result.eval_metrics["accuracy"] == 1
    assert " and a head of 3 on this device." in notes.said[0]
    order = ExportOrder(Path(config.out), "adapter", tmp_path / "out", model=str(answer_model))
    export(order, notes.say)
    assert "AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=3)" in how_to_load(order)
    model = AutoModelForSequenceClassification.from_pretrained(answer_model, num_labels=3)
    tidelock.attach_side(model, tmp_path / "out")
    folder = RunFolder.open(Path(config.out))
    measured = evaluate(folder, folder.config(), labelled, None, Tracker)
    assert measured.metrics["accuracy"] == 1


def test_what_does_not_go_together_is_refused(
    side_config: MakeConfig, make_config: MakeConfig, notes: Notes, labelled: str, chat_model: Path
) -> None:
    with pytest.raises(ConfigError, match="expected text-to-text, classification or regression of an encoder-decoder"):
        train(side_config(task="causal-lm"), notes)
    with pytest.raises(ConfigError, match="expected causal-lm, classification or regression of a decoder"):
        train(side_config(model=str(chat_model)), notes)
    with pytest.raises(DataError, match="expected a source and a target"):
        train(replace(side_config(), data=labelled, eval_data=None), notes)
    with pytest.raises(ModelError, match="expected a decoder, got an encoder-decoder"):
        train(make_config(model=side_config().model), notes)
    with pytest.raises(ConfigError, match="tap_width: expected None beside an encoder-decoder"):
        train(side_config(tap_width=4), notes)
    assert not (Path(side_config().out) / "run.toml").exists()
