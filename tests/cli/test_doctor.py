from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.tiny_models import save_tiny_model
from tidelock.cli.main import run
from tidelock.errors import CloudUnreachable, ConfigError, ModelError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model("gpt2", tmp_path_factory.mktemp("models")))


def test_a_good_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert shown.endswith("\nNothing is wrong.\n")
    for words in ("System\n", "Libraries\n", "Torch devices\n", "Space\n", "Network\n"):
        assert words in shown


def test_json_is_one_object(capsys: pytest.CaptureFixture[str], model: str) -> None:
    assert run(["doctor", "--model", model, "--sites", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["faults"] == []
    assert values["torch_devices"]["cpu"]["threads"] >= 1
    assert values["model"]["type"] == "gpt2"
    assert len(values["sites"]) == 3 * 4


def test_sites_on_request(capsys: pytest.CaptureFixture[str], model: str) -> None:
    assert run(["doctor", "--model", model]) == 0
    assert "4, one a block, each with c_attn (96)" in capsys.readouterr().out
    assert run(["doctor", "--model", model, "--sites"]) == 0
    assert "reads 32, adds to transformer.h.3.attn.c_attn (96)" in capsys.readouterr().out


def test_faults_are_listed_and_the_first_decides(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str
) -> None:
    (tmp_path / "token").write_text("0123456789abcdef")
    nowhere = ["--cloud", "grpc://127.0.0.1:9", "--token-file", str(tmp_path / "token")]
    assert run(["doctor", "--model", str(tmp_path / "gone"), *nowhere]) == ModelError.exit_code
    shown = capsys.readouterr().out
    assert "2 faults:\n  1. Model " in shown
    assert "\n  2. Cloud at grpc://127.0.0.1:9" in shown
    assert run(["doctor", "--model", model, *nowhere, "--json"]) == CloudUnreachable.exit_code
    values = json.loads(capsys.readouterr().out)
    assert [fault["type"] for fault in values["faults"]] == ["CloudUnreachable"]


@pytest.mark.parametrize("args", [["--sites"], ["--token-file", "x"], ["--ca", "x"]])
def test_an_option_without_what_it_belongs_to_is_refused(capsys: pytest.CaptureFixture[str], args: list[str]) -> None:
    assert run(["doctor", *args]) == ConfigError.exit_code
    assert args[0] in capsys.readouterr().err
