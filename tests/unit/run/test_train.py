from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tests.support.run_folder import new_run_folder
from tests.support.sites import attn
from tests.unit.run.conftest import Notes
from tidelock.backbone.local import LocalBackbone
from tidelock.data.batch import Collator
from tidelock.device.model import DeviceModel
from tidelock.errors import ConfigError, DataError
from tidelock.run.folder import RunFolder
from tidelock.run.open_model import load_tokenizer, open_model
from tidelock.run.train import train
from tidelock.wire.ledger import Kind, Ledger


def metrics(config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_a_run_folder_holds(make_config, notes: Notes) -> None:
    config = make_config(threads=1)
    result = train(config, notes)
    rows = metrics(config)
    assert result.steps == 4
    assert result.loss == [row["loss"] for row in rows if "loss" in row][-1]
    assert result.eval_loss == [row["eval_loss"] for row in rows if "eval_loss" in row][-1]
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 4]
    assert result.traffic_bytes == {"sent": {}, "received": {}}
    assert not result.interrupted
    assert result.adapter == Path(config.out) / "adapter"
    assert RunFolder.open(Path(config.out)).config() == config
    assert notes.began == (4, 0)
    assert notes.steps == [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert notes.finished == 1
    assert notes.said[0].startswith("Model: llama, 3 blocks, 960 trained parameters in 3 PEFT modules")
    assert notes.said[1:] == ["Data: 4 examples to learn from, 4 to measure on."]


def test_steps_are_told_where_no_loss_is_logged_too(make_config, notes: Notes) -> None:
    train(make_config(log_every=3), notes)
    assert [step for step, _ in notes.steps] == [1, 2, 3, 4]
    first, second, third, fourth = (loss for _, loss in notes.steps)
    assert first is second is None
    assert third == fourth is not None


@pytest.mark.parametrize(
    ("knobs", "evaluated"),
    [({"eval_every": 3}, [3, 4]), ({"max_steps": 3}, [2, 3]), ({"accumulate": 2}, [1, 2]), ({"epochs": 0.5}, [1])],
)
def test_it_is_measured_in_time_and_at_the_end(make_config, notes: Notes, knobs, evaluated: list[int]) -> None:
    config = make_config(**knobs)
    train(config, notes)
    assert [row["step"] for row in metrics(config) if "eval_loss" in row] == evaluated


def test_what_training_draws_does_not_depend_on_evaluations(make_config, notes: Notes) -> None:
    often, never = make_config("often", eval_every=1), replace(make_config("never"), eval_data=None)
    losses = []
    for config in (often, never):
        result = train(config, notes)
        losses.append([row["loss"] for row in metrics(config) if "loss" in row])
        assert (result.eval_loss is None) == (config is never)
    assert losses[0] == losses[1]


def test_the_seed_decides(make_config, notes: Notes) -> None:
    configs = [make_config("a", seed=1), make_config("b", seed=1), make_config("c", seed=2)]
    adapters = [(train(config, notes).adapter / "adapter_model.safetensors").read_bytes() for config in configs]
    assert adapters[0] == adapters[1] != adapters[2]


def test_batches_of_like_length_have_less_padding(make_config, notes: Notes, tmp_path: Path, monkeypatch) -> None:
    asked = ["what? ", "where is the key of the box in the hall of the house? "]
    rows = [{"prompt": asked[number % 2], "completion": f"box {number}"} for number in range(32)]
    data = tmp_path / "lengths.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    masks: list[torch.Tensor] = []
    collate = Collator.__call__

    def noted(self, found):
        batch = collate(self, found)
        masks.append(batch["attention_mask"])
        return batch

    monkeypatch.setattr(Collator, "__call__", noted)
    padding = []
    for grouped in (False, True):
        masks.clear()
        config = make_config(f"grouped-{grouped}", epochs=1, length_grouped=grouped)
        train(replace(config, data=str(data), eval_data=None), notes)
        assert len(masks) == 16
        padding.append(sum(int((mask == 0).sum()) for mask in masks))
    assert padding[1] < padding[0] / 2


def test_a_shared_prefix_is_computed_once_unless_told_otherwise(make_config, notes: Notes, monkeypatch, tmp_path):
    data, shared = tmp_path / "shared.jsonl", []
    rows = [{"prompt": f"Answer with one word. {word}?", "completion": " yes"} for word in ("one", "two", "three", "x")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def noted(self, batch, sites):
        shared.append(batch.rows.shared)
        return forward(self, batch, sites)

    forward = LocalBackbone.forward
    monkeypatch.setattr(LocalBackbone, "forward", noted)
    for apart in (False, True):
        config = make_config(f"apart-{apart}", epochs=1, dropout=0.0, no_share_prefix=apart)
        train(replace(config, data=str(data), eval_data=None), notes)
    half = len(shared) // 2
    assert min(shared[:half]) >= len("Answer with one word. ") / 4
    assert set(shared[half:]) == {0}


def test_checkpoints_are_kept_as_told(make_config, notes: Notes) -> None:
    config = make_config(save_every=1, keep=3)
    train(config, notes)
    names = sorted(path.name for path in (Path(config.out) / "checkpoints").iterdir())
    assert names == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_a_run_begins_only_when_there_is_something_to_learn(make_config, notes: Notes) -> None:
    config = make_config()
    with pytest.raises(DataError):
        train(replace(config, data="gone.jsonl"), notes)
    assert train(config, notes).steps == 4
    with pytest.raises(ConfigError, match="got one with a run in it"):
        train(config, notes)


def test_resuming_a_run_that_has_no_checkpoint_begins_again(make_config, notes: Notes) -> None:
    config = make_config()
    folder = new_run_folder(config)
    folder.append_metrics({"step": 1, "loss": 99.0})
    earlier = Ledger()
    earlier.sent(Kind.EMBEDDING, 7)
    folder.write_ledger(earlier)
    result = train(config, notes, resume=True)
    assert "Going on from the beginning: there is no whole checkpoint yet." in notes.said
    assert [row["step"] for row in metrics(config) if "loss" in row] == [1, 2, 3, 4]
    assert result.traffic_bytes["sent"] == {"embedding": 7}


def test_the_adapter_trained_is_the_one_asked_for(make_config, notes: Notes) -> None:
    knobs = {"rank": 3, "alpha": 5.0, "rslora": True, "target": ["q_proj"], "layer": [0, 2]}
    model = open_model(make_config(**knobs), Ledger())
    assert isinstance(model, DeviceModel)
    assert isinstance(model.peft_config, LoraConfig)
    assert (model.peft_config.r, model.peft_config.lora_alpha, model.peft_config.use_rslora) == (3, 5.0, True)
    assert model.bank.targets == {attn(0): ("q_proj",), attn(2): ("q_proj",)}


def test_threads_are_set(make_config, notes: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    train(make_config(threads=1, max_steps=1), notes)
    assert asked == [1]


@pytest.mark.parametrize("name", ["client_cert", "client_key"])
def test_half_a_client_certificate_is_refused(make_config, name: str) -> None:
    config = make_config(backbone="cloud", cloud="grpcs://127.0.0.1:1", **{name: "device.pem"})
    with pytest.raises(ConfigError, match="got only one of them"):
        open_model(config, Ledger())


def test_a_token_file_that_is_no_text_is_refused(make_config, tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"\xff")
    config = make_config(backbone="cloud", cloud="grpcs://127.0.0.1:1", token_file=str(tmp_path / "token"))
    with pytest.raises(ConfigError, match="--token-file: expected a readable text file, got UnicodeDecodeError"):
        open_model(config, Ledger())


def test_a_tokenizer_that_cannot_be_read_is_named(make_config, chat_model: Path) -> None:
    model = open_model(make_config(), Ledger())
    assert load_tokenizer(model.ends.folder).chat_template
    tokenizer = chat_model / "tokenizer.json"
    good = tokenizer.read_text()
    try:
        tokenizer.write_text("{}")
        with pytest.raises(ConfigError, match="expected one beside the model's configuration"):
            load_tokenizer(model.ends.folder)
    finally:
        tokenizer.write_text(good)


def test_an_adapter_is_continued_from_where_it_was(make_config, notes: Notes) -> None:
    first = train(make_config("first", rank=3), notes)
    model = open_model(make_config("second", adapter=str(first.adapter)), Ledger())
    assert isinstance(model.peft_config, LoraConfig)
    assert model.peft_config.r == 3
    assert any(bool(parameter.any()) for name, parameter in model.named_parameters() if "lora_B" in name)


def test_metrics_say_where_the_time_of_steps_went(make_config, notes: Notes) -> None:
    config = make_config()
    train(config, notes)
    rows = [row["seconds"] for row in metrics(config) if "loss" in row]
    assert len(rows) == 4
    for row in rows:
        assert row.keys() == {"device", "cloud", "waiting", "wire"}
        # All is this process's own computing.
        assert row["device"] > 0
        assert row["cloud"] == row["waiting"] == row["wire"] == 0
