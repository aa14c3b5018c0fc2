"""Joined rows: laid end to end they are what they are alone, and no padding is computed."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.support.tiny_models import ALL_MODELS, BLOCKS, JOINED_MODELS
from tidelock.model.attention import _groups, join_rows
from tidelock.model.call import call_decoder
from tidelock.model.families import family_of
from tidelock.model.rows import Rows

CPU = torch.device("cpu")
LENGTHS = (3, 9, 1, 8, 4)


def joined_decoder(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    family = family_of(model)
    decoder = cast("PreTrainedModel", model.get_submodule(family.decoder)).eval()
    if family.joins_rows:
        join_rows(decoder)
    return decoder, family.joins_rows


def rows_of(lengths):
    return Rows((0,) * len(lengths), tuple(lengths), max(lengths))


@pytest.mark.parametrize("name", ALL_MODELS)
def test_a_decoder_gives_for_joined_rows_what_it_gives_for_each_alone(name, tiny_models):
    decoder, joins = joined_decoder(tiny_models / name)
    assert joins == (name in JOINED_MODELS)
    if not joins:
        return
    rows = rows_of(LENGTHS)
    width = decoder.get_input_embeddings().weight.shape[1]
    embeddings_NE = torch.randn(rows.num_tokens, width)
    layout = rows.layout(CPU, joined=True)
    with torch.no_grad():
        joined_ND = layout.pack(call_decoder(decoder, layout.unpack(embeddings_NE), layout))
        alone = []
        for row_TE in embeddings_NE.split(LENGTHS):
            whole = Rows((0,), (len(row_TE),), len(row_TE)).layout(CPU)
            alone.append(call_decoder(decoder, row_TE[None], whole)[0])
    torch.testing.assert_close(joined_ND, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_every_linear_sees_the_real_tokens_only(tiny_models):
    decoder, _ = joined_decoder(tiny_models / "llama")
    seen = []
    for linear in (m for m in decoder.modules() if isinstance(m, torch.nn.Linear)):
        linear.register_forward_hook(lambda _module, args, _output: seen.append(args[0].shape[:2].numel()))
    rows = rows_of(LENGTHS)
    for joined, tokens in ((True, sum(LENGTHS)), (False, len(LENGTHS) * max(LENGTHS))):
        layout = rows.layout(CPU, joined=joined)
        seen.clear()
        call_decoder(decoder, layout.unpack(torch.randn(rows.num_tokens, decoder.config.hidden_size)), layout)
        assert seen == [tokens] * 7 * BLOCKS


def test_gradients_are_those_of_padded_rows(tiny_models):
    decoder, _ = joined_decoder(tiny_models / "llama")
    rows = rows_of(LENGTHS)
    width = decoder.get_input_embeddings().weight.shape[1]
    weights_NE = torch.randn(rows.num_tokens, width, generator=torch.Generator().manual_seed(1))
    gradients = []
    for joined in (True, False):
        embeddings_NE = torch.linspace(-1, 1, rows.num_tokens * width).view(-1, width).requires_grad_()
        layout = rows.layout(CPU, joined=joined)
        final_ND = layout.pack(call_decoder(decoder, layout.unpack(embeddings_NE), layout))
        (final_ND * weights_NE).sum().backward()
        gradients.append(embeddings_NE.grad)
    # One token's embedding is nearly zero: its norm makes it, and what was rounded, some fifty times as large.
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("starts", [(0, 0, 0), (0, 1, 0)])
def test_rows_of_one_length_and_rows_that_begin_later_are_not_joined(starts):
    rows = Rows(starts, (4, 4, 4), 5 if any(starts) else 4)
    assert rows.layout(CPU, joined=True).shape_BT == (3, rows.width)


@settings(max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(0, 9))
def test_groups_hold_each_token_once_and_little_else(own, shared):
    tokens = shared + sum(own)
    groups, places_N = _groups(tuple(shared + length for length in own), shared, CPU)
    computed = torch.cat([group.queries for group in groups])
    assert torch.equal(computed[places_N], torch.arange(tokens))
    assert len(computed) <= shared + sum(own) / 0.75
    assert sum(group.rows for group in groups) == len(own) + (shared > 0)
    for group in groups[shared > 0 :]:
        keys = group.keys.view(group.rows, -1)
        assert torch.equal(keys[:, :shared], torch.arange(shared).expand(group.rows, -1))
        assert torch.equal(keys[:, shared:].flatten(), group.queries)
