"""Trackers: TensorBoard's own event files, written by real runs and read back by TensorBoard."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainingArguments

import tidelock
from tests.unit.run.conftest import Notes
from tests.unit.run.test_trainer import interrupt
from tidelock.data.batch import Collator
from tidelock.errors import ConfigError
from tidelock.run import trackers
from tidelock.run.folder import RunFolder, read_rows
from tidelock.run.train import train


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """Return what TensorBoard reads of a folder under a name, as (step, value)."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_has_what_metrics_has(make_config, notes: Notes) -> None:
    config = make_config(report_to=["tensorboard"], schedule="kill-revive", budget=1, epochs=3)
    train(config, notes)
    folder = RunFolder(Path(config.out))
    rows = read_rows(folder.metrics)
    for ours, theirs in (("loss", "train/loss"), ("eval_loss", "eval/loss"), ("grad_norm", "train/grad_norm")):
        expected = [(row["step"], row[ours]) for row in rows if ours in row]
        assert len(expected) >= 3
        assert [step for step, _ in scalars(folder.tensorboard, theirs)] == [step for step, _ in expected]
        assert [value for _, value in scalars(folder.tensorboard, theirs)] == pytest.approx([v for _, v in expected])
    ((step, loss),) = scalars(folder.tensorboard, "eval/all_modules_loss")
    assert step == 6
    assert loss == pytest.approx(folder.metric(6, "eval_all_modules_loss"))
    assert not (folder.checkpoints / "runs").exists()


def test_without_it_only_metrics_are_written(make_config, notes: Notes) -> None:
    config = make_config(max_steps=1)
    train(config, notes)
    folder = RunFolder(Path(config.out))
    assert [row["step"] for row in read_rows(folder.metrics) if "loss" in row] == [1]
    assert not folder.tensorboard.exists()


def test_where_the_environment_wants_the_events(
    make_config, notes: Notes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "mine"))
    config = make_config(max_steps=1, report_to=["tensorboard"])
    train(config, notes)
    assert [step for step, _ in scalars(tmp_path / "mine", "train/loss")] == [1]
    assert not RunFolder(Path(config.out)).tensorboard.exists()


@pytest.mark.parametrize("name", ["tensorbord", "all", "none", ""])
def test_an_unknown_tracker_is_refused_before_anything_begins(make_config, notes: Notes, name: str) -> None:
    config = make_config(report_to=["tensorboard", name])
    with pytest.raises(ConfigError, match=rf"^--report-to: expected one of .*tensorboard.*wandb.*, got '{name}'\."):
        train(config, notes)
    assert (notes.said, Path(config.out).exists()) == ([], False)


@pytest.mark.parametrize(
    ("name", "advice"), [("neptune", "Install it"), ("tensorboard", r"pip install 'tidelock\[tens")]
)
def test_a_tracker_that_is_not_installed_is_refused_before_anything_begins(
    make_config, notes: Notes, monkeypatch: pytest.MonkeyPatch, name: str, advice: str
) -> None:
    monkeypatch.setattr(trackers, "get_available_reporting_integrations", list)
    config = make_config(report_to=[name])
    with pytest.raises(ConfigError, match=rf"^--report-to {name}: expected its package, got none\. {advice}"):
        train(config, notes)
    assert not Path(config.out).exists()


def test_a_resumed_run_may_report_too(make_config, notes: Notes) -> None:
    config = make_config()
    notes.at_step = lambda step: interrupt() if step == 1 else None
    assert train(config, notes).steps == 2
    train(replace(config, report_to=["tensorboard"]), notes, resume=True)
    assert [step for step, _ in scalars(RunFolder(Path(config.out)).tensorboard, "train/loss")] == [3, 4]


def test_trainer_itself_reports_a_connected_model(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `tidelock train`: what `transformers.Trainer` does with any model."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    model = tidelock.connect("local", model=chat_model)
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}] * 4
    args = TrainingArguments(
        str(tmp_path / "out"), max_steps=3, logging_steps=1, report_to="tensorboard", use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model, args, train_dataset=rows, data_collator=Collator(0))
    trainer.train()
    logged = [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]
    read = scalars(tmp_path / "events", "train/loss")
    assert [step for step, _ in read] == [step for step, _ in logged] == [1, 2, 3]
    assert [value for _, value in read] == pytest.approx([value for _, value in logged])
    model.close()
