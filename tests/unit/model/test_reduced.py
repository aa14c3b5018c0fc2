"""Reduced configurations: every width shrinks, heads stay, rotary embedding can still halve a head."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from tests.support.tiny_models import ALL_MODELS
from tidelock.errors import ModelError
from tidelock.model.call import call_decoder
from tidelock.model.ends import empty_model
from tidelock.model.families import family_of
from tidelock.model.reduced import reduced_config, reduced_decoder
from tidelock.model.rows import Rows


def make(model_type, **settings):
    return AutoConfig.for_model(model_type, **settings)


def widths(config):
    return config.hidden_size, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@pytest.mark.parametrize(
    ("config", "hidden", "head"),
    [
        (make("llama", hidden_size=576, num_attention_heads=9, num_key_value_heads=3), 72, 8),  # SmolLM2-135M
        (make("llama", hidden_size=4096, num_attention_heads=32), 512, 16),
        (make("gemma3_text", hidden_size=640, num_attention_heads=4, head_dim=256), 80, 32),
        (make("qwen2", hidden_size=896, num_attention_heads=14, num_key_value_heads=2), 112, 8),
        (make("gpt2", n_embd=768, n_head=12), 96, 8),
        (make("bloom", hidden_size=4096, n_head=32), 512, 16),
        # A quarter of a head turns, in pairs: 12 of 96 channels would be 3, so 16 stay.
        (
            make(
                "gpt_neox",
                hidden_size=6144,
                num_attention_heads=64,
                rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
            ),
            1024,
            16,
        ),
        (make("llama", hidden_size=60, num_attention_heads=6), 12, 2),  # 60/8 is 7.5, up to a multiple of 6 heads
    ],
    ids=lambda value: value.model_type if hasattr(value, "model_type") else str(value),
)
def test_widths_of_an_eighth(config, hidden, head):
    small = reduced_config(config, 8, range(config.num_hidden_layers))
    assert widths(small) == (hidden, head)
    assert small.num_attention_heads == config.num_attention_heads
    assert getattr(small, "num_key_value_heads", 0) == getattr(config, "num_key_value_heads", 0)
    assert small.num_hidden_layers == config.num_hidden_layers


def test_a_reduction_of_one_changes_no_width():
    config = make("llama", hidden_size=96, intermediate_size=200, num_attention_heads=4)
    small = reduced_config(config, 1, range(32))
    assert (small.hidden_size, small.intermediate_size, small.head_dim) == (96, 200, 24)


def test_a_head_is_never_wider_than_the_backbones():
    config = make("stablelm", hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    assert widths(reduced_config(config, 8, [0])) == (32, 8)


def test_feed_forward_widths_go_by_the_familys_names():
    assert reduced_config(make("opt", ffn_dim=3072), 8, [0]).ffn_dim == 384
    assert reduced_config(make("gpt2", n_inner=1000), 8, [0]).n_inner == 125
    assert reduced_config(make("gpt2"), 8, [0]).n_inner is None


def test_dropout_is_as_asked_and_not_the_familys():
    for kind, names in (
        ("gpt2", ("resid_pdrop", "embd_pdrop", "attn_pdrop")),
        ("opt", ("dropout", "attention_dropout")),
        ("llama", ("attention_dropout",)),
        ("t5", ("dropout_rate",)),
        ("bart", ("dropout", "attention_dropout", "activation_dropout")),
    ):
        for asked in (0.0, 0.25):
            small = reduced_config(make(kind), 1, [0], [0], dropout=asked)
            assert [getattr(small, name) for name in names] == [asked] * len(names)


def test_what_blocks_state_each_follows_the_tapped_blocks():
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    small = reduced_config(make("gemma3_text", num_hidden_layers=4, layer_types=kinds), 8, [1, 2])
    assert small.layer_types == ["sliding_attention", "full_attention"]
    small = reduced_config(make("smollm3", num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0]), 8, [0, 3])
    assert small.no_rope_layers == [1, 0]


def test_gemmas_scale_of_attention_scores_shrinks_with_the_head():
    config = make("gemma2", head_dim=256, query_pre_attn_scalar=224)
    assert reduced_config(config, 8, [0]).query_pre_attn_scalar == 28


def test_longrope_factors_are_those_of_the_channels_that_turn_as_fast():
    factors = [1.0 + index for index in range(48)]  # Phi-3-mini: 96 channels a head
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": factors,
        "long_factor": factors,
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": 4096,
    }
    config = make("phi3", hidden_size=3072, num_attention_heads=32, rope_parameters=rope)
    small = reduced_config(config, 8, [0])
    assert small.rope_parameters["short_factor"] == [1.0, 9.0, 17.0, 25.0, 33.0, 41.0]
    assert len(small.rope_parameters["long_factor"]) == 6
    assert config.rope_parameters["short_factor"] == factors


@pytest.mark.parametrize("name", ALL_MODELS)
def test_the_decoder_is_the_familys_own_at_the_small_width(name):
    model_type, settings = ALL_MODELS[name]
    config = make(model_type, **settings)
    family = family_of(empty_model(config))
    small = reduced_config(config, 8, [0, 3])
    decoder = reduced_decoder(small, family)
    assert type(decoder) is type(empty_model(config).get_submodule(family.decoder))
    blocks = decoder.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    assert len(blocks) == 2
    assert not [name for name, _ in decoder.named_parameters() if "embed_tokens" in name or "wte" in name]
    layout = Rows((0, 0), (5, 5), 5).layout(torch.device("cpu"))
    state = call_decoder(decoder, torch.randn(2, 5, small.hidden_size), layout)
    assert state.shape == (2, 5, small.hidden_size)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("codegen", {"n_embd": 32, "n_head": 4, "n_layer": 1, "rotary_dim": 8}),
        ("gpt_neo", {"num_layers": 2, "attention_types": [[["global"], 2]]}),
    ],
)
def test_a_width_that_the_class_does_not_take_is_refused(name, settings):
    # CodeGen turns a fixed number of channels; GPT-Neo states kinds of attention for its number of blocks.
    config = make(name, **settings)
    with pytest.raises(ModelError, match=rf"A side network for a model of type '{name}': expected its class to comp"):
        reduced_decoder(reduced_config(config, 8, [0]), family_of(empty_model(config)))
