from __future__ import annotations

import json
from pathlib import Path

import pytest

from tidelock.cli.main import run
from tidelock.errors import CheckpointError

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def finished(chat_model: Path, facts: Path, tmp_path: Path, capsys: Capture) -> Path:
    """Return the folder of a run of an epoch, three steps."""
    out = tmp_path / "run"
    options = ["--model", chat_model, "--max-steps", "3", "--batch-size", "2", "--threads", "1", "--out", out]
    assert run(["train", str(facts), *map(str, options)]) == 0
    capsys.readouterr()
    return out


def test_it_says_where_the_page_is(finished: Path, capsys: Capture) -> None:
    assert run(["report", str(finished)]) == 0
    shown = capsys.readouterr()
    assert shown.out == (
        f"Wrote {finished / 'report.html'}, to be opened in a browser, and 3 plots as PNG files in "
        f"{finished / 'report'}.\n"
    )
    assert (finished / "report.html").read_text().startswith("<!doctype html>")


def test_json_is_one_object(finished: Path, capsys: Capture) -> None:
    assert run(["report", str(finished), "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    names = ("loss.png", "activity.png", "time.png")
    assert json.loads(shown.out) == {
        "event": "reported",
        "page": str(finished / "report.html"),
        "images": [str(finished / "report" / name) for name in names],
    }


def test_no_run(tmp_path: Path, capsys: Capture) -> None:
    assert run(["report", str(tmp_path)]) == CheckpointError.exit_code
    shown = capsys.readouterr()
    assert "expected one with a run.toml, got none" in shown.err
    assert shown.out == ""
