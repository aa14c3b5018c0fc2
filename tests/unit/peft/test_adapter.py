"""Serial adapters: the configuration is checked by name, the module is its formula, the files are read with care."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tidelock.device.bank import Bank
from tidelock.errors import CheckpointError, ConfigError
from tidelock.model.ends import empty_model, read_config
from tidelock.model.geometry import Geometry, Place, SiteId, geometry_of
from tidelock.peft.adapter import AdapterConfig, SerialAdapter, adapter_targets
from tidelock.peft.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from tidelock.peft.attach import attach_adapter
from tidelock.peft.export import apply_adapter, load_adapter, save_adapter
from tidelock.peft.methods import check_config

_HOULSBY = AdapterConfig(bottleneck=4, places=("attn-out", "mlp"))


@pytest.fixture(scope="module")
def geometry(tiny_folder: Path) -> Geometry:
    return geometry_of(empty_model(read_config(tiny_folder)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bottleneck": 0}, "bottleneck: expected a whole number of 1 or more, got 0"),
        ({"bottleneck": True}, "bottleneck: expected a whole number of 1 or more, got True"),
        ({"bottleneck": 2.5}, "bottleneck: expected a whole number of 1 or more, got 2.5"),
        ({"places": ()}, "places: expected some of attn-out, mlp, each once"),
        ({"places": ("mlp", "mlp")}, "places: expected some of attn-out, mlp, each once"),
        ({"places": ("attn",)}, "places: expected some of attn-out, mlp, each once"),
        ({"activation": "wave"}, "activation: expected one that transformers knows, got 'wave'"),
        ({"scaling": 0.0}, "scaling: expected more than 0, and finite"),
        ({"scaling": float("inf")}, "scaling: expected more than 0, and finite"),
        ({"dropout": 1.0}, "dropout: expected at least 0 and below 1"),
        ({"init": "zeros"}, "init: expected one of zero, bert"),
    ],
)
def test_settings_that_break_their_rule_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"^Adapter's {reason}"):
        AdapterConfig(**changes)


def test_what_is_no_configuration_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected a peft.LoraConfig, a tidelock.Adapter.* or a .*, got dict"):
        check_config({"r": 8})  # type: ignore[arg-type]


def test_sites_are_in_the_order_of_a_pass_whatever_is_named_first(geometry: Geometry) -> None:
    targets = adapter_targets(AdapterConfig(places=("mlp", "attn-out"), layers=(2, 0)), geometry)
    assert targets == {
        SiteId(0, Place.ATTN_OUT): ("o_proj",),
        SiteId(0, Place.MLP): ("down_proj",),
        SiteId(2, Place.ATTN_OUT): ("o_proj",),
        SiteId(2, Place.MLP): ("down_proj",),
    }
    assert list(targets) == sorted(targets)


@pytest.mark.parametrize("layers", [(), (3,), (0, -1)])
def test_blocks_that_are_not_there_are_refused(geometry: Geometry, layers: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"Adapter's layers: expected some of 0 to 2"):
        adapter_targets(AdapterConfig(layers=layers), geometry)


def test_an_adapter_is_its_formula() -> None:
    adapter = SerialAdapter(6, AdapterConfig(bottleneck=3, activation="relu", scaling=0.5, init="bert"))
    x = torch.randn(7, 6)
    expected = 0.5 * torch.relu(x @ adapter.down.weight.T) @ adapter.up.weight.T
    assert torch.allclose(adapter(x, None), expected)
    assert torch.equal(adapter(x, 3), adapter(x, None))
    assert {name: tuple(p.shape) for name, p in adapter.named_parameters()} == {
        "down.weight": (3, 6),
        "up.weight": (6, 3),
    }


def test_dropout_is_of_the_input_and_repeated_by_its_seed() -> None:
    adapter = SerialAdapter(400, AdapterConfig(bottleneck=400, activation="linear", dropout=0.25))
    with torch.no_grad():
        adapter.down.weight.copy_(torch.eye(400))
        adapter.up.weight.copy_(torch.eye(400))
    ones = torch.ones(50, 400)
    dropped = adapter(ones, 9)
    assert torch.equal(dropped, adapter(ones, 9))
    assert not torch.equal(dropped, adapter(ones, 10))
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.75])
    # 20,000 draws: five standard deviations are 0.02.
    assert float(dropped.detach().mean()) == pytest.approx(1, abs=0.025)


@pytest.fixture
def saved(geometry: Geometry, tmp_path: Path) -> Path:
    bank = Bank(_HOULSBY, geometry)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_()
    modules = {site: bank.at(site) for site in bank.targets if site.block != 1}
    save_adapter(modules, _HOULSBY, geometry, tmp_path / "adapter", base_model="some/model")
    return tmp_path / "adapter"


def test_the_files_are_as_documented(saved: Path) -> None:
    values = json.loads((saved / CONFIG_FILE).read_text())
    assert values == {
        "peft_type": "TIDELOCK_SERIAL_ADAPTER",
        "format_version": 1,
        "base_model_name_or_path": "some/model",
        **asdict(_HOULSBY),
        "places": ["attn-out", "mlp"],
        "layers": [0, 2],
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(saved / WEIGHTS_FILE).items()}
    assert shapes == {
        f"blocks.{block}.{place}.{half}.weight": shape
        for block in (0, 2)
        for place in ("attn-out", "mlp")
        for half, shape in (("down", (4, 32)), ("up", (32, 4)))
    }


def test_what_was_saved_is_loaded(saved: Path, geometry: Geometry) -> None:
    adapter = load_adapter(saved)
    bank = Bank(adapter.config, geometry)
    assert bank.numbers == (0, 2)
    apply_adapter(adapter, {site: bank.at(site) for site in bank.targets}, geometry)
    stored = load_file(saved / WEIGHTS_FILE)
    for site in bank.targets:
        assert torch.equal(bank.at(site).up.weight, stored[f"{site.name}.up.weight"])  # type: ignore[union-attr, arg-type]


_DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "another format": lambda values: values.update(format_version=2),
    "an unknown field": lambda values: values.update(colour="red"),
    "a broken rule": lambda values: values.update(bottleneck=0),
    "another type": lambda values: values.update(places=7),
    "text for a number": lambda values: values.update(scaling="much"),
}


@pytest.mark.parametrize("damage", _DAMAGES)
def test_a_damaged_configuration_is_refused(saved: Path, damage: str) -> None:
    values = json.loads((saved / CONFIG_FILE).read_text())
    _DAMAGES[damage](values)
    (saved / CONFIG_FILE).write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"Adapter: expected the configuration of a serial adapter, format 1, got: "):
        load_adapter(saved)


def test_weights_of_another_shape_are_refused(saved: Path, geometry: Geometry) -> None:
    tensors = load_file(saved / WEIGHTS_FILE)
    save_file({**tensors, "blocks.0.mlp.up.weight": torch.zeros(32, 5)}, saved / WEIGHTS_FILE)
    adapter = load_adapter(saved)
    bank = Bank(adapter.config, geometry)
    with pytest.raises(CheckpointError, match=r"'blocks.0.mlp.up.weight': expected .*\(32, 4\), got .*\(32, 5\)"):
        apply_adapter(adapter, {site: bank.at(site) for site in bank.targets}, geometry)


def test_lora_is_not_attached_by_hooks(tiny_folder: Path, geometry: Geometry, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"])
    bank = Bank(config, geometry)
    save_adapter({site: bank.at(site) for site in bank.targets}, config, geometry, tmp_path, base_model="m")
    with pytest.raises(ConfigError, match=r"Attaching an adapter: expected a serial one, got LoRA"):
        attach_adapter(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path)
