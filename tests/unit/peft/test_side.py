"""Side networks: what a configuration may say, and how a fresh one starts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoConfig

from tests.support.tiny_models import ALL_MODELS, BLOCKS
from tidelock.errors import ConfigError
from tidelock.model.ends import empty_model
from tidelock.model.geometry import geometry_of
from tidelock.model.rows import Rows
from tidelock.model.taps import Taps
from tidelock.peft.side import SideConfig, SideNetwork


def network(name="llama", **settings):
    model_type, model_settings = ALL_MODELS[name]
    config = AutoConfig.for_model(model_type, **model_settings)
    return SideNetwork(SideConfig(**{"init": "random", **settings}), config, geometry_of(empty_model(config)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reduction", 0),
        ("reduction", 2.5),
        ("taps", (0, 1.5)),
        ("seed", None),
        ("zero_upsample", 1),
        ("dropout", 1.0),
        ("temperature", float("inf")),
        ("taps", ()),
        ("taps", (2, 1)),
        ("taps", (1, 1)),
        ("taps", (-1, 2)),
        ("init", "svd"),
        ("output", "merge"),
        ("temperature", 0.0),
    ],
)
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=rf"SideConfig\.{field}: expected .*, got "):
        dataclasses.replace(SideConfig(), **{field: value})


def test_an_output_that_would_be_zero_is_refused():
    with pytest.raises(ConfigError, match=r"SideConfig\.zero_upsample: expected False with output 'alone'"):
        SideConfig(output="alone")
    SideConfig(output="alone", zero_upsample=False)


def test_every_block_is_tapped_unless_some_are_chosen():
    assert SideConfig().blocks(4) == (0, 1, 2, 3)
    assert SideConfig(taps=(1, 3)).blocks(4) == (1, 3)
    assert network(taps=(0, 3)).blocks == (0, 3)


def test_the_same_seed_gives_the_same_network_whatever_the_global_generator():
    torch.manual_seed(1)
    first = network(seed=5).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = network(seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["side.start.weight"], network(seed=6).state_dict()["side.start.weight"])


def test_gates_start_in_the_middle():
    made = network()
    assert torch.sigmoid(made.side.gates).tolist() == [0.5] * BLOCKS
    assert torch.sigmoid(made.head.gate).item() == 0.5


def test_padding_changes_no_real_token():
    made = network(zero_upsample=False).eval()
    rows, padded = Rows((0,), (3,), 3), Rows((0, 0), (3, 5), 5)
    tokens = torch.randn(8, 32)

    def run(rows, x):
        taps = Taps((x, x + 1, x + 2, x + 3), x)
        return made(x, taps, rows.layout(torch.device("cpu")), torch.arange(len(x)))

    torch.testing.assert_close(run(padded, tokens)[:3], run(rows, tokens[:3]))


def test_taps_of_another_dtype_are_taken():
    made = network(zero_upsample=False)
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    rows = Rows((0,), (3,), 3)
    out = made(x, Taps((x,) * 4, x), rows.layout(torch.device("cpu")), torch.arange(3))
    assert out.dtype == torch.float32
