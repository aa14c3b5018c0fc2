from __future__ import annotations

import io
import json
import sys
import time

import pytest

from tidelock.cli.output import Output


def test_notices_go_to_stderr_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    Output().say("see [docs] at /a/b " + "long " * 50)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "see [docs] at /a/b " + "long " * 50 + "\n"


def test_a_result_is_text_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    Output().result({"a": 1}, "One a.")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("One a.\n", "")


def test_with_json_there_is_nothing_but_json(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(json=True)
    output.say("hello")
    with output.progress("Working", 2) as bar:
        bar.advance(2, loss=1.0)
    output.event({"event": "step", "n": 1})
    output.result({"a": 1}, "One a.")
    shown = capsys.readouterr()
    assert shown.err == ""
    assert [json.loads(line) for line in shown.out.splitlines()] == [{"event": "step", "n": 1}, {"a": 1}]


def test_without_json_an_event_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    Output().event({"event": "step"})
    assert capsys.readouterr().out == ""


def test_without_a_terminal_progress_is_lines_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Output().progress("Training", 14, completed=4) as bar:
        for step in range(10):
            now[0] += 3
            bar.advance(1, loss=2.5 - step / 10, note=None)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "Training 8/14, 0.33/s, loss 2.2, 18.0 s left",
        "Training 12/14, 0.33/s, loss 1.8, 6.0 s left",
        "Training 14/14, 0.33/s, loss 1.6, done in 30.0 s",
    ]


def test_on_a_terminal_progress_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")
    with Output().progress("Training [x]", 10) as bar:
        bar.advance(10, loss=0.5)
    shown = terminal.getvalue()
    assert "Training [x]" in shown
    assert "10/10" in shown
    assert "loss 0.5" in shown
    assert "\x1b[3" not in shown
