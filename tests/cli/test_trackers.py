from __future__ import annotations

from pathlib import Path

import pytest

from tidelock.cli.main import run
from tidelock.errors import ConfigError


def test_trackers_are_options_of_train_and_of_a_resumed_run(
    chat_model: Path, facts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    size = ["--max-steps", "1", "--batch-size", "2", "--threads", "1"]
    command = ["train", str(facts), "--model", str(chat_model), "--out", str(out), *size]
    assert run([*command, "--report-to", "tensorbord"]) == ConfigError.exit_code
    assert "got 'tensorbord'" in capsys.readouterr().err
    assert not out.exists()
    assert run([*command, "--report-to", "tensorboard"]) == 0
    (event_file,) = (out / "tensorboard").iterdir()
    assert event_file.name.startswith("events.out.tfevents.")
    assert run(["train", "--resume", "--out", str(out), "--report-to", "tensorboard"]) == 0
    assert len(list((out / "tensorboard").iterdir())) == 2
