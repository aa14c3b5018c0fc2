"""What is not sent because the mathematics does not need it: each saving's bytes, and that no result changes.

That blocks below the lowest site run without a graph costs and saves no bytes; tests/unit/model/test_walk.py has it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from peft import LoraConfig
from torch import Tensor

from tests.support.cloud_process import TOKEN, CloudProcess
from tests.support.naive import naive_loss
from tests.support.parity import (
    assert_bit_equal,
    assert_same_pass,
    gradients_of,
    joined_oracle,
    randomise_adapter,
    relative_error,
    token_batch,
)
from tidelock.device.model import DeviceModel
from tidelock.model.geometry import Geometry
from tidelock.run.connect import connect
from tidelock.wire.ledger import Ledger

pytestmark = pytest.mark.timeout(120)

_MODEL = "llama"
_TARGETS = ["q_proj", "k_proj", "v_proj"]
_BATCH = token_batch("right")
_TOKENS = int(_BATCH.attention_mask.sum())
_PADDING = _BATCH.attention_mask.numel() - _TOKENS
_LABELLED = int((_BATCH.labels[:, 1:] != -100).sum())
# Of rows that begin with the same tokens.
_PREFIX, _LENGTHS = 12, (17, 15, 21)
# Around the numbers of a message, at most.
_FRAMING = 24


class Crossed(NamedTuple):
    """What a pass cost and gave."""

    kinds: dict[str, int]
    loss: float
    gradients: dict[str, Tensor]
    geometry: Geometry


Cross = Callable[[bool, bool], Crossed]


@pytest.fixture
def cross(cloud: CloudProcess, tiny_models: Path) -> Cross:
    """Return a function that runs `naive_loss` and its backward in the cloud."""

    def cross(padding: bool, all_positions: bool) -> Crossed:
        ledger, config = Ledger(), LoraConfig(r=4, target_modules=_TARGETS)
        model = connect(cloud.url(_MODEL), model=tiny_models / _MODEL, peft_config=config, token=TOKEN, ledger=ledger)
        randomise_adapter(model)
        loss = naive_loss(model, _BATCH.arguments(), padding=padding, all_positions=all_positions)
        loss.backward()
        model.close()
        return Crossed(_kinds(ledger), loss.item(), gradients_of(model), model.ends.geometry)

    return cross


def _crossed(cloud: CloudProcess, folder: Path, *, share_prefix: bool) -> Crossed:
    """Return what a pass costs and gives whose rows begin with the same tokens, none of which has a label."""
    batch = token_batch("right", lengths=_LENGTHS, prefix=_PREFIX)
    batch.labels[:, :_PREFIX] = -100
    ledger, config = Ledger(), LoraConfig(r=4, target_modules=_TARGETS)
    model = connect(
        cloud.url(_MODEL), model=folder, peft_config=config, token=TOKEN, ledger=ledger, share_prefix=share_prefix
    )
    randomise_adapter(model)
    loss = model(**batch.arguments()).loss
    loss.backward()
    model.close()
    return Crossed(_kinds(ledger), loss.item(), gradients_of(model), model.ends.geometry)


def _kinds(ledger: Ledger) -> dict[str, int]:
    totals = ledger.totals()
    return {kind: size for way in totals.values() for kind, size in way.items() if kind != "control"}


def _widths(geometry: Geometry) -> dict[str, int]:
    """Return how many numbers a token costs, by kind."""
    read, given = next(site.widths(tuple(_TARGETS), None) for site in geometry.sites.values())
    sites = geometry.num_blocks
    return {
        "embedding": geometry.embedding_width,
        "site_input": sites * read,
        "site_output": sites * given,
        "site_gradient": sites * given,
        "input_gradient": (sites - 1) * read,
    }


def test_padding_does_not_cross(cross: Cross):
    bare, padded = cross(False, False), cross(True, False)
    widths = _widths(bare.geometry)
    for kind, width in widths.items():
        saved = padded.kinds[kind] - bare.kinds[kind]
        assert abs(saved - 4 * width * _PADDING) <= _FRAMING * bare.geometry.num_blocks, kind
        assert 4 * width * _TOKENS < bare.kinds[kind] <= 4 * width * _TOKENS + _FRAMING * bare.geometry.num_blocks, kind
    assert padded.loss == pytest.approx(bare.loss, rel=1e-5)
    assert all(relative_error(padded.gradients[name], bare.gradients[name]) < 1e-4 for name in bare.gradients)


def test_final_states_and_gradients_cross_at_labelled_positions_only(cross: Cross):
    labelled, everywhere = cross(False, False), cross(False, True)
    width = labelled.geometry.final_width
    for kind in ("final_state", "final_gradient"):
        saved = everywhere.kinds[kind] - labelled.kinds[kind]
        assert abs(saved - 4 * width * (_TOKENS - _LABELLED)) <= _FRAMING
        assert saved > 0.3 * everywhere.kinds[kind]
    same = labelled.kinds.keys() - {"final_state", "final_gradient"}
    assert {kind: labelled.kinds[kind] for kind in same} == {kind: everywhere.kinds[kind] for kind in same}
    assert everywhere.loss == labelled.loss
    assert_bit_equal(everywhere.gradients, labelled.gradients)


def test_what_all_rows_begin_with_crosses_once(cloud: CloudProcess, tiny_models: Path):
    once, each = (_crossed(cloud, tiny_models / _MODEL, share_prefix=share) for share in (True, False))
    widths, others = _widths(once.geometry), len(_LENGTHS) - 1
    for kind, width in widths.items():
        saved = each.kinds[kind] - once.kinds[kind]
        assert abs(saved - 4 * width * _PREFIX * others) <= _FRAMING * once.geometry.num_blocks, kind
        tokens = sum(_LENGTHS) - _PREFIX * others
        assert 4 * width * tokens < once.kinds[kind] <= 4 * width * tokens + _FRAMING * once.geometry.num_blocks, kind
    # One state of the last token of the prefix, which predicts the first label of each row.
    for kind in ("final_state", "final_gradient"):
        saved = each.kinds[kind] - once.kinds[kind]
        assert abs(saved - 4 * once.geometry.final_width * others) <= _FRAMING, kind
    assert once.loss == pytest.approx(each.loss, rel=1e-5)
    assert all(relative_error(once.gradients[name], each.gradients[name]) < 1e-4 for name in each.gradients)


def _checked_against_peft(cloud: CloudProcess, folder: Path, config: LoraConfig) -> tuple[dict[str, int], DeviceModel]:
    """Return what crosses in a pass whose loss, logits and gradients are those of `peft`."""
    ledger = Ledger()
    model = connect(cloud.url(_MODEL), model=folder, peft_config=config, token=TOKEN, ledger=ledger)
    assert_same_pass(model, joined_oracle(model, folder, config), _BATCH)
    model.close()
    return _kinds(ledger), model


def test_the_lowest_site_has_no_input_gradient(cloud: CloudProcess, tiny_models: Path):
    kinds, model = _checked_against_peft(cloud, tiny_models / _MODEL, LoraConfig(r=4, target_modules=_TARGETS))
    # Each other site's is as large as its input.
    one = kinds["site_input"] / model.ends.geometry.num_blocks
    assert kinds["site_input"] - kinds["input_gradient"] == pytest.approx(one, rel=0.05)


def test_nothing_crosses_for_blocks_below_the_lowest_site(cloud: CloudProcess, tiny_models: Path):
    top = _checked_against_peft(
        cloud, tiny_models / _MODEL, LoraConfig(r=4, target_modules=_TARGETS, layers_to_transform=[3])
    )[0]
    whole, model = _checked_against_peft(cloud, tiny_models / _MODEL, LoraConfig(r=4, target_modules=_TARGETS))
    assert "input_gradient" not in top
    for kind in ("site_input", "site_output", "site_gradient"):
        assert top[kind] == pytest.approx(whole[kind] / model.ends.geometry.num_blocks, rel=0.05)
    assert top["embedding"] == whole["embedding"]
