"""`--method side` from training to an ordinary transformers model, its cache, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tidelock
from tests.cli.conftest import CloudAccess
from tests.support.answer_model import save_answer_model
from tidelock.cli.main import run
from tidelock.errors import CacheError, ConfigError

Capture = pytest.CaptureFixture[str]
QUESTION = "where is key 1?"
LEARN = ("--learning-rate", "0.02", "--max-steps", "40", "--batch-size", "4", "--threads", "1", "--reduction", "2")
SIDE = ("--method", "side", *LEARN)


def tide(*args: object) -> int:
    return run([str(arg) for arg in args])


@pytest.fixture(autouse=True)
def _own_key(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the cache's key out of the user's folder."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.getbasetemp() / "config"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, chat_model: Path, facts: Path) -> Path:
    """Return the folder of a run whose network has learned the answers."""
    out = tmp_path_factory.mktemp("finished") / "run"
    key = ("--cache-key", out.parent / "cache.key")
    data = (facts, "--split", "train", "--eval-split", "held_out")
    assert tide("train", *data, "--model", chat_model, "--out", out, *SIDE, *key, "--json") == 0
    return out


def test_it_answers_with_what_was_learned(capsys: Capture, finished: Path) -> None:
    assert tide("generate", finished, "--prompt", QUESTION, "--max-new-tokens", 12) == 0
    assert capsys.readouterr().out == "in the box\n"


def test_it_is_measured_as_it_was_in_training(capsys: Capture, finished: Path, facts: Path) -> None:
    assert tide("eval", finished, "--data", facts, "--split", "held_out", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert found["metrics"]["loss"] == pytest.approx([row["eval_loss"] for row in rows if "eval_loss" in row][-1])


def test_an_exported_one_answers_on_an_ordinary_model(
    capsys: Capture, finished: Path, chat_model: Path, tmp_path: Path
) -> None:
    assert tide("export", finished, "--to", "adapter", tmp_path / "out") == 0
    assert f'tidelock.attach_side(model, "{tmp_path / "out"}")' in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32)
    tidelock.attach_side(model, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    chat = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    new = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert str(tokenizer.decode(new, skip_special_tokens=True)).strip() == "in the box"


def test_its_report_has_no_wire_and_no_modules(capsys: Capture, finished: Path) -> None:
    assert tide("report", finished, "--json") == 0
    images = [Path(path).name for path in json.loads(capsys.readouterr().out)["images"]]
    assert images == ["loss.png", "time.png"]
    page = (finished / "report.html").read_text()
    assert "side" in page
    assert "Kill" not in page


def test_its_cache_is_one_to_look_at_and_to_check(capsys: Capture, finished: Path) -> None:
    assert tide("cache", "info", finished / "cache") == 0
    # Four to learn from and two to measure on.
    assert capsys.readouterr().out.startswith("6 examples, ")
    assert tide("cache", "verify", finished / "cache", "--cache-key", finished.parent / "cache.key") == 0
    assert capsys.readouterr().out == "6 entries are right, 0 are damaged.\n"


def test_a_cache_filled_before_serves_a_run(capsys: Capture, chat_model: Path, facts: Path, tmp_path: Path) -> None:
    taps = tmp_path / "taps"
    assert tide("cache", facts, taps, "--model", chat_model, "--split", "train", "--threads", 1) == 0
    shown = capsys.readouterr()
    assert shown.out == f"4 examples are in {taps}, 4 of them new.\n"
    assert "Activation cache: 0 of 4 examples are in it; the others take " in shown.err
    assert tide("cache", facts, taps, "--model", chat_model, "--threads", 1, "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"event": "cached", "examples": 6, "computed": 2}
    out = tmp_path / "run"
    options = ("--model", chat_model, "--max-steps", 1, "--threads", 1, "--method", "side", "--cache", taps)
    assert tide("train", facts, *options, "--out", out) == 0
    assert "Activation cache: 6 of 6 examples are in it; the others take 0 B." in capsys.readouterr().err


def test_another_key_is_refused(capsys: Capture, finished: Path, chat_model: Path, facts: Path, tmp_path: Path) -> None:
    options = ("--model", chat_model, *SIDE, "--cache", finished / "cache", "--cache-key", tmp_path / "other.key")
    assert tide("train", facts, *options, "--out", tmp_path / "run") == CacheError.exit_code
    assert "key" in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.toml").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--reduction", "4"), "--reduction: expected it with --method side only, got --method lora"),
        (("--cache", "taps"), "--cache: expected it with --method side only, got --method lora"),
        (("--method", "side", "--rank", "4"), "--rank: expected it with --method lora only, got --method side"),
        (("--method", "side", "--schedule", "random"), "--schedule: expected it with --method lora or adapter or core"),
        (("--method", "side", "--no-cache", "--cache", "taps"), "--no-cache: expected no other option of a cache"),
        (("--method", "side", "--cache-limit", "much"), "Size: expected a number with a unit"),
        (("--method", "side", "--side-init", "lottery"), "--side-init: expected one of fisher, magnitude, random"),
        (("--method", "side", "--layer", "99"), "SideConfig.taps: expected blocks 0 to 2, as the model has, got 99"),
        (("--method", "side", "--tap-width", "999"), "tap_width"),
        (("--method", "side", "--side-output", "alone", "--upsample", "zero"), "zero_upsample"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(
    capsys: Capture, chat_model: Path, facts: Path, tmp_path: Path, args: tuple[str, ...], said: str
) -> None:
    out = tmp_path / "run"
    assert tide("train", facts, "--model", chat_model, "--out", out, *args) == ConfigError.exit_code
    assert said in capsys.readouterr().err
    assert not (out / "run.toml").exists()


def test_an_encoder_decoder_answers_and_is_measured(
    capsys: Capture, facts_to_answer: Path, answer_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = ("--task", "text-to-text", "--model", answer_model, "--out", out, *SIDE, "--json")
    assert tide("train", facts_to_answer, *options) == 0
    capsys.readouterr()
    assert tide("generate", out, "--prompt", QUESTION, "--max-new-tokens", 12) == 0
    assert capsys.readouterr().out == "in the box\n"
    assert tide("eval", out, "--data", facts_to_answer) == 0
    shown = capsys.readouterr().out
    assert "exact match  1.0000" in shown
    assert tide("report", out) == 0


@pytest.fixture(scope="module")
def answer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_answer_model(tmp_path_factory.mktemp("answer") / "model")


@pytest.fixture
def facts_to_answer(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"where is key {number}?", "completion": "in the box"} for number in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_with_a_cloud_and_no_model_of_its_own(
    capsys: Capture, cloud_access: CloudAccess, facts: Path, tmp_path: Path
) -> None:
    """The ends come from the cloud, and the taps once; the cache is then all that training needs."""
    taps, out = tmp_path / "taps", tmp_path / "run"
    assert tide("cache", facts, taps, "--split", "train", *cloud_access.options(), "--threads", 1, "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"event": "cached", "examples": 4, "computed": 4}
    options = (*SIDE, "--cache", taps, *cloud_access.options())
    assert tide("train", facts, "--split", "train", "--out", out, *options) == 0
    assert "Activation cache: 4 of 4 examples are in it; the others take 0 B." in capsys.readouterr().err
    sent = json.loads((out / "ledger.json").read_text())["sent"]
    assert "embedding" not in sent
    assert tide("generate", out, "--prompt", QUESTION, "--max-new-tokens", 12) == 0
    assert capsys.readouterr().out == "in the box\n"
    assert tide("report", out) == 0


def test_a_start_out_of_the_whole_model_needs_it_on_the_device(
    capsys: Capture, cloud_access: CloudAccess, facts: Path, tmp_path: Path
) -> None:
    options = ("--method", "side", "--side-init", "magnitude", *cloud_access.options())
    assert tide("train", facts, "--out", tmp_path / "run", *options) == ConfigError.exit_code
    assert "expected the whole model on this device for init='magnitude', got none" in capsys.readouterr().err
