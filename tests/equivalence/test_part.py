"""Parts of a model, one after the other, are the model: bit for bit."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.support.parity import token_batch
from tests.support.tiny_models import ALL_MODELS, BLOCKS
from tidelock.device.causal_lm import packed_ids
from tidelock.errors import ModelError
from tidelock.model.checkpoint import Checkpoint
from tidelock.model.ends import Ends, read_config
from tidelock.model.load import ModelChoice, load_cut_model
from tidelock.model.part import ModelPart
from tidelock.model.rows import Rows
from tidelock.model.taps import TapPass
from tidelock.model.walk import Batch


@pytest.mark.parametrize("name", ALL_MODELS)
@pytest.mark.parametrize("cuts", [(0, 1, BLOCKS), (0, 2, 3, BLOCKS)], ids=str)
def test_parts_are_the_model(name: str, cuts: tuple[int, ...], tiny_models: Path) -> None:
    checkpoint = Checkpoint.open(str(tiny_models / name))
    batch = token_batch("right")
    rows = Rows.from_mask(batch.attention_mask)
    embeddings = Ends(read_config(checkpoint.folder), checkpoint).embed(packed_ids(batch.input_ids, rows))
    whole = load_cut_model(checkpoint, ModelChoice(str(tiny_models / name)))
    expected = TapPass(
        whole, Batch(embeddings, rows, torch.arange(rows.num_tokens), {}, training=False), range(BLOCKS)
    ).forward()
    state, found, final = embeddings, list[torch.Tensor](), embeddings
    for first, end in pairwise(cuts):
        part = ModelPart(checkpoint, range(first, end))
        outputs, final = part.forward(state, part.cut.layout(rows))
        found += outputs
        state = outputs[-1]
    for ours, theirs in zip((*found, final), (*expected.blocks, expected.final_MD), strict=True):
        assert torch.equal(ours, theirs)
        assert not ours.requires_grad


def test_blocks_that_the_model_does_not_have(tiny_models: Path) -> None:
    with pytest.raises(ModelError, match=f"expected blocks of 0 to {BLOCKS - 1}, got 2 to {BLOCKS}"):
        ModelPart(Checkpoint.open(str(tiny_models / "llama")), range(2, BLOCKS + 1))
