"""Counts and widths of a model, and which blocks of a run of them are of which stack."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from tests.support.plain_seq2seq import TINY_SEQ2SEQ
from tests.support.tiny_models import TINY_MODELS
from tidelock.errors import ModelError
from tidelock.model.sizes import ModelSizes, sizes_of


def sizes(model_type, settings):
    return sizes_of(AutoConfig.for_model(model_type, **settings))


def test_sizes_by_hand():
    assert sizes(*TINY_MODELS["opt_projected"]) == ModelSizes(4, 0, 20, 32, 20, 64)
    assert sizes(*TINY_SEQ2SEQ["t5"]) == ModelSizes(7, 4, 32, 32, 32, None)
    assert sizes(*TINY_SEQ2SEQ["bart"]) == ModelSizes(7, 4, 32, 32, 32, 64)
    assert sizes(*TINY_SEQ2SEQ["bart"]).of_stacks == (4, 3)


@pytest.mark.parametrize(
    ("blocks", "encoder", "decoder"),
    [
        (range(1, 3), range(1, 3), range(0)),
        (range(4), range(4), range(0)),
        (range(3, 6), range(3, 4), range(2)),
        (range(4, 7), range(0), range(3)),
        (range(5, 6), range(0), range(1, 2)),
    ],
)
def test_which_blocks_are_of_which_stack(blocks, encoder, decoder):
    assert sizes(*TINY_SEQ2SEQ["t5"]).split(blocks) == (encoder, decoder)


def test_an_encoder_decoder_of_another_family_is_refused():
    with pytest.raises(ModelError, match="type 'pegasus'"):
        sizes("pegasus", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1})
