"""`tidelock export` of a side network: alone, never merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import tidelock
from tests.support.parity import LOSS_TOLERANCE, relative_error, token_batch
from tests.support.plain_side import randomise_side, side_model
from tests.support.run_folder import new_run_folder
from tests.support.tiny_models import save_tiny_model
from tidelock.cli.main import run
from tidelock.errors import CheckpointError, ConfigError
from tidelock.peft.side import SideConfig
from tidelock.run.config import RunConfig

CONFIG = SideConfig(init="random", zero_upsample=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama", "gpt2"):
        save_tiny_model(name, folder)
    return folder


def finished(models: Path, path: Path, num_labels: int | None = None) -> Path:
    """Return a run folder with a side network."""
    model = models / "llama"
    task = "causal-lm" if num_labels is None else "classification"
    folder = new_run_folder(
        RunConfig(data="facts.jsonl", out=str(path), model=str(model), task=task, num_labels=num_labels)
    )
    side = side_model(model, CONFIG, num_labels)
    randomise_side(side)
    side.save_adapter(folder.adapter, str(model))
    return path


def export(*args: object) -> int:
    return run(["export", *map(str, args)])


def test_what_it_says_loads_it(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert export(finished(models, tmp_path / "run"), out, "--to", "adapter", "--model", models / "llama") == 0
    said = f'model = AutoModelForCausalLM.from_pretrained(MODEL); tidelock.attach_side(model, "{out}")'
    assert said in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(models / "llama")
    tidelock.attach_side(model, out)
    ours = side_model(models / "llama", CONFIG).eval()
    randomise_side(ours)
    ids = token_batch("none").input_ids
    with torch.no_grad():
        assert relative_error(model(ids).logits, ours(ids).logits) <= LOSS_TOLERANCE


def test_a_classifiers_head_goes_with_it(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert export(finished(models, tmp_path / "run", 3), out, "--to", "adapter", "--model", models / "llama") == 0
    assert "AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=3);" in capsys.readouterr().out
    model = AutoModelForSequenceClassification.from_pretrained(models / "llama", num_labels=3)
    tidelock.attach_side(model, out)


@pytest.mark.parametrize("form", ["merged", "peft"])
def test_it_is_not_merged(form: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(finished(models, tmp_path / "run"), tmp_path / "out", "--to", form) == ConfigError.exit_code
    said = capsys.readouterr().err
    assert f"--to: expected adapter for what --method side trained, got {form}." in said
    assert "A side network is beside the weights and cannot be merged into them." in said
    assert not (tmp_path / "out").exists()


def test_it_is_not_exported_for_another_model(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = (finished(models, tmp_path / "run"), tmp_path / "out", "--to", "adapter", "--model", models / "gpt2")
    assert export(*order) == CheckpointError.exit_code
    assert "Adapter weight" in capsys.readouterr().err
