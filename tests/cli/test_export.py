from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tests.support.run_folder import new_run_folder
from tests.support.tiny_models import save_tiny_model
from tidelock.cli.main import run
from tidelock.device.bank import Bank
from tidelock.errors import CheckpointError, ConfigError
from tidelock.model.ends import empty_model, read_config
from tidelock.model.geometry import geometry_of
from tidelock.peft.export import load_adapter, save_adapter
from tidelock.run.config import RunConfig


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder with an adapter."""
    folder = tmp_path_factory.mktemp("finished")
    model = save_tiny_model("llama", folder)
    made = new_run_folder(RunConfig(data="facts.jsonl", out=str(folder / "run"), model=str(model)))
    config = LoraConfig(r=2, target_modules=["q_proj"])
    geometry = geometry_of(empty_model(read_config(model)))
    bank = Bank(config, geometry)
    modules = {site: bank.at(site) for site in bank.targets}
    save_adapter(modules, config, geometry, made.adapter, base_model=str(model))
    return folder / "run"


def export(*args: object) -> int:
    return run(["export", *map(str, args)])


def test_peft_says_how_to_load_it(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert export(finished, "--to", "peft", out) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Wrote 2 files, ")
    assert f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), "{out}")' in shown
    config = load_adapter(out).config
    assert isinstance(config, LoraConfig)
    assert config.r == 2


def test_merged_with_json_is_one_object(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert export(finished, out, "--to", "merged", "--json") == 0
    shown = capsys.readouterr()
    values = json.loads(shown.out)
    assert shown.err == ""
    assert (values["event"], values["form"], values["folder"]) == ("exported", "merged", str(out))
    assert values["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert AutoModelForCausalLM.from_pretrained(out) is not None


def test_refusals_have_their_exit_codes(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    assert export(finished, tmp_path / "full", "--to", "peft") == ConfigError.exit_code
    assert "--force" in capsys.readouterr().err
    assert export(finished, tmp_path / "full", "--to", "peft", "--force") == 0
    assert export(finished, tmp_path / "out", "--to", "gguf") == ConfigError.exit_code
    assert export(tmp_path / "none", tmp_path / "out", "--to", "peft") == CheckpointError.exit_code
    assert export(finished, "--to", "peft") == ConfigError.exit_code
    assert "dir" in capsys.readouterr().err.splitlines()[-1].lower()
