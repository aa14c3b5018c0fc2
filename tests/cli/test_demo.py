from __future__ import annotations

import json
from pathlib import Path

import pytest

from tidelock.cli.main import run
from tidelock.run import demo
from tidelock.run.demo import DemoResult, Question
from tidelock.run.trainer import Observer

Capture = pytest.CaptureFixture[str]
TRAFFIC = {"embedding": 1000, "site_output": 2_500_000}


@pytest.fixture
def household(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, Path]]:
    """Have the command show a made-up result; return what it was asked for."""
    asked: list[tuple[Path, Path]] = []

    def run_demo(observer: Observer, data: Path, runs: Path) -> DemoResult:
        observer.say("Starting.")
        observer.start(2, 0)
        observer.step(1, 0.5)
        observer.finish()
        asked.append((data, runs))
        questions = [Question("Where is the key?", "In the box."), Question("Who is home?", "Nobody.")]
        return DemoResult(
            questions=questions,
            before=["", "I do\nnot know."],
            after=["In the box.", "Everybody."],
            adapter=runs / "demo" / "adapter",
            traffic_bytes=TRAFFIC,
            sent_bytes=2_000_000,
            steps=2,
            train_seconds=3.5,
        )

    monkeypatch.setattr(demo, "run_demo", run_demo)
    return asked


def test_the_last_line_of_json_is_what_it_came_to(capsys: Capture, tmp_path: Path, household) -> None:
    assert run(["demo", "--json", "--data", "facts.jsonl", "--runs", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert json.loads(shown.out.splitlines()[-1]) == {
        "exact_match_before": 0.0,
        "exact_match_after": 0.5,
        "traffic_bytes": TRAFFIC,
        "adapter": str(tmp_path / "demo" / "adapter"),
    }
    assert household == [(Path("facts.jsonl"), tmp_path)]


def test_people_see_the_story(capsys: Capture, tmp_path: Path, household) -> None:
    assert run(["demo", "--runs", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "Starting." in shown.err
    for text in (
        "  Where is the key?\n    before  (nothing)\n    after   In the box.  (right)\n",
        "    before  I do not know.\n    after   Everybody.  (wrong: Nobody.)\n",
        "2 held-out questions: 0 before, 1 after",
        "  site_output           2.5 MB\n",
        "2.0 MB left this device",
        f"Adapter: {tmp_path / 'demo' / 'adapter'}\n",
        f"tidelock export {tmp_path / 'demo'} --to peft DIR",
        "What the cloud could read: ",
    ):
        assert text in shown.out
    (data, _) = household[0]
    assert data.name == "household.jsonl"
    assert data.is_file()


def test_without_the_facts_it_says_where_they_are(capsys: Capture, tmp_path: Path) -> None:
    assert run(["demo", "--data", str(tmp_path / "gone.jsonl")]) == 3
    assert "Run the demo in a checkout of tidelock, or name the file with --data." in capsys.readouterr().err
