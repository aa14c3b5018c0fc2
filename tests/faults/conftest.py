"""One tiny model, one data set, and the run that nothing disturbs, which every disturbed one must equal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.world import STEPS, TOKEN, Cloud, Run, World
from tests.support.certs import make_certificates
from tests.support.chat_model import save_chat_model


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("faults")
    turns = [(f"where is key {number}?", "in the blue box" + "!" * number) for number in range(9)]
    facts: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in turns
    ]
    _write(folder / "facts.jsonl", facts)
    _write(folder / "asked.jsonl", [{"prompt": "the old house ", "completion": "by the lake"}] * 3)
    (folder / "tokens").write_text(f"device {TOKEN}\n")
    (folder / "token").write_text(TOKEN)
    return World(
        folder,
        save_chat_model(folder / "model"),
        save_chat_model(folder / "other-model", seed=1),
        make_certificates(folder),
    )


@pytest.fixture(scope="session")
def cloud(world: World) -> Iterator[Cloud]:
    """Return a cloud that nothing happens to."""
    with world.cloud("cloud") as cloud:
        yield cloud


@pytest.fixture(scope="session")
def undisturbed(world: World, cloud: Cloud) -> Run:
    run = world.train("undisturbed", cloud.address)
    assert run.process.wait() == 0, run.process.stderr
    steps = [row["step"] for row in run.metrics if "loss" in row]
    assert steps == list(range(1, STEPS + 1))
    assert [row["step"] for row in run.metrics if "eval_loss" in row] == [3, 6, 9, 12]
    return run
