"""Geometry: every width that crosses the cut, and a refusal where the parts are not what they should be."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaModel

from tests.support.sites import attn
from tidelock.errors import ModelError
from tidelock.model.ends import empty_model
from tidelock.model.geometry import Projection, geometry_of

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


def make(model_type, **more):
    return empty_model(AutoConfig.for_model(model_type, **{**SMALL, **more}))


def test_grouped_heads_have_narrower_keys_and_values():
    geometry = geometry_of(make("llama", num_key_value_heads=2, max_position_embeddings=77))
    site = geometry.sites[attn(1)]
    assert (attn(1).name, site.width) == ("blocks.1.attn", 32)
    assert site.projections == (Projection("q_proj", 32), Projection("k_proj", 16), Projection("v_proj", 16))
    assert (geometry.embedding_width, geometry.final_width, geometry.vocab_size) == (32, 32, 64)
    assert (geometry.max_positions, geometry.num_blocks) == (77, 2)
    assert geometry.projection_path(1, "q_proj") == "model.layers.1.self_attn.q_proj"


def test_the_width_of_an_answer_is_that_of_the_named_projections():
    site = geometry_of(make("llama", num_key_value_heads=2)).sites[attn(0)]
    assert [site.output_width(names) for names in ((), ("v_proj",), ("q_proj", "v_proj"))] == [0, 16, 48]


def test_gpt2_keeps_its_weights_transposed():
    site = geometry_of(make("gpt2")).sites[attn(0)]
    assert (site.width, site.projections) == (32, (Projection("c_attn", 96),))


def test_opt_may_have_embeddings_narrower_than_its_blocks():
    geometry = geometry_of(make("opt", word_embed_proj_dim=16, ffn_dim=64))
    assert (geometry.embedding_width, geometry.final_width, geometry.sites[attn(0)].width) == (16, 16, 32)
    assert geometry.projection_path(0, "k_proj") == "model.decoder.layers.0.self_attn.k_proj"


def test_bloom_states_no_longest_row():
    assert geometry_of(make("bloom")).max_positions is None


def test_other_linears_are_all_but_the_sites():
    geometry = geometry_of(make("llama"))
    names = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert set(geometry.other_linears) == {f"model.layers.{block}.{name}" for block in (0, 1) for name in names}


def test_a_model_without_a_head_is_refused():
    model = LlamaModel(LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64))
    with pytest.raises(ModelError, match=r"Cutting LlamaModel: expected a word embedding and a linear .* and NoneType"):
        geometry_of(model)


def test_projections_that_are_not_linear_are_refused():
    model = make("llama")
    model.model.layers[1].self_attn.k_proj = nn.Identity()
    with pytest.raises(ModelError, match="Projection 'k_proj': expected a linear layer, got Identity"):
        geometry_of(model)


def test_blocks_of_another_kind_among_them_are_refused():
    model = make("llama")
    del model.model.layers[1].self_attn
    with pytest.raises(ModelError, match=r"Cutting block 1: expected .* as in block 0, got none \(LlamaDecoderLayer\)"):
        geometry_of(model)


def test_projections_that_read_different_widths_are_refused():
    model = make("llama")
    model.model.layers[1].self_attn.v_proj = nn.Linear(8, 32)
    with pytest.raises(ModelError, match=r"Cutting block 1: expected all of .* inputs of one width, got \[8, 32\]"):
        geometry_of(model)
