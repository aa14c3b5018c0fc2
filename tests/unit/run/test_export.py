from __future__ import annotations

import errno
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from tests.support.run_folder import new_run_folder
from tests.support.tiny_models import save_tiny_model
from tidelock.device.bank import Bank
from tidelock.errors import CheckpointError, ConfigError, ModelError, NonFiniteError, StorageError
from tidelock.model.ends import empty_model, read_config
from tidelock.model.geometry import geometry_of
from tidelock.peft.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from tidelock.peft.export import load_adapter, save_adapter
from tidelock.peft.lora import ALL_PROJECTIONS
from tidelock.run.config import RunConfig
from tidelock.run.export import ExportOrder, export

FAMILIES = ["llama", "llama_tied", "gpt2", "gpt_neox", "bloom", "opt"]
IDS = torch.tensor([[5, 9, 2, 40, 17, 33], [8, 1, 77, 3, 60, 21]])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        save_tiny_model(name, folder)
    return folder


def finished_run(model: Path, path: Path, *, cloud: bool = False) -> Path:
    """Return a run folder with an adapter whose every weight is random, as after training."""
    config = RunConfig(data="facts.jsonl", out=str(path), model=str(model))
    if cloud:
        config = replace(config, model=None, cloud="grpcs://cloud:7777", backbone="cloud")
    folder = new_run_folder(config)
    lora = LoraConfig(r=4, target_modules=ALL_PROJECTIONS)
    geometry = geometry_of(empty_model(read_config(model)))
    bank = Bank(lora, geometry)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_(std=0.3)
    modules = {site: bank.at(site) for site in bank.targets}
    save_adapter(modules, lora, geometry, folder.adapter, base_model=str(model))
    return path


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


def with_adapter(model: Path, adapter: Path) -> torch.Tensor:
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(plain, str(adapter)))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_merged_model_computes_what_base_and_adapter_do(models: Path, tmp_path: Path, name: str) -> None:
    run = finished_run(models / name, tmp_path / "run")
    said: list[str] = []
    files = export(ExportOrder(run, "merged", tmp_path / "merged"), said.append)
    expected = with_adapter(models / name, run / "adapter")
    plain = logits(AutoModelForCausalLM.from_pretrained(models / name))
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert (expected - plain).abs().max() > 1e-2
    assert (expected - merged).abs().max() < 1e-4
    assert sorted(files) == sorted((tmp_path / "merged").iterdir())
    assert said


def test_merging_brings_the_tokenizer_and_no_old_weights(models: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(models / "llama", model)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).write_text(name)
    (model / "generation_config.json").write_text('{"max_new_tokens": 33}')
    (model / "model.safetensors.index.json").write_text("{}")
    export(ExportOrder(finished_run(model, tmp_path / "run"), "merged", tmp_path / "out"), print)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert '"max_new_tokens": 33' in (tmp_path / "out" / "generation_config.json").read_text()
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "tokenizer.json"


def test_peft_form_is_the_adapter_itself(models: Path, tmp_path: Path) -> None:
    run = finished_run(models / "gpt2", tmp_path / "run", cloud=True)
    files = export(ExportOrder(run, "peft", tmp_path / "deep" / "out", model=str(models / "gpt2")), print)
    assert [path.name for path in files] == [CONFIG_FILE, WEIGHTS_FILE]
    for path in files:
        assert path.read_bytes() == (run / "adapter" / path.name).read_bytes()
    config = load_adapter(tmp_path / "deep" / "out").config
    assert isinstance(config, LoraConfig)
    assert config.r == 4


def test_an_unknown_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--to: expected one of peft, adapter, merged, got 'gguf'"):
        export(ExportOrder(tmp_path, "gguf", tmp_path / "out"), print)


def test_a_folder_with_something_in_it_is_left_alone_unless_forced(models: Path, tmp_path: Path) -> None:
    run, out = finished_run(models / "llama", tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    for name in ("mine.txt", "model-00001-of-00002.safetensors", "model.safetensors.index.json", CONFIG_FILE):
        (out / name).write_text("")
    with pytest.raises(ConfigError, match="--force"):
        export(ExportOrder(run, "merged", out), print)
    export(ExportOrder(run, "merged", out, force=True), print)
    names = {path.name for path in out.iterdir()}
    assert names == {"mine.txt", "config.json", "generation_config.json", "model.safetensors"}


def test_a_file_in_the_place_of_the_folder_is_refused_even_with_force(models: Path, tmp_path: Path) -> None:
    run = finished_run(models / "llama", tmp_path / "run")
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="with something in it"):
        export(ExportOrder(run, "peft", tmp_path / "out", force=True), print)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_run_on_the_clouds_model_needs_the_model_to_merge(models: Path, tmp_path: Path) -> None:
    run = finished_run(models / "llama", tmp_path / "run", cloud=True)
    with pytest.raises(ConfigError, match="expected the whole model on this device"):
        export(ExportOrder(run, "merged", tmp_path / "out"), print)
    export(ExportOrder(run, "merged", tmp_path / "out", model=str(models / "llama")), print)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_model_that_is_not_here_is_named(models: Path, tmp_path: Path) -> None:
    run = finished_run(models / "llama", tmp_path / "run")
    with pytest.raises(ModelError, match="Merging needs the whole model on this device"):
        export(ExportOrder(run, "merged", tmp_path / "out", model=str(tmp_path / "gone")), print)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_another_model_is_refused(models: Path, tmp_path: Path, form: str) -> None:
    run = finished_run(models / "gpt_neox", tmp_path / "run")
    with pytest.raises((CheckpointError, ConfigError), match="Adapter weights"):
        export(ExportOrder(run, form, tmp_path / "out", model=str(models / "bloom")), print)
    assert not (tmp_path / "out").exists()


def test_a_run_without_an_adapter_is_refused(models: Path, tmp_path: Path) -> None:
    run = finished_run(models / "llama", tmp_path / "run")
    shutil.rmtree(run / "adapter")
    with pytest.raises(CheckpointError, match=r"expected a folder with adapter_config\.json"):
        export(ExportOrder(run, "peft", tmp_path / "out"), print)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"run\.toml"):
        export(ExportOrder(tmp_path, "peft", tmp_path / "out"), print)


def test_a_model_that_overflows_is_refused(models: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    whole = AutoModelForCausalLM.from_pretrained(models / "llama")
    with torch.no_grad():
        whole.model.layers[0].self_attn.q_proj.weight[0, 0] = float("inf")
    whole.save_pretrained(model)
    with pytest.raises(NonFiniteError, match="Merging"):
        export(ExportOrder(finished_run(model, tmp_path / "run"), "merged", tmp_path / "out"), print)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_refuses_is_a_storage_error(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished_run(models / "llama", tmp_path / "run")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(StorageError, match="No space left on device"):
        export(ExportOrder(run, "peft", tmp_path / "out"), print)
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_an_output_folder_under_a_file_is_a_storage_error(models: Path, tmp_path: Path) -> None:
    run = finished_run(models / "llama", tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Exporting"):
        export(ExportOrder(run, "peft", tmp_path / "file" / "out"), print)
