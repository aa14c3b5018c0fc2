"""Side networks as files: what is written, that it is read back bit for bit, and that nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.parity import token_batch
from tests.support.plain_side import randomise_side, side_model
from tests.support.tiny_models import save_tiny_model
from tidelock.device.bank import Bank
from tidelock.device.side_model import SideModel
from tidelock.errors import CheckpointError, ConfigError, StorageError
from tidelock.model.ends import empty_model, read_config
from tidelock.model.geometry import geometry_of
from tidelock.peft.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from tidelock.peft.export import load_adapter
from tidelock.peft.side import SideConfig

CONFIG = SideConfig(init="random", zero_upsample=False, taps=(0, 2), reduction=4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture
def saved(llama: Path, tmp_path: Path) -> tuple[SideModel, Path]:
    model = side_model(llama, CONFIG).eval()
    randomise_side(model)
    model.save_adapter(tmp_path / "adapter", "some/model")
    return model, tmp_path / "adapter"


def test_the_files_are_as_documented(saved: tuple[SideModel, Path]) -> None:
    model, folder = saved
    assert json.loads((folder / CONFIG_FILE).read_text()) == {
        "peft_type": "TIDELOCK_SIDE",
        "format_version": 1,
        "base_model_name_or_path": "some/model",
        **asdict(CONFIG),
        "taps": [0, 2],
    }
    stored, parameters = load_file(folder / WEIGHTS_FILE), dict(model.named_parameters())
    assert stored.keys() == parameters.keys()
    assert {name.partition(".")[0] for name in stored} == {"network"}
    assert all(torch.equal(stored[name], parameter) for name, parameter in parameters.items())


def test_without_a_name_the_model_is_named_by_its_folder(saved: tuple[SideModel, Path], llama: Path) -> None:
    model, folder = saved
    model.save_adapter(folder)
    assert json.loads((folder / CONFIG_FILE).read_text())["base_model_name_or_path"] == str(llama)


@pytest.mark.parametrize("num_labels", [None, 3])
def test_what_was_saved_computes_the_same_bit_for_bit(llama: Path, tmp_path: Path, num_labels: int | None) -> None:
    model = side_model(llama, CONFIG, num_labels).eval()
    randomise_side(model)
    model.save_adapter(tmp_path)
    adapter = load_adapter(tmp_path)
    assert adapter.config == CONFIG
    assert adapter.num_labels == num_labels
    again = side_model(llama, replace(CONFIG, seed=99), num_labels).eval()
    batch = token_batch("right")
    with torch.no_grad():
        first, fresh = (m(batch.input_ids, batch.attention_mask).logits for m in (model, again))
        assert not torch.equal(first, fresh)
        again.load_adapter(adapter)
        assert torch.equal(first, again(batch.input_ids, batch.attention_mask).logits)


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("network.head.gate"), r"1 missing \(network\.head\.gate\)"),
        (lambda tensors: tensors.update(extra=torch.ones(1)), r"1 unexpected \(extra\)"),
        (lambda tensors: tensors.update({"head.weight": torch.ones(2, 32)}), r"1 unexpected \(head\.weight\)"),
        (lambda tensors: tensors.update({"network.side.gates": torch.ones(3)}), r"shape \(2,\), got .* of \(3,\)"),
        (lambda tensors: tensors.update({"network.side.gates": torch.ones(2, dtype=torch.int32)}), "floating-point"),
        (lambda tensors: tensors.update({"network.side.gates": torch.full((2,), torch.inf)}), "finite"),
    ],
    ids=["missing", "unexpected", "a head", "shape", "dtype", "finite"],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_copied(
    saved: tuple[SideModel, Path], change: Callable[[dict[str, torch.Tensor]], Any], said: str
) -> None:
    model, folder = saved
    change_weights(folder, change)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with pytest.raises(CheckpointError, match=said):
        model.load_adapter(load_adapter(folder))
    assert not any(parameter.any() for parameter in model.parameters())


_DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "another format": lambda values: values.update(format_version=2),
    "an unknown field": lambda values: values.update(colour="red"),
    "a broken rule": lambda values: values.update(reduction=0),
    "another type": lambda values: values.update(taps=7),
    "text for a number": lambda values: values.update(seed="much"),
}


@pytest.mark.parametrize("damage", _DAMAGES)
def test_a_damaged_configuration_is_refused(saved: tuple[SideModel, Path], damage: str) -> None:
    _, folder = saved
    values = json.loads((folder / CONFIG_FILE).read_text())
    _DAMAGES[damage](values)
    (folder / CONFIG_FILE).write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"Adapter: expected the configuration of a side network, format 1, got: "):
        load_adapter(folder)


def test_a_folder_that_cannot_be_made_is_a_storage_error(saved: tuple[SideModel, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Writing the adapter"):
        saved[0].save_adapter(tmp_path / "file" / "adapter")


def test_it_puts_nothing_at_the_sites(llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"What to train at the sites: .* got a tidelock\.SideConfig"):
        Bank(CONFIG, geometry_of(empty_model(read_config(llama))))
