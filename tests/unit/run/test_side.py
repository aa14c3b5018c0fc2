"""A run with a side network: its cache, its start, what it lets go of, and what it is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.run.conftest import Notes
from tidelock.device.generate import GenerationSettings
from tidelock.device.side_model import SideModel
from tidelock.errors import CheckpointError, ConfigError, StorageError
from tidelock.run.cache_ahead import Cached, cache_ahead
from tidelock.run.config import RunConfig
from tidelock.run.connect_side import _LocalBlocks
from tidelock.run.evaluate import evaluate
from tidelock.run.folder import RunFolder
from tidelock.run.generate import complete, open_trained, raw_prompt
from tidelock.run.open_model import load_tokenizer, open_model
from tidelock.run.train import train
from tidelock.wire.ledger import Ledger

MakeConfig = Callable[..., RunConfig]
PLAIN = RunConfig(data="facts.jsonl", out="run", model="m")


@pytest.fixture
def side_config(make_config: MakeConfig, tmp_path: Path) -> MakeConfig:
    """Return a function that makes the configuration of a short run with a side network, in three epochs."""

    def make(name: str = "run", **knobs: object) -> RunConfig:
        settings: dict[str, object] = {"rank": 8, "dropout": 0.0, "epochs": 3, "learning_rate": 0.01, "threads": 1}
        if not knobs.get("no_cache"):
            settings["cache_key"] = str(tmp_path / "cache.key")
        return make_config(name, method="side", **{"reduction": 2, **settings, **knobs})

    return make


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows when the frozen blocks are loaded."""
    loads: list[str] = []
    load = _LocalBlocks.__call__

    def counted(blocks: _LocalBlocks) -> Any:
        loads.append(blocks.fingerprint)
        return load(blocks)

    monkeypatch.setattr(_LocalBlocks, "__call__", counted)
    return loads


class Tracker:
    """Shows nothing; counts."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.done == self.total

    def advance(self, count: int = 1) -> None:
        self.done += count


def adapter_bytes(config: RunConfig) -> bytes:
    return (Path(config.out) / "adapter" / "adapter_model.safetensors").read_bytes()


def losses(config: RunConfig) -> list[tuple[int, float | None, float | None]]:
    rows = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row.get("loss"), row.get("eval_loss")) for row in rows]


def test_a_run_says_what_it_does_and_lets_go_of_the_blocks(side_config: MakeConfig, notes: Notes) -> None:
    config = side_config()
    result = train(config, notes)
    model, data, cache, let_go = notes.said
    assert model.startswith("Model: llama, 3 blocks, ")
    assert " trained parameters in a side network beside 3 of them on this device." in model
    assert data == "Data: 4 examples to learn from, 4 to measure on."
    # The same four, with the same labels.
    assert cache.startswith("Activation cache: 0 of 4 examples are in it; the others take ")
    assert let_go.startswith("All taps are cached; the frozen blocks are let go. Memory of this process: ")
    assert result.steps == 6
    assert result.active == ()
    assert result.adapter_all is None
    assert result.traffic_bytes == {"sent": {}, "received": {}}
    assert (Path(config.out) / "cache" / "cache.json").is_file()


def test_it_learns_what_it_learns_without_a_cache_bit_for_bit(side_config: MakeConfig, notes: Notes) -> None:
    cached, plain = side_config("cached"), side_config("plain", no_cache=True)
    for config in (cached, plain):
        train(config, notes)
    assert "Activation cache: none, each epoch runs the frozen blocks." in notes.said
    assert adapter_bytes(cached) == adapter_bytes(plain)
    assert losses(cached) == losses(plain)
    assert not (Path(plain.out) / "cache").exists()
    first, *_, last = [loss for _, loss, _ in losses(cached) if loss is not None]
    assert last < first


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_a_lossy_cache_is_kept_as_said(side_config: MakeConfig, notes: Notes, codec: str) -> None:
    exact, lossy = side_config("exact"), side_config("lossy", cache_codec=codec)
    for config in (exact, lossy):
        train(config, notes)
    assert adapter_bytes(exact) != adapter_bytes(lossy)
    ours, theirs = ([loss for _, loss, _ in losses(config) if loss is not None] for config in (lossy, exact))
    assert ours == pytest.approx(theirs, rel=0.05)


def test_a_run_whose_taps_are_cached_never_opens_the_blocks(
    side_config: MakeConfig, notes: Notes, opened: list[str], tmp_path: Path
) -> None:
    taps = str(tmp_path / "taps")
    train(side_config("first", cache=taps), notes)
    assert len(opened) == 1
    again = side_config("again", cache=taps, batch_size=4, seed=1)
    train(again, notes)
    assert len(opened) == 1
    assert notes.said[-1].startswith("Activation cache: 4 of 4 examples are in it; the others take 0 B.")
    train(side_config("others", cache=taps, layer=[0, 2]), notes)
    assert len(opened) == 2


def test_a_cache_that_was_filled_before_is_all_that_a_run_needs(
    side_config: MakeConfig, notes: Notes, opened: list[str], tmp_path: Path
) -> None:
    config = side_config(cache=str(tmp_path / "taps"), side_init="random")
    assert cache_ahead(config, notes.say, Tracker) == Cached(examples=4, computed=4)
    assert cache_ahead(config, notes.say, Tracker) == Cached(examples=4, computed=0)
    assert len(opened) == 1
    train(config, notes)
    assert len(opened) == 1
    with pytest.raises(ConfigError, match="Filling a cache: expected a run with one, got --method lora"):
        cache_ahead(
            replace(config, method="lora", cache=None, cache_key=None, side_init=None, reduction=8),
            notes.say,
            Tracker,
        )


def test_a_cache_without_room_is_refused_before_anything_is_done(
    side_config: MakeConfig, notes: Notes, opened: list[str]
) -> None:
    with pytest.raises(StorageError, match=r"within its limit of 2.0 kB"):
        train(side_config(cache_limit="2kB"), notes)
    assert opened == []
    assert notes.steps == []


def test_the_start_is_as_told(side_config: MakeConfig, notes: Notes) -> None:
    """With a learning rate this small a network stays as it began."""
    starts: tuple[dict[str, object], ...] = (
        {},
        {"side_init": "fisher"},
        {"side_init": "fisher", "fisher_examples": 1},
        {"side_init": "random"},
    )
    configs = [
        side_config(f"run-{number}", learning_rate=1e-30, max_steps=1, epochs=1, **knobs)
        for number, knobs in enumerate(starts)
    ]
    for config in configs:
        train(config, notes)
    assert len({adapter_bytes(config) for config in configs}) == len(starts)
    # Adding nothing yet, all begin with the model's own loss.
    assert len({losses(config)[0][1] for config in configs}) == 1
    other = side_config("seed", learning_rate=1e-30, max_steps=1, seed=5)
    train(other, notes)
    assert adapter_bytes(other) != adapter_bytes(configs[0])


def test_a_network_is_continued_as_it_was(side_config: MakeConfig, notes: Notes) -> None:
    config = side_config("first")
    result = train(config, notes)
    # What it was like is the adapter's; the options of a network are not looked at.
    more = side_config(
        "more", adapter=str(result.adapter), max_steps=1, learning_rate=1e-30, cache=f"{config.out}/cache"
    )
    continued = train(more, notes)
    assert continued.eval_loss == result.eval_loss
    assert adapter_bytes(more) == adapter_bytes(config)
    with pytest.raises(ConfigError, match="--adapter: expected one that --method lora trained, got another"):
        open_model(replace(PLAIN, model=config.model, adapter=str(result.adapter)), Ledger())
    (result.adapter / "adapter_model.safetensors").write_bytes(b"\0" * 8)
    with pytest.raises(CheckpointError):
        train(side_config("damaged", adapter=str(result.adapter)), notes)


def test_it_answers_and_is_measured(side_config: MakeConfig, notes: Notes) -> None:
    config = side_config(epochs=30)
    result = train(config, notes)
    folder = RunFolder.open(Path(config.out))
    measured = evaluate(folder, config, config.data, None, Tracker)
    assert measured.metrics["loss"] == pytest.approx(result.eval_loss, rel=1e-5)
    model = open_trained(folder, config)
    tokenizer = load_tokenizer(model.ends.folder)
    prompts = [raw_prompt(tokenizer, f"where is key {number}? ") for number in (1, 2)]
    assert complete(model, tokenizer, prompts, GenerationSettings(max_new_tokens=12)) == ["in the box"] * 2
    model.close()


@pytest.mark.parametrize(("task", "labels"), [("classification", [0, 1, 2, 1]), ("regression", [0.5, -1.0, 2.0, 0.0])])
def test_tasks_with_labels(
    side_config: MakeConfig, notes: Notes, tmp_path: Path, opened: list[str], task: str, labels: list[float]
) -> None:
    rows = [{"text_a": f"where is key {number}?", "label": label} for number, label in enumerate(labels)]
    data = tmp_path / "labelled.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = [side_config(name, task=task, epochs=40, no_cache=name == "plain") for name in ("cached", "plain")]
    configs = [replace(config, data=str(data), eval_data=str(data)) for config in made]
    results = [train(config, notes) for config in configs]
    assert adapter_bytes(configs[0]) == adapter_bytes(configs[1])
    measure = "accuracy" if task == "classification" else "pearson"
    assert results[0].eval_metrics[measure] > 0.9
    assert results[0].eval_metrics == results[1].eval_metrics
    assert len(opened) == 2


def test_the_threads_that_read_ahead_change_nothing(side_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    announced: list[int] = []
    announce = SideModel.announce

    def counted(model: SideModel, batch: dict[str, torch.Tensor]) -> None:
        announced.append(len(batch["input_ids"]))
        announce(model, batch)

    monkeypatch.setattr(SideModel, "announce", counted)
    config = side_config()
    train(config, Notes())
    # Two batches an epoch to learn from, and two after each of the three epochs to measure on.
    assert announced == [2] * 12
