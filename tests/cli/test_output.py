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


def test_without_a_terminal_what_is_below_goes_with_the_next_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Output().progress("Training", 4) as bar:
        for step in range(4):
            now[0] += 6
            if step < 2:
                bar.below([f"of step {step}", "another"])
            bar.advance()
    assert capsys.readouterr().err.splitlines() == [
        "Training 2/4, 0.17/s, 12.0 s left",
        "of step 1",
        "another",
        "Training 4/4, 0.17/s, done in 24.0 s",
    ]


class Terminal(io.StringIO):
    """What rich takes for a terminal."""

    def isatty(self) -> bool:
        return True


def a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Put a terminal in the place of stderr."""
    found = Terminal()
    monkeypatch.setattr(sys, "stderr", found)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")
    return found


def test_on_a_terminal_what_is_below_takes_the_place_of_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    with Output().progress("Training", 10) as bar:
        bar.below(["Peer 0 [first]", "Peer 1 first"])
        bar.advance(5)
        bar.below(["Peer 0 [second]", "Peer 1 second"])
    first, *frames = terminal.getvalue().split("Peer 0 [second]")
    assert "Peer 1 first" not in "".join(frames)
    assert "Peer 1 second" in frames[-1]
    assert "5/10" in first


def test_on_a_terminal_progress_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch)
    with Output().progress("Training [x]", 10) as bar:
        bar.advance(10, loss=0.5)
    shown = terminal.getvalue()
    assert "Training [x]" in shown
    assert "10/10" in shown
    assert "loss 0.5" in shown
    assert "\x1b[3" not in shown
