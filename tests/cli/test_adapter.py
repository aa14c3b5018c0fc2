"""`--method adapter` from training to an ordinary transformers model, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tidelock
from tests.cli.conftest import CloudAccess
from tidelock.cli.main import run
from tidelock.errors import ConfigError

Capture = pytest.CaptureFixture[str]
QUESTION = "where is key 1?"
LEARN = ("--learning-rate", "0.03", "--max-steps", "40", "--batch-size", "4", "--threads", "1")
HOULSBY = ("--method", "adapter", "--bottleneck", "16", "--place", "attn-out", "--place", "mlp", "--activation", "relu")


def tide(*args: object) -> int:
    return run([str(arg) for arg in args])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, chat_model: Path, facts: Path) -> Path:
    """Return the folder of a run whose adapters have learned the answers."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert tide("train", facts, "--model", chat_model, "--out", out, *HOULSBY, *LEARN, "--json") == 0
    return out


def test_it_answers_with_what_was_learned_here_and_through_a_cloud(
    capsys: Capture, finished: Path, cloud_access: CloudAccess
) -> None:
    capsys.readouterr()
    for options in ([], cloud_access.options(backbone=None)):
        assert tide("generate", finished, "--prompt", QUESTION, "--max-new-tokens", 12, *options) == 0
        assert capsys.readouterr().out == "in the box\n"


def test_an_exported_one_answers_on_an_ordinary_model(
    capsys: Capture, finished: Path, chat_model: Path, tmp_path: Path
) -> None:
    capsys.readouterr()
    assert tide("export", finished, "--to", "adapter", tmp_path / "out") == 0
    assert f'tidelock.attach_adapter(AutoModelForCausalLM.from_pretrained(MODEL), "{tmp_path / "out"}")' in (
        capsys.readouterr().out
    )
    model = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32)
    tidelock.attach_adapter(model, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    new = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert str(tokenizer.decode(new, skip_special_tokens=True)).strip() == "in the box"


def test_a_schedule_leaves_two_adapters(capsys: Capture, chat_model: Path, facts: Path, tmp_path: Path) -> None:
    schedule = ("--schedule", "kill-revive", "--budget", "1", "--epochs", "3", "--batch-size", "4", "--threads", "1")
    out = tmp_path / "run"
    assert tide("train", facts, "--model", chat_model, "--out", out, *HOULSBY, *schedule, "--json") == 0
    capsys.readouterr()
    layers = {
        name: json.loads((out / name / "adapter_config.json").read_text())["layers"]
        for name in ("adapter", "adapter-all")
    }
    assert len(layers["adapter"]) == 1
    assert len(layers["adapter-all"]) > 1
    assert tide("export", out, "--to", "adapter", tmp_path / "all", "--all-modules") == 0
    assert json.loads((tmp_path / "all" / "adapter_config.json").read_text())["layers"] == layers["adapter-all"]


def test_it_can_be_continued_by_its_own_method_only(
    capsys: Capture, finished: Path, chat_model: Path, facts: Path, tmp_path: Path
) -> None:
    more = ("train", facts, "--model", chat_model, "--adapter", finished / "adapter", "--max-steps", "1")
    assert tide(*more, "--method", "adapter", "--out", tmp_path / "more", "--json") == 0
    assert tide(*more, "--out", tmp_path / "lora") == ConfigError.exit_code
    assert "--adapter: expected one that --method lora trained, got another" in capsys.readouterr().err
    assert not (tmp_path / "lora" / "run.toml").exists()


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_forms_of_lora_are_refused(capsys: Capture, finished: Path, tmp_path: Path, form: str) -> None:
    assert tide("export", finished, "--to", form, tmp_path / "out") == ConfigError.exit_code
    assert f"--to: expected adapter for what --method adapter trained, got {form}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--method", "adapter", "--rank", "4"), "--rank: expected it with --method lora only, got --method adapter"),
        (("--bottleneck", "4"), "--bottleneck: expected it with --method adapter only, got --method lora"),
        (("--method", "core", "--core-rank", "99"), "Core's rank: expected at most "),
        (("--method", "core", "--core-frames", "random"), "--core-frames: expected one of seeded, svd, got 'random'"),
        (("--method", "core", "--target", "o_proj"), "Core's targets: expected some of"),
        (("--method", "adapter", "--place", "head"), "--place: expected some of mlp, attn-out"),
        (("--method", "adapter", "--activation", "wave"), "Adapter's activation: expected one that transformers knows"),
        (("--method", "adapter", "--layer", "99"), "Adapter's layers: expected some of 0 to "),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(
    capsys: Capture, chat_model: Path, facts: Path, tmp_path: Path, args: tuple[str, ...], said: str
) -> None:
    out = tmp_path / "run"
    assert tide("train", facts, "--model", chat_model, "--out", out, *args) == ConfigError.exit_code
    assert said in capsys.readouterr().err
    assert not (out / "run.toml").exists()
