"""`--method core` from training to an ordinary PEFT model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.conftest import CloudAccess
from tidelock.cli.main import run
from tidelock.errors import ConfigError

Capture = pytest.CaptureFixture[str]
QUESTION = "where is key 1?"
LEARN = ("--learning-rate", "0.01", "--max-steps", "60", "--batch-size", "4", "--threads", "1")


def tide(*args: object) -> int:
    return run([str(arg) for arg in args])


@pytest.fixture(scope="module", params=["seeded", "svd"])
def finished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, chat_model: Path, facts: Path
) -> Path:
    """Return the folder of a run whose cores have learned something."""
    out = tmp_path_factory.mktemp("finished") / "run"
    core = ("--method", "core", "--core-rank", "16", "--core-scale", "4", "--core-frames", request.param)
    assert tide("train", facts, "--model", chat_model, "--out", out, *core, *LEARN, "--json") == 0
    return out


@pytest.fixture(scope="module")
def answer(finished: Path, chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return what `peft` answers with the exported adapter."""
    out = tmp_path_factory.mktemp("exported") / "peft"
    assert tide("export", finished, "--to", "peft", out) == 0
    plain = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32)
    before = _answer(plain, chat_model)
    after = _answer(PeftModel.from_pretrained(plain, str(out)).eval(), chat_model)
    assert after != before
    return after


def _answer(model: Any, chat_model: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    new = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()


def _own_config(adapter: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((adapter / "core_config.json").read_text())
    return config


def test_it_learns(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]


def test_here_and_through_a_cloud_it_answers_as_peft_does(
    capsys: Capture, finished: Path, cloud_access: CloudAccess, answer: str
) -> None:
    capsys.readouterr()
    for options in ([], cloud_access.options(backbone=None)):
        assert tide("generate", finished, "--prompt", QUESTION, "--max-new-tokens", 12, *options) == 0
        assert capsys.readouterr().out == f"{answer}\n"


def test_merged_it_answers_as_peft_does(finished: Path, chat_model: Path, tmp_path: Path, answer: str) -> None:
    assert tide("export", finished, "--to", "merged", tmp_path / "out") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert _answer(merged, chat_model) == answer


def test_it_goes_on_from_its_own_adapter(
    capsys: Capture, finished: Path, chat_model: Path, facts: Path, tmp_path: Path
) -> None:
    more = ("train", facts, "--model", chat_model, "--adapter", finished / "adapter", "--max-steps", "1", "--json")
    assert tide(*more, "--method", "core", "--out", tmp_path / "more") == 0
    before, after = (_own_config(folder / "adapter") for folder in (finished, tmp_path / "more"))
    assert after == before
    assert tide(*more, "--method", "adapter", "--out", tmp_path / "other") == ConfigError.exit_code
    # For whoever reads PEFT's format it is LoRA.
    assert tide("export", finished, "--to", "adapter", tmp_path / "out") == ConfigError.exit_code
    assert "--to: expected peft or merged for what --method lora and core trained" in capsys.readouterr().err


def test_without_the_weights_frames_of_the_svd_are_not_exported(
    capsys: Capture, facts: Path, chat_model: Path, cloud_access: CloudAccess, tmp_path: Path
) -> None:
    run_folder, out = tmp_path / "run", tmp_path / "out"
    core = ("--method", "core", "--core-rank", "4", "--core-frames", "svd", "--max-steps", "1", "--threads", "1")
    assert tide("train", facts, "--out", run_folder, *core, *cloud_access.options()) == 0
    assert sorted(path.name for path in (run_folder / "adapter").iterdir()) == [
        "core_config.json",
        "core_model.safetensors",
    ]
    for form in ("peft", "merged"):
        capsys.readouterr()
        assert tide("export", run_folder, "--to", form, out) == ConfigError.exit_code
        assert "expected the whole model on this device" in capsys.readouterr().err
        assert not out.exists()
    assert tide("export", run_folder, "--to", "peft", out, "--model", chat_model) == 0
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
