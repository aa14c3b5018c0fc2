from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import CloudAccess
from tests.support.chat_model import POSITIONS
from tidelock.cli.main import run

Capture = pytest.CaptureFixture[str]
ASKED = ("--prompt", "where is key 1?", "--max-new-tokens", "12")


def generate(*args: object) -> int:
    return run(["generate", *map(str, args)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, chat_model: Path, facts: Path) -> Path:
    """Return the folder of a run that has learned the answers."""
    out = tmp_path_factory.mktemp("finished") / "run"
    learn = ["--learning-rate", "0.05", "--rank", "16", "--max-steps", "30", "--batch-size", "4", "--threads", "1"]
    assert run(["train", str(facts), "--model", str(chat_model), "--out", str(out), *learn, "--json"]) == 0
    return out


def answer(capsys: Capture, *args: object) -> str:
    assert generate(*args, "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    values = json.loads(line)
    assert values["prompt"] == ASKED[1]
    return str(values["answer"])


def test_it_answers_with_what_was_learned(capsys: Capture, finished: Path) -> None:
    assert answer(capsys, finished, *ASKED) == "in the box"
    assert generate(finished, *ASKED) == 0
    shown = capsys.readouterr()
    assert shown.out == "in the box\n"
    assert shown.err == ""


def test_raw_text_goes_without_the_template(capsys: Capture, finished: Path) -> None:
    assert answer(capsys, finished, *ASKED, "--raw") != "in the box"


def test_draws_repeat_with_their_seed(capsys: Capture, finished: Path) -> None:
    drawn = [answer(capsys, finished, *ASKED, "--raw", "--temperature", 3, "--seed", seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_run_can_be_asked_through_a_cloud_and_elsewhere(
    capsys: Capture, tmp_path: Path, finished: Path, cloud_access: CloudAccess
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    options = [*cloud_access.options(backbone=None)]
    assert answer(capsys, moved, *ASKED, *options) == "in the box"
    (tmp_path / "token").write_text("0123456789abcdef-of-a-stranger")
    assert generate(moved, *ASKED, *cloud_access.options(backbone=None, token_file=tmp_path / "token")) == 13
    assert "Token: expected one that this cloud knows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--prompt", "x" * POSITIONS), f"expected at most {POSITIONS} tokens a row"),
        (("--prompt", "x", "--max-new-tokens", str(POSITIONS)), "Shorten the prompt or ask for fewer tokens"),
        (("--prompt", "x", "--top-p", "0"), "top_p"),
        (("--prompt", "x", "--temperature", "-1"), "--temperature"),
        (("--prompt", "x", "--max-new-tokens", "0"), "--max-new-tokens"),
        (("--prompt", "", "--raw"), "--prompt"),
        ((), "--prompt"),
    ],
)
def test_what_cannot_be_asked(capsys: Capture, finished: Path, args: tuple[str, ...], said: str) -> None:
    assert generate(finished, *args) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_a_run_that_is_not_finished_has_nothing_to_ask(capsys: Capture, tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    assert generate(tmp_path / "run", *ASKED) == 5
    assert "Finish the run first: tidelock train --resume" in capsys.readouterr().err
    assert generate(tmp_path / "nowhere", *ASKED) == 5
    assert "expected one with a run.toml, got none" in capsys.readouterr().err


def test_a_model_without_a_chat_template_takes_raw_text_only(
    capsys: Capture, tmp_path: Path, chat_model: Path, finished: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(chat_model, model)
    (model / "chat_template.jinja").unlink()
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    toml = (out / "run.toml").read_text()
    (out / "run.toml").write_text(toml.replace(str(chat_model), str(model)))
    assert generate(out, *ASKED) == 2
    assert "Use --raw to continue plain text" in capsys.readouterr().err
    assert generate(out, *ASKED, "--raw") == 0
