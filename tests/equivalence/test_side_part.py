"""Parts of a side network, one after the other, are the side network: states, gradients and names."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import cast

import pytest
import torch

from tests.support.parity import relative_error, token_batch
from tests.support.plain_side import randomise_side, side_model
from tests.support.tiny_models import ALL_MODELS, BLOCKS
from tidelock.device.causal_lm import packed_ids
from tidelock.errors import ConfigError
from tidelock.model.checkpoint import Checkpoint
from tidelock.model.load import load_model
from tidelock.model.part import ModelPart
from tidelock.model.rows import Rows
from tidelock.peft.side import SideConfig
from tidelock.peft.side_part import SidePart, join_parts

RANDOM = SideConfig(init="random", zero_upsample=False)


def gradients_of(parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Return the gradients, which all parameters must have."""
    found = {name: parameter.grad for name, parameter in parameters.items()}
    assert None not in found.values()
    return cast("dict[str, torch.Tensor]", found)


@pytest.mark.parametrize("name", ALL_MODELS)
@pytest.mark.parametrize("cuts", [(0, BLOCKS), (0, 1, BLOCKS), (0, 2, 3, BLOCKS)], ids=str)
def test_parts_are_the_network(name: str, cuts: tuple[int, ...], tiny_models: Path) -> None:
    model = side_model(tiny_models / name, RANDOM)
    randomise_side(model)
    batch = token_batch("right")
    rows = Rows.from_mask(batch.attention_mask)
    select = torch.arange(rows.num_tokens)
    expected = model.final_states(batch.input_ids, rows, select)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weights).sum().backward()

    checkpoint, layout = Checkpoint.open(str(tiny_models / name)), rows.layout(torch.device("cpu"))
    embeddings = model.ends.embed(packed_ids(batch.input_ids, rows))
    whole, state, hidden, parts = model.network.state_dict(), embeddings, embeddings, []
    for first, end in pairwise(cuts):
        frozen = ModelPart(checkpoint, range(first, end))
        part = SidePart(RANDOM, model.config, model.ends.geometry, range(first, end))
        part.load_whole(whole)
        outputs, final = frozen.forward(hidden, layout)
        state, side_final = part(part.begin(state, layout) if part.is_first else state, outputs, layout)
        hidden = outputs[-1]
        parts.append(part)
    found = parts[-1].network.head(side_final, final)
    (found * weights).sum().backward()

    # The blocks see the whole batch here and one row at a time there.
    assert relative_error(found, expected) <= 1e-5
    joined = join_parts([part.trained() for part in parts])
    assert joined.keys() == dict(model.network.named_parameters()).keys()
    gradients = join_parts([gradients_of(part.trained()) for part in parts])
    for key, parameter in model.network.named_parameters():
        assert torch.equal(joined[key], parameter)
        # A key's bias moves no attention: its gradient is rounding.
        torch.testing.assert_close(gradients[key], parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ALL_MODELS)
@pytest.mark.parametrize("cuts", [(0, BLOCKS), (0, 1, BLOCKS), (0, 2, 3, BLOCKS)], ids=str)
def test_parts_start_as_the_network_does(name: str, cuts: tuple[int, ...], tiny_models: Path) -> None:
    config = SideConfig()
    model = side_model(tiny_models / name, config)
    before = {key: value.clone() for key, value in model.network.state_dict().items()}
    checkpoint = Checkpoint.open(str(tiny_models / name))
    model.start(load_model(checkpoint))
    blocks = [range(first, end) for first, end in pairwise(cuts)]
    frozen = [ModelPart(checkpoint, part) for part in blocks]
    parts = [SidePart(config, model.config, model.ends.geometry, part) for part in blocks]
    scores = torch.stack(
        [part.residual_scores(held, model.ends.embedding) for part, held in zip(parts, frozen, strict=True)]
    ).sum(0)
    for part, held in zip(parts, frozen, strict=True):
        part.load_whole(before)
        part.start_from(held, scores)
    joined = join_parts([part.trained() for part in parts])
    for key, parameter in model.network.named_parameters():
        assert torch.equal(joined[key], parameter), key
    assert not torch.equal(joined["side.taps.0.weight"], before["side.taps.0.weight"])


def test_narrow_taps_are_refused(tiny_models: Path) -> None:
    model = side_model(tiny_models / "llama", RANDOM)
    with pytest.raises(ConfigError, match="expected every block to be read, whole, got taps=None and tap_width=5"):
        SidePart(SideConfig(tap_width=5), model.config, model.ends.geometry, range(2))
