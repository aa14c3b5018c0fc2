"""LoRA: the configuration is honoured or refused by name, and the branches are what the formula says."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig

from tests.support.sites import attn
from tidelock.errors import ConfigError
from tidelock.model.ends import empty_model, read_config
from tidelock.model.geometry import geometry_of
from tidelock.peft.lora import ALL_PROJECTIONS, LoraBranch, LoraModule, check_lora_config, lora_targets

# All that a configuration may say; a field that a new release of peft brings is refused until it is put here.
HONOURED = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "use_rslora": True,
    "target_modules": {"q_proj"},
    "exclude_modules": {"k_proj"},
    "layers_to_transform": [0],
    "layers_pattern": "layers",
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2},
    "init_lora_weights": "gaussian",
    "fan_in_fan_out": True,
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
    "base_model_name_or_path": "somewhere",
    "revision": "main",
    "auto_mapping": {"parent_library": "x"},
    "peft_type": "LORA",
    "peft_version": "0.1",
    "runtime_config": object(),
}
FIELDS = [field.name for field in fields(LoraConfig)]


@pytest.fixture(scope="module")
def geometry(tiny_folder):
    return geometry_of(empty_model(read_config(tiny_folder)))


def make_config(**values):
    """Return a configuration with fields set past peft's own checks."""
    config = LoraConfig()
    for name, value in values.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_honoured_or_refused_by_name(name):
    if name in HONOURED:
        check_lora_config(make_config(**{name: HONOURED[name]}))
        return
    with pytest.raises(ConfigError, match=f"LoraConfig.{name}: expected .* Leave this one out"):
        check_lora_config(make_config(**{name: ["something"]}))


def test_the_default_and_what_says_nothing_are_taken():
    check_lora_config(LoraConfig())
    for name in set(FIELDS) - set(HONOURED):
        check_lora_config(make_config(**{name: getattr(LoraConfig(), name)}))


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"lora_bias": True},
        {"trainable_token_indices": [1]},
        {"layer_replication": [(0, 2), (1, 3)]},
        {"megatron_config": {"x": 1}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_peft_would_do_and_we_would_not_is_refused(settings):
    with pytest.raises(ConfigError, match=f"LoraConfig.{next(iter(settings))}: "):
        check_lora_config(LoraConfig(**settings))


@pytest.mark.parametrize(
    "init", [False, "pissa", "pissa_niter_4", "olora", "loftq", "eva", "corda", "orthogonal", None]
)
def test_starts_that_need_the_frozen_weights_or_are_not_from_zero_are_refused(init):
    with pytest.raises(ConfigError, match=r"LoraConfig.init_lora_weights: expected one of"):
        check_lora_config(make_config(init_lora_weights=init))


EVERY = ("q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize(
    ("settings", "targets"),
    [
        ({}, dict.fromkeys(range(3), ("q_proj", "v_proj"))),  # peft's own default for llama
        ({"target_modules": ["v_proj", "q_proj"]}, dict.fromkeys(range(3), ("q_proj", "v_proj"))),
        ({"target_modules": ["v_proj"], "layers_to_transform": [2, 0]}, {0: ("v_proj",), 2: ("v_proj",)}),
        ({"target_modules": ["self_attn.k_proj"]}, dict.fromkeys(range(3), ("k_proj",))),
        ({"target_modules": ["layers.1.self_attn.k_proj"]}, {1: ("k_proj",)}),
        ({"target_modules": r".*\.[02]\.self_attn\.(q|v)_proj"}, {0: ("q_proj", "v_proj"), 2: ("q_proj", "v_proj")}),
        ({"target_modules": list(EVERY), "exclude_modules": ["k_proj"]}, dict.fromkeys(range(3), ("q_proj", "v_proj"))),
        ({"target_modules": [ALL_PROJECTIONS]}, dict.fromkeys(range(3), EVERY)),
    ],
    ids=str,
)
def test_targets_are_chosen_by_pefts_rules(geometry, settings, targets):
    config = LoraConfig(**settings)
    before = config.target_modules
    assert lora_targets(config, geometry) == {attn(block): names for block, names in targets.items()}
    assert config.target_modules == before


def test_a_family_that_peft_does_not_know_is_targeted_everywhere():
    config = AutoConfig.for_model("smollm3", hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=64,
                                  num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=2)  # fmt: skip
    geometry = geometry_of(empty_model(config))
    assert lora_targets(LoraConfig(), geometry)[attn(0)] in {EVERY, ("q_proj", "v_proj")}
    assert lora_targets(LoraConfig(), geometry_named(geometry, "nobody-knows-this")) == {attn(0): EVERY}


def geometry_named(geometry, name):
    family = geometry.family
    renamed = type(family)(name, family.decoder, family.blocks, family.attention, family.projections)
    return type(geometry)(**{**{f.name: getattr(geometry, f.name) for f in fields(geometry)}, "family": renamed})


@pytest.mark.parametrize(
    "modules",
    [
        ["o_proj"],
        ["q_proj", "up_proj"],
        ["lm_head"],
        ["nonsense"],
        [ALL_PROJECTIONS, "o_proj"],
        ".*",
        r".*self_attn.*",
        r".*_proj",
        "model.layers.0.mlp.down_proj",
    ],
    ids=str,
)  # fmt: skip
def test_targets_beyond_the_sites_are_refused(geometry, modules):
    with pytest.raises(ConfigError, match=r"LoraConfig.target_modules: expected names out of"):
        lora_targets(LoraConfig(target_modules=modules), geometry)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "layers_to_transform": [7]},
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        {"target_modules": "nothing like it"},
        {"target_modules": "all-linear"},
        {"target_modules": []},
    ],
    ids=str,
)
def test_matching_nothing_is_refused(geometry, settings):
    with pytest.raises(ConfigError, match=r"expected to match some of .* in blocks 0 to 2, got no match"):
        lora_targets(LoraConfig(**settings), geometry)


def branch(**settings):
    return LoraBranch(32, 16, LoraConfig(**settings), "model.layers.1.self_attn.k_proj")


@pytest.mark.parametrize(
    ("settings", "rank", "scaling"),
    [
        ({"r": 8, "lora_alpha": 32}, 8, 4.0),
        ({"r": 16, "lora_alpha": 32, "use_rslora": True}, 16, 8.0),
        ({"r": 8, "lora_alpha": 32, "rank_pattern": {"k_proj": 2}}, 2, 16.0),
        ({"r": 8, "lora_alpha": 32, "rank_pattern": {"q_proj": 2}}, 8, 4.0),
        ({"r": 8, "lora_alpha": 32, "rank_pattern": {r"layers\.1\..*": 4}, "alpha_pattern": {"k_proj": 6}}, 4, 1.5),
        ({"r": 8, "lora_alpha": 32, "rank_pattern": {r"layers\.0\..*": 4}, "alpha_pattern": {"q_proj": 6}}, 8, 4.0),
    ],
    ids=str,
)
def test_rank_and_scaling(settings, rank, scaling):
    made = branch(**settings)
    assert (made.lora_A.weight.shape, made.lora_B.weight.shape) == ((rank, 32), (16, rank))
    assert made.scaling == pytest.approx(scaling)
    assert (made.lora_A.bias, made.lora_B.bias) == (None, None)


def test_a_branch_is_its_formula_and_begins_at_zero():
    made, x = branch(r=4, lora_alpha=8), torch.randn(3, 32)
    assert torch.equal(made(x), torch.zeros(3, 16))
    torch.nn.init.normal_(made.lora_B.weight)
    expected = 2 * x @ made.lora_A.weight.T @ made.lora_B.weight.T
    assert torch.allclose(made(x), expected, atol=1e-5)


def test_the_usual_start_is_uniform_and_the_other_normal():
    torch.manual_seed(0)
    usual = torch.cat([branch(r=64).lora_A.weight.flatten() for _ in range(10)])
    bound = 1 / math.sqrt(32)
    assert usual.abs().max() <= bound
    assert usual.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    normal = torch.cat([branch(r=64, init_lora_weights="gaussian").lora_A.weight.flatten() for _ in range(10)])
    assert normal.std().item() == pytest.approx(1 / 64, rel=0.03)
    assert normal.abs().max() > 3 / 64


def make_module(geometry, targets, **settings):
    torch.manual_seed(0)
    made = LoraModule(attn(1), targets, LoraConfig(r=4, **settings), geometry)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return made


def test_a_modules_branches_lie_side_by_side(geometry):
    module, x = make_module(geometry, EVERY), torch.randn(5, 32)
    y = module(x, None)
    assert y.shape == (5, 64)
    parts = y.split([32, 16, 16], dim=1)
    for part, name in zip(parts, EVERY, strict=True):
        assert torch.equal(part, module.branches[name](x))


def test_patterns_reach_the_branches_of_a_module(geometry):
    module = make_module(geometry, ("q_proj", "v_proj"), rank_pattern={"layers.1.self_attn.v_proj": 3})
    assert [one.lora_A.out_features for one in module.branches.values()] == [4, 3]


def test_dropout_needs_a_seed_and_a_probability(geometry):
    x = torch.randn(5, 32)
    dropping, keeping = make_module(geometry, EVERY, lora_dropout=0.5), make_module(geometry, EVERY)
    assert torch.equal(dropping(x, None), keeping(x, None))
    assert torch.equal(keeping(x, 3), keeping(x, None))
    assert not torch.equal(dropping(x, 3), dropping(x, None))
    assert torch.equal(dropping(x, 3), dropping(x, 3))
    assert dropping.dropout == 0.5


def test_dropout_leaves_the_global_random_state_alone(geometry):
    module, state = make_module(geometry, EVERY, lora_dropout=0.5), torch.get_rng_state()
    module(torch.ones(5, 32), 3)
    assert torch.equal(torch.get_rng_state(), state)
