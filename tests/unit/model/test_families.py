"""Families: every row of the table is true of transformers' own class; what is not in it is looked at or refused."""

from __future__ import annotations

import logging

import pytest
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tidelock.errors import ModelError
from tidelock.model.ends import empty_model
from tidelock.model.families import FAMILIES, family_of
from tidelock.model.geometry import geometry_of

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def make(model_type, **more):
    return empty_model(AutoConfig.for_model(model_type, **{**SMALL, **more}))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_known_family_is_where_the_table_says(name, caplog):
    model = make(name, **({"head_dim": 8} if name.startswith(("gemma", "qwen3")) else {}))
    family = family_of(model)
    assert (family.name, family.verified) == (name, True)
    blocks = model.get_submodule(f"{family.decoder}.{family.blocks}")
    assert isinstance(blocks, nn.ModuleList)
    assert len(blocks) == geometry_of(model).num_blocks == 2
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("name", "decoder", "blocks", "attention", "projections"),
    [
        ("stablelm", "model", "layers", "self_attn", ("q_proj", "k_proj", "v_proj")),
        ("mpt", "transformer", "blocks", "attn", ("Wqkv",)),
        ("gpt_bigcode", "transformer", "h", "attn", ("c_attn",)),
        ("codegen", "transformer", "h", "attn", ("qkv_proj",)),
        ("mixtral", "model", "layers", "self_attn", ("q_proj", "k_proj", "v_proj")),
    ],
)
def test_another_family_is_found_by_structure_and_said_to_be_unverified(
    name, decoder, blocks, attention, projections, caplog
):
    with caplog.at_level(logging.WARNING):
        family = family_of(make(name))
    assert (family.name, family.decoder, family.blocks, family.attention) == (name, decoder, blocks, attention)
    assert (family.projections, family.verified) == (projections, False)
    assert f"Model family '{name}' is unverified" in caplog.text


def test_a_model_without_attention_is_refused():
    with pytest.raises(ModelError, match=r"type 'mamba': expected a decoder .* got 0 such lists \(MambaForCausalLM\)"):
        family_of(make("mamba"))


def test_a_model_with_two_attentions_a_block_is_refused():
    with pytest.raises(ModelError, match=r"got 2 such lists \(BartForCausalLM\)"):
        family_of(AutoModelForCausalLM.from_config(AutoConfig.for_model("bart", **SMALL, decoder_layers=2)))


def test_an_encoder_decoder_is_refused():
    model = make("stablelm")
    model.config.is_encoder_decoder = True
    with pytest.raises(ModelError, match="expected a decoder"):
        family_of(model)
