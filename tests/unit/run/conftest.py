"""A tiny chat model and examples, and an observer that writes down what it is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.chat_model import save_chat_model
from tidelock.run.config import RunConfig


class Notes:
    """Keeps what a run tells its observer; may act at a step."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.began: tuple[int, int] | None = None
        self.steps: list[tuple[int, float | None]] = []
        self.finished = 0
        self.at_step: Callable[[int], None] = lambda _step: None

    def say(self, text: str) -> None:
        self.said.append(text)

    def start(self, total_steps: int, first_step: int) -> None:
        self.began = (total_steps, first_step)

    def step(self, step: int, loss: float | None) -> None:
        self.steps.append((step, loss))
        self.at_step(step)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep hashes and fetched models out of the user's cache."""
    monkeypatch.setenv("TIDELOCK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make_config(tmp_path: Path, chat_model: Path):
    """Return a function that makes the configuration of a short local run: 4 steps, evaluated after 2 and 4."""
    rows = [{"prompt": f"where is key {number}? ", "completion": "in the box"} for number in range(4)]
    data = tmp_path / "facts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(name: str = "run", **knobs: object) -> RunConfig:
        settings = {"model": str(chat_model), "batch_size": 2, "epochs": 2, "dropout": 0.2, "rank": 2, **knobs}
        return RunConfig(data=str(data), eval_data=str(data), out=str(tmp_path / name), **settings)  # type: ignore[arg-type]

    return make
