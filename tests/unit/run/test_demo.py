from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.run.conftest import Notes
from tidelock.cloud.memory import PassCost
from tidelock.errors import DataError
from tidelock.run import demo
from tidelock.run.cloud_process import LoopbackCloud
from tidelock.run.demo import DemoResult, Question, read_questions, run_demo
from tidelock.run.folder import RunFolder
from tidelock.run.train import TrainResult


def household(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(number: int, split: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"where is key {number}?"}, {"role": "assistant", "content": "in the box"}]
    return {"messages": turns, "split": split}


def test_the_held_out_rows_are_the_questions(tmp_path: Path) -> None:
    data = household(tmp_path / "facts.jsonl", [row(1, "train"), row(2, "held_out"), row(3, "held_out")])
    asked = [Question("where is key 2?", "in the box"), Question("where is key 3?", "in the box")]
    assert read_questions(data) == asked


def test_facts_in_another_form_are_refused(tmp_path: Path) -> None:
    data = household(tmp_path / "facts.jsonl", [{"text": "secret-words", "split": "held_out"}])
    with pytest.raises(DataError, match=r"got another form \(facts\.jsonl:1\)") as caught:
        read_questions(data)
    assert "secret-words" not in caught.value.message


def test_without_facts_there_is_no_demo(tmp_path: Path, notes: Notes) -> None:
    with pytest.raises(DataError, match="expected the household facts, got no such file"):
        run_demo(notes, tmp_path / "gone.jsonl", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_exact_match_is_to_the_letter() -> None:
    questions = [Question("?", "In the box."), Question("?", "Nobody.")]
    shown = DemoResult(questions, [], [], Path("x"), {}, 0, 0, 0.0)
    assert shown.exact_match(["In the box.", "nobody."]) == 0.5


def test_the_whole_story_with_a_tiny_model(
    tmp_path: Path, chat_model: Path, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real cloud process over TLS; only the model is another one, and the training short."""
    monkeypatch.setattr(demo, "fetch_smollm2", lambda on_progress: chat_model)
    config = demo._demo_config
    monkeypatch.setattr(demo, "_demo_config", lambda *args: replace(config(*args), max_steps=2, rank=2))
    data = household(tmp_path / "facts.jsonl", [row(1, "train"), row(2, "held_out")])
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    result = run_demo(notes, data, tmp_path / "runs")
    assert result.steps == 2
    assert len(result.before) == len(result.after) == len(result.questions) == 1
    assert result.adapter == tmp_path / "runs" / "demo-2" / "adapter"
    written = RunFolder.open(tmp_path / "runs" / "demo-2").config()
    assert written.cloud is not None
    assert written.cloud.startswith("grpcs://127.0.0.1:")
    assert written.ca is not None
    assert result.sent_bytes == sum(result.traffic_bytes[kind] for kind in ("embedding", "site_output")) + sum(
        json.loads((tmp_path / "runs" / "demo-2" / "ledger.json").read_text())["sent"][kind]
        for kind in ("final_gradient", "input_gradient", "control")
    )
    assert notes.began == (2, 0)


def test_ctrl_c_in_training_ends_the_story(tmp_path: Path, notes: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = LoopbackCloud("grpcs://127.0.0.1:7", tmp_path / "token", tmp_path / "cert", 0, PassCost(0.0, 0.0))
    asked: list[object] = []
    interrupted = TrainResult(tmp_path, None, 1, None, None, {}, None, (), 0.0, {}, {}, interrupted=True)
    for name, value in {
        "fetch_smollm2": lambda on_progress: tmp_path,
        "loopback_cloud": lambda _model: contextlib.nullcontext(cloud),
        "open_model": lambda *_args: SimpleNamespace(close=lambda: None),
        "_answer": lambda *args: asked.append(args),
        "train": lambda *_args: interrupted,
    }.items():
        monkeypatch.setattr(demo, name, value)
    data = household(tmp_path / "facts.jsonl", [row(1, "train"), row(2, "held_out")])
    with pytest.raises(KeyboardInterrupt):
        run_demo(notes, data, tmp_path / "runs")
    assert len(asked) == 1
