from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.tiny_models import save_tiny_model
from tidelock.device.bank import Bank
from tidelock.errors import CheckpointError, ConfigError, StorageError
from tidelock.model.cut import CutModel
from tidelock.model.ends import empty_model, read_config
from tidelock.model.geometry import Geometry, SiteId, geometry_of
from tidelock.model.rows import Rows
from tidelock.model.walk import Batch, Walk
from tidelock.peft.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from tidelock.peft.export import apply_adapter, load_adapter, save_adapter
from tidelock.peft.lora import ALL_PROJECTIONS, LoraModule

FAMILIES = ["llama", "gpt2", "gpt_neox", "bloom", "opt", "phi3", "gemma2"]
IDS = torch.tensor([[5, 9, 2, 40, 17, 33], [8, 1, 77, 3, 60, 21]])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        save_tiny_model(name, folder)
    return folder


def geometry_at(folder: Path) -> Geometry:
    return geometry_of(empty_model(read_config(folder)))


def lora_modules(bank: Bank) -> dict[SiteId, LoraModule]:
    return {site: cast("LoraModule", bank.at(site)) for site in bank.targets}


def trained(config: LoraConfig, geometry: Geometry) -> dict[SiteId, LoraModule]:
    """Return modules whose every weight is random, as after training."""
    bank = Bank(config, geometry)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_(std=0.3)
    return lora_modules(bank)


class BankSites:
    def __init__(self, modules: dict[SiteId, LoraModule]) -> None:
        self.modules = modules

    def forward(self, site: SiteId, x_ND: torch.Tensor) -> torch.Tensor:
        y_NW: torch.Tensor = self.modules[site](x_ND, None)
        return y_NW

    def backward(self, site: SiteId, grad_NW: torch.Tensor, *, need_input: bool) -> torch.Tensor | None:
        pytest.fail("no backward pass is asked for")


def our_states(folder: Path, modules: dict[SiteId, LoraModule]) -> torch.Tensor:
    """Return the decoder's final states with our modules at the sites."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    cut = CutModel(model)
    rows = Rows((0, 0), (IDS.shape[1],) * 2, IDS.shape[1])
    active = {site: module.targets for site, module in modules.items()}
    embeddings = model.get_input_embeddings()(IDS).flatten(0, 1).detach()
    batch = Batch(embeddings, rows, torch.arange(rows.num_tokens), active, training=False)
    with torch.no_grad():
        return Walk(cut, batch, BankSites(modules)).forward()


@torch.no_grad()
def peft_states(folder: Path, adapter: Path) -> torch.Tensor:
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    family = geometry_at(folder).family
    decoder = plain.get_submodule(family.decoder)
    PeftModel.from_pretrained(plain, str(adapter))
    final_BTD: torch.Tensor = decoder(input_ids=IDS).last_hidden_state
    return final_BTD.flatten(0, 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_we_save_peft_loads_and_computes_alike(models: Path, tmp_path: Path, name: str) -> None:
    folder = models / name
    config = LoraConfig(r=4, lora_alpha=6, target_modules=ALL_PROJECTIONS, use_rslora=True)
    modules = trained(config, geometry_at(folder))
    save_adapter(modules, config, geometry_at(folder), tmp_path / "adapter", base_model=str(folder))
    ours = our_states(folder, modules)
    assert (ours - our_states(folder, {})).abs().max() > 1e-2
    assert (ours - peft_states(folder, tmp_path / "adapter")).abs().max() < 1e-4
    assert config.target_modules == ALL_PROJECTIONS


@pytest.mark.parametrize("name", FAMILIES)
def test_what_peft_saves_we_load_and_compute_alike(models: Path, tmp_path: Path, name: str) -> None:
    folder = models / name
    geometry = geometry_at(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    fan_in_fan_out = name == "gpt2"
    config = LoraConfig(
        r=3, target_modules=list(geometry.family.projections), fan_in_fan_out=fan_in_fan_out, task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(plain, config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    theirs.save_pretrained(str(tmp_path))
    adapter = load_adapter(tmp_path)
    bank = Bank(adapter.config, geometry)
    modules = lora_modules(bank)
    apply_adapter(adapter, modules, geometry)
    assert (our_states(folder, modules) - peft_states(folder, tmp_path)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": None},
        {"target_modules": ["v_proj"], "layers_to_transform": [1, 3]},
        {"target_modules": r".*\.(1|2)\.self_attn\.(q|k)_proj"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]},
        {
            "target_modules": ["q_proj"],
            "rank_pattern": {"layers.2.self_attn.q_proj": 7},
            "alpha_pattern": {"q_proj": 5},
        },
    ],
    ids=["none", "layers", "pattern", "excluded", "ranks"],
)
def test_targets_mean_the_same_to_peft(models: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = models / "llama"
    config = LoraConfig(r=4, **settings)
    modules = trained(config, geometry_at(folder))
    save_adapter(modules, config, geometry_at(folder), tmp_path, base_model=str(folder))
    assert (our_states(folder, modules) - peft_states(folder, tmp_path)).abs().max() < 1e-4
    written = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert isinstance(written["target_modules"], list)
    back = load_adapter(tmp_path)
    again = Bank(back.config, geometry_at(folder))
    assert again.targets == {site: module.targets for site, module in modules.items()}


def test_the_files_are_as_peft_writes_them(models: Path, tmp_path: Path) -> None:
    folder = models / "gpt2"
    config = LoraConfig(r=4, target_modules=ALL_PROJECTIONS)
    modules = trained(config, geometry_at(folder))
    save_adapter(modules, config, geometry_at(folder), tmp_path / "ours", base_model="org/name")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    theirs = get_peft_model(
        plain, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    )
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours, peft = (load_file(tmp_path / side / WEIGHTS_FILE) for side in ("ours", "theirs"))
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in peft.items()}
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    our_config, peft_config = (json.loads((tmp_path / side / CONFIG_FILE).read_text()) for side in ("ours", "theirs"))
    assert our_config["base_model_name_or_path"] == "org/name"
    for values in (our_config, peft_config):
        del values["base_model_name_or_path"]
    assert our_config == peft_config


def saved(models: Path, folder: Path) -> tuple[dict[SiteId, LoraModule], Geometry]:
    geometry = geometry_at(models / "llama")
    config = LoraConfig(r=4, target_modules=["q_proj"])
    modules = trained(config, geometry)
    save_adapter(modules, config, geometry, folder, base_model="llama")
    return modules, geometry


def test_weights_survive_saving_and_loading_bit_for_bit(models: Path, tmp_path: Path) -> None:
    modules, geometry = saved(models, tmp_path)
    before = {name: p.clone() for block in modules for name, p in modules[block].named_parameters(str(block))}
    with torch.no_grad():
        for module in modules.values():
            for parameter in module.parameters():
                parameter.zero_()
    apply_adapter(load_adapter(tmp_path), modules, geometry)
    for block in modules:
        for name, parameter in modules[block].named_parameters(str(block)):
            assert torch.equal(parameter, before[name])


def test_saving_again_replaces_both_files_and_leaves_others(models: Path, tmp_path: Path) -> None:
    saved(models, tmp_path)
    (tmp_path / "README.md").write_text("mine")
    first = (tmp_path / WEIGHTS_FILE).read_bytes()
    saved(models, tmp_path)
    assert (tmp_path / WEIGHTS_FILE).read_bytes() != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", CONFIG_FILE, WEIGHTS_FILE]


def test_a_folder_that_cannot_be_made_is_a_storage_error(models: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Writing the adapter"):
        saved(models, tmp_path / "file" / "adapter")


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(FIRST), "1 missing .*layers.0"),
        (lambda tensors: tensors.update(extra=torch.ones(1)), "1 unexpected .extra."),
        (lambda tensors: tensors.update({FIRST: torch.ones(4, 31)}), r"shape \(4, 32\), got .*\(4, 31\)"),
        (lambda tensors: tensors.update({FIRST: torch.ones(4, 32, dtype=torch.int64)}), "floating-point"),
        (lambda tensors: tensors.update({FIRST: torch.full((4, 32), float("nan"))}), "finite"),
    ],
    ids=["missing", "unexpected", "shape", "dtype", "finite"],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_copied(models: Path, tmp_path: Path, change, said) -> None:
    modules, geometry = saved(models, tmp_path)
    change_weights(tmp_path, change)
    with torch.no_grad():
        for module in modules.values():
            for parameter in module.parameters():
                parameter.zero_()
    with pytest.raises(CheckpointError, match=said):
        apply_adapter(load_adapter(tmp_path), modules, geometry)
    assert all(not parameter.any() for module in modules.values() for parameter in module.parameters())


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a folder with adapter_config\.json"):
        load_adapter(tmp_path / "nowhere")


def test_a_damaged_configuration_is_refused(models: Path, tmp_path: Path) -> None:
    saved(models, tmp_path)
    (tmp_path / CONFIG_FILE).write_text("{")
    with pytest.raises(CheckpointError, match=r"expected a folder with adapter_config\.json"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("values", [{"peft_type": "IA3"}, [], {}])
def test_another_method_is_refused(models: Path, tmp_path: Path, values: object) -> None:
    saved(models, tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="peft_type LORA"):
        load_adapter(tmp_path)


def test_a_contradictory_configuration_is_refused(models: Path, tmp_path: Path) -> None:
    saved(models, tmp_path)
    values = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**values, "target_modules": ".*q", "layers_to_transform": [0]}))
    with pytest.raises(ConfigError, match="that peft understands"):
        load_adapter(tmp_path)


def test_weights_as_pickle_are_refused(models: Path, tmp_path: Path) -> None:
    saved(models, tmp_path)
    (tmp_path / WEIGHTS_FILE).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"got adapter_model\.bin"):
        load_adapter(tmp_path)


def test_a_cut_off_weights_file_is_refused(models: Path, tmp_path: Path) -> None:
    saved(models, tmp_path)
    whole = (tmp_path / WEIGHTS_FILE).read_bytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="whole safetensors file"):
        load_adapter(tmp_path)
