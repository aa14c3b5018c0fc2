"""Cores: the configuration is checked by name, the module is its formula, the files are read with care."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from tests.support.sites import attn
from tidelock.device.bank import Bank
from tidelock.errors import CheckpointError, ConfigError
from tidelock.model.ends import empty_model, read_config
from tidelock.model.frames import FrameChoice
from tidelock.model.geometry import Geometry, geometry_of
from tidelock.peft.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from tidelock.peft.core import CoreConfig, CoreModule, core_targets
from tidelock.peft.core_files import CORE_CONFIG_FILE, CORE_WEIGHTS_FILE
from tidelock.peft.export import apply_adapter, load_adapter, save_adapter


@pytest.fixture(scope="module")
def geometry(tiny_folder: Path) -> Geometry:
    return geometry_of(empty_model(read_config(tiny_folder)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rank": 0}, "rank: expected a whole number of 1 or more, got 0"),
        ({"rank": 2.0}, "rank: expected a whole number of 1 or more, got 2.0"),
        ({"rank": True}, "rank: expected a whole number of 1 or more, got True"),
        ({"scaling": 0.0}, "scaling: expected more than 0, and finite, got 0.0"),
        ({"scaling": float("nan")}, "scaling: expected more than 0, and finite, got nan"),
        ({"frames": "random"}, "frames: expected one of seeded, svd, got 'random'"),
        ({"frames": ["svd"]}, r"frames: expected one of seeded, svd, got \['svd'\]"),
    ],
)
def test_settings_that_break_their_rule_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"^Core's {reason}"):
        CoreConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rank": 17}, "rank: expected at most 16, as this model's projections bear, got 17"),
        ({"targets": ("o_proj",)}, "targets: expected some of"),
        ({"targets": ("q_proj", "o_proj")}, "targets: expected some of"),
        ({"targets": ()}, "targets: expected some of"),
        ({"layers": ()}, "layers: expected some of 0 to 2"),
        ({"layers": (1, 3)}, "layers: expected some of 0 to 2"),
    ],
)
def test_what_the_model_does_not_have_is_refused(geometry: Geometry, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"^Core's {reason}"):
        core_targets(CoreConfig(**{"rank": 4, **changes}), geometry)


def test_targets_are_in_the_order_of_the_site_and_of_a_pass(geometry: Geometry) -> None:
    config = CoreConfig(rank=4, targets=("v_proj", "q_proj"), layers=(2, 0))
    assert core_targets(config, geometry) == {attn(0): ("q_proj", "v_proj"), attn(2): ("q_proj", "v_proj")}
    assert list(core_targets(CoreConfig(rank=4), geometry)) == [attn(0), attn(1), attn(2)]


def test_a_core_is_its_formula_and_begins_at_zero() -> None:
    module = CoreModule(("q_proj", "v_proj"), CoreConfig(rank=3, scaling=0.5))
    z = torch.randn(7, 6)
    assert not module(z, None).any()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    q, v = (module.core(name).weight for name in ("q_proj", "v_proj"))
    assert torch.allclose(module(z, None), 0.5 * torch.cat([z[:, :3] @ q.T, z[:, 3:] @ v.T], dim=1), atol=1e-6)


def test_what_it_learns_follows_from_scale_times_learning_rate() -> None:
    """AdamW's step does not grow with the gradient: so the scale can be chosen once, for LoRA's learning rates."""
    generator = torch.Generator().manual_seed(0)
    z, wanted = (torch.randn(40, 3, generator=generator) for _ in range(2))
    given = []
    for scaling, rate in ((2.0, 0.04), (16.0, 0.005), (16.0, 0.04)):
        module = CoreModule(("q_proj",), CoreConfig(rank=3, scaling=scaling))
        optimizer = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=0.0, eps=1e-30)
        for _ in range(5):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(module(z, None), wanted).backward()
            optimizer.step()
        given.append(module(z, None).detach())
    torch.testing.assert_close(given[0], given[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(given[1], given[2], atol=0.1)


@pytest.fixture
def saved(geometry: Geometry, tmp_path: Path) -> Path:
    config = CoreConfig(rank=4, targets=("q_proj", "v_proj"))
    bank = Bank(config, geometry)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_()
    modules = {site: bank.at(site) for site in bank.targets if site.block != 1}
    save_adapter(modules, config, geometry, tmp_path / "core", base_model="some/model")
    return tmp_path / "core"


def test_the_files_are_as_documented(saved: Path) -> None:
    own = json.loads((saved / CORE_CONFIG_FILE).read_text())
    assert own == {
        "format_version": 1,
        "rank": 4,
        "scaling": 16.0,
        "frames": "seeded",
        "targets": ["q_proj", "v_proj"],
        "layers": [0, 2],
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(saved / CORE_WEIGHTS_FILE).items()}
    assert shapes == {f"blocks.{block}.attn.{name}.weight": (4, 4) for block in (0, 2) for name in ("q_proj", "v_proj")}
    lora = json.loads((saved / CONFIG_FILE).read_text())
    assert (lora["peft_type"], lora["r"], lora["lora_alpha"]) == ("LORA", 4, 4)
    assert lora["base_model_name_or_path"] == "some/model"
    assert len(load_file(saved / WEIGHTS_FILE)) == 8


def test_what_was_saved_is_loaded(saved: Path, geometry: Geometry) -> None:
    adapter = load_adapter(saved)
    bank = Bank(adapter.config, geometry)
    assert (bank.numbers, bank.frames) == ((0, 2), FrameChoice("seeded", 4))
    apply_adapter(adapter, {site: bank.at(site) for site in bank.targets}, geometry)
    stored = load_file(saved / CORE_WEIGHTS_FILE)
    for site in bank.targets:
        core = cast("CoreModule", bank.at(site)).core("v_proj")
        assert torch.equal(core.weight, stored[f"{site.name}.v_proj.weight"])


def test_frames_that_are_not_named_are_seeded(saved: Path) -> None:
    """As they were before there was a choice; no default may change what an adapter is."""
    path = saved / CORE_CONFIG_FILE
    config = json.loads(path.read_text())
    del config["frames"]
    path.write_text(json.dumps(config))
    assert cast("CoreConfig", load_adapter(saved).config).frames == "seeded"


def test_a_damaged_configuration_is_refused(saved: Path) -> None:
    for text in ('{"format_version": 2}', '{"format_version": 1, "rank": "four"}', "[]"):
        (saved / CORE_CONFIG_FILE).write_text(text)
        with pytest.raises(ConfigError, match=r"Adapter: expected the configuration of a core, format 1, got: "):
            load_adapter(saved)
    (saved / CORE_CONFIG_FILE).write_text("{")
    with pytest.raises(CheckpointError, match=r"Adapter: expected a folder with core_config.json, got "):
        load_adapter(saved)


def test_missing_weights_are_told(saved: Path) -> None:
    (saved / CORE_WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"Adapter: expected its weights in core_model.safetensors, got none"):
        load_adapter(saved)
