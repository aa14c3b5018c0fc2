"""Structural pruning: at the full width it copies a backbone exactly; below it the right channels, and whole ones."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.tiny_models import ALL_MODELS, BLOCKS, VOCAB, randomise
from tidelock.errors import ConfigError, ModelError
from tidelock.model.call import call_decoder
from tidelock.model.families import family_of
from tidelock.model.geometry import geometry_of
from tidelock.model.reduced import reduced_config, reduced_decoder
from tidelock.model.rows import Layout
from tidelock.peft.prune import Stack, copy_pruned, fisher_scores, magnitude_scores
from tidelock.peft.side import SideConfig, SideNetwork

MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def make(name, **changes):
    model_type, settings = ALL_MODELS[name]
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**settings, **changes}))
    randomise(model)
    return model.eval()


def stacks(model, reduction, blocks=range(BLOCKS)):
    family, config = family_of(model), model.config
    small = reduced_config(config, reduction, blocks)
    decoder = reduced_decoder(small, family).eval()
    full = Stack(model.get_submodule(family.decoder), family.blocks, config)
    return full, Stack(decoder, family.blocks, small)


@pytest.mark.parametrize("name", ALL_MODELS)
def test_at_the_full_width_the_copy_computes_what_the_backbone_does(name):
    changes = {"word_embed_proj_dim": 32} if name == "opt_projected" else {}
    full, small = stacks(make(name, **changes), 1)
    residual = copy_pruned(full, small, range(BLOCKS), magnitude_scores())
    assert residual.tolist() == list(range(32))
    x = torch.randn(2, 6, 32)
    real = MASK.bool()
    layout = Layout(MASK, None, None, (2, 6))
    with torch.no_grad():
        theirs, ours = (call_decoder(stack.module, x, layout)[real] for stack in (full, small))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ALL_MODELS)
def test_every_weight_is_a_part_of_the_backbones(name):
    full, small = stacks(make(name), 4, (0, 2))
    before = {key: value.clone() for key, value in small.module.state_dict().items()}
    copy_pruned(full, small, (0, 2), magnitude_scores())
    for name_, parameter in small.module.named_parameters():
        index = name_.removeprefix(f"{small.blocks}.").partition(".")
        source = name_ if index[0] not in "01" else f"{full.blocks}.{'02'[int(index[0])]}.{index[2]}"
        assert not torch.equal(parameter, before[name_]), name_
        assert bool(torch.isin(parameter, full.module.get_parameter(source)).all()), name_


def alive(full, keep):
    """Make all channels of a llama zero but some: those of `keep`, which says for each kind which are left."""
    heads, groups, width = 4, 2, 8
    query_key = {group: torch.tensor(keep["query_key"][group]) for group in range(groups)}
    value = {group: torch.tensor(keep["value"][group]) for group in range(groups)}
    axis_of = {
        "q": torch.cat([head * width + query_key[head * groups // heads] for head in range(heads)]),
        "k": torch.cat([group * width + query_key[group] for group in range(groups)]),
        "v": torch.cat([group * width + value[group] for group in range(groups)]),
        "o": torch.cat([head * width + value[head * groups // heads] for head in range(heads)]),
        "d": torch.tensor(keep["residual"]),
        "f": torch.tensor(keep["feed_forward"]),
    }
    linears = {
        "self_attn.q_proj": ("q", "d"), "self_attn.k_proj": ("k", "d"), "self_attn.v_proj": ("v", "d"),
        "self_attn.o_proj": ("d", "o"), "mlp.gate_proj": ("f", "d"), "mlp.up_proj": ("f", "d"),
        "mlp.down_proj": ("d", "f"),
    }  # fmt: skip
    expected = {}
    for index, (path, (out, into)) in itertools.product(range(BLOCKS), linears.items()):
        weight = full.block(index).get_submodule(path).weight
        part = weight[axis_of[out]][:, axis_of[into]].clone()
        expected[f"layers.{index}.{path}.weight"] = part
        weight.zero_()
        weight[axis_of[out][:, None], axis_of[into]] = part
    for name, norm in full.module.named_parameters():
        if "norm" in name:
            expected[name] = norm[axis_of["d"]].clone()
    return expected


@torch.no_grad()
def test_the_channels_that_matter_are_found_with_grouped_heads_and_rotary_pairs():
    full, small = stacks(make("llama"), 4)
    # A quarter of each: 8 of 32, 2 of 8 (one rotary pair: i and i + 4), 12 of 48.
    keep = {
        "residual": [1, 4, 9, 13, 17, 22, 30, 31],
        "query_key": [[2, 6], [1, 5]],
        "value": [[0, 3], [5, 7]],
        "feed_forward": [0, 5, 6, 11, 17, 20, 28, 29, 31, 40, 41, 47],
    }
    expected = alive(full, keep)
    residual = copy_pruned(full, small, range(BLOCKS), magnitude_scores())
    assert residual.tolist() == keep["residual"]
    for name, parameter in small.module.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@torch.no_grad()
def test_of_each_band_of_frequencies_one_rotary_pair_is_kept():
    full, small = stacks(make("llama", head_dim=16), 4)  # 8 pairs in 2 bands of 4
    query, key = (full.block(0).get_submodule(f"self_attn.{name}_proj").weight for name in "qk")
    for head in range(4):
        query[head * 16 + 3] *= 100  # pair 3, by its first half
        query[head * 16 + 6 + 8] *= 50  # pair 6, by its second
        query[head * 16 + 2] *= 60  # also large, but of the band of 3
    residual = copy_pruned(full, small, range(BLOCKS), magnitude_scores())
    ours = small.block(0).get_submodule("self_attn.k_proj").weight
    rows = torch.tensor([head * 16 + channel for head in range(2) for channel in (3, 6, 11, 14)])
    assert torch.equal(ours, key[rows][:, residual])


FUSED = {
    "gpt2": "attn.c_attn",
    "phi3": "self_attn.qkv_proj",
    "bloom": "self_attention.query_key_value",
    "gpt_neox": "attention.query_key_value",
}


def values_of(name, stack, width):
    """Return the rows of a fused projection that make the values, shape (heads, width, D): a view of the weight."""
    weight = stack.block(0).get_submodule(FUSED[name]).weight
    weight = weight.T if name == "gpt2" else weight
    if name in {"bloom", "gpt_neox"}:
        return weight.view(4, 3, width, -1)[:, 2]
    heads = 2 if name == "phi3" else 4
    return weight[-heads * width :].view(heads, width, -1)


@torch.no_grad()
@pytest.mark.parametrize("name", FUSED)
def test_fused_projections_are_taken_apart(name):
    full, small = stacks(make(name), 2)
    theirs = values_of(name, full, 8)
    theirs[:, [1, 2, 5, 6]] *= 30
    residual = copy_pruned(full, small, range(BLOCKS), magnitude_scores())
    ours = values_of(name, small, 4)
    assert torch.equal(ours, theirs[:, [1, 2, 5, 6]][..., residual])


def examples(count):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        ids = torch.randint(1, VOCAB, (1, 7), generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def test_fisher_scores_are_summed_squared_gradients_of_single_examples():
    model = make("llama_tied").requires_grad_(requires_grad=False)
    scores = fisher_scores(model, [model.model], examples(3))
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    trained = copy.deepcopy(model).requires_grad_(requires_grad=True)
    for name in ("layers.2.self_attn.k_proj.weight", "norm.weight", "embed_tokens.weight"):
        expected = torch.zeros_like(trained.model.get_parameter(name))
        for example in examples(3):
            trained.zero_grad()
            trained(**example).loss.backward()
            expected += trained.model.get_parameter(name).grad ** 2
        torch.testing.assert_close(scores(model.model.get_parameter(name)), expected)


def test_fisher_scores_without_examples_are_refused():
    model = make("llama")
    with pytest.raises(ConfigError, match="Fisher scores: expected a sample of at least one example, got none"):
        fisher_scores(model, [model.model], [])


def test_a_block_with_linears_of_other_names_is_refused():
    model = make("llama")
    model.model.layers[1].mlp.add_module("fourth", nn.Linear(32, 32))
    full, small = stacks(model, 4)
    with pytest.raises(ModelError, match=r"Pruning a block: expected linears named like .*, got 'mlp\.fourth'"):
        copy_pruned(full, small, range(BLOCKS), magnitude_scores())


def test_a_network_that_is_started_from_the_backbone_reads_the_kept_channels():
    model = make("llama")
    network = SideNetwork(SideConfig(taps=(1, 3)), model.config, geometry_of(model))
    network.start(model)
    kept: torch.Tensor = network.side.start.weight.argmax(1)
    assert kept.tolist() == sorted(set(kept.tolist()))
    picks = nn.functional.one_hot(kept, 32).float()
    for linear in (network.side.start, *network.side.taps):
        assert torch.equal(linear.weight, picks)
        assert not linear.bias.any()
    assert torch.equal(network.side.stack.get_parameter("norm.weight"), model.model.norm.weight[kept])


def test_embeddings_of_another_width_are_read_at_random():
    model = make("opt_projected")
    network = SideNetwork(SideConfig(), model.config, geometry_of(model))
    before = network.side.start.weight.clone()
    network.start(model)
    assert torch.equal(network.side.start.weight, before)
    picks = network.side.taps[0].get_parameter("weight")
    assert picks.sum() == len(picks)


@pytest.mark.parametrize("init", ["random", "magnitude", "fisher"])
def test_a_network_starts_as_its_configuration_says(init):
    model = make("llama").requires_grad_(requires_grad=False)
    network = SideNetwork(SideConfig(init=init), model.config, geometry_of(model))
    fresh = copy.deepcopy(network.side)
    network.start(model, examples(2))
    scores = {"magnitude": magnitude_scores(), "fisher": fisher_scores(model, [model.model], examples(2))}
    expected = {"random": fresh.state_dict()}
    for name, given in scores.items():
        started = copy.deepcopy(fresh)
        started.start_from(Stack(model.model, "layers", model.config), range(BLOCKS), given)
        expected[name] = started.state_dict()
    ours = network.side.state_dict()
    for name, theirs in expected.items():
        assert all(torch.equal(ours[key], theirs[key]) for key in ours) == (name == init), name
