"""A shared prefix: which tokens are packed once, what stands for them, and where they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.support.sites import attn
from tests.unit.hand_device import PROJECTIONS
from tidelock.errors import ConfigError
from tidelock.model.rows import Rows
from tidelock.model.shared_prefix import share_prefixes
from tidelock.model.walk import Batch

LEAST = 8
# Token ids; those of a prefix are 100 and more.
ROWS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=6)


def a_batch(rows, select=None, starts=None):
    """Return a micro-batch of rows of token ids, each embedded as itself."""
    starts = starts or (0,) * len(rows)
    lengths = tuple(len(row) for row in rows)
    ids = torch.tensor([token for row in rows for token in row], dtype=torch.float32)
    select = torch.arange(len(ids)) if select is None else torch.tensor(select)
    width = max(start + length for start, length in zip(starts, lengths, strict=True))
    return Batch(ids[:, None] * torch.ones(3), Rows(starts, lengths, width), select, active={}, training=True, seed=9)


def shared(*batches):
    return share_prefixes(batches)


@given(st.integers(0, 12), ROWS, st.data())
def test_every_selected_token_has_its_own_or_one_that_is_the_same(prefix, own, data):
    rows = [list(range(100, 100 + prefix)) + row for row in own]
    count = sum(map(len, rows))
    select = data.draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True).map(sorted))
    batch = a_batch(rows, select)
    (packed,), number_M = shared(batch)
    common = next((place for place, tokens in enumerate(zip(*rows, strict=False)) if len(set(tokens)) > 1), None)
    most = min(map(len, rows)) - 1
    common = most if common is None else min(common, most)
    expected = common if len(rows) > 1 and common >= LEAST else 0
    assert packed.rows == replace(batch.rows, shared=expected)
    assert len(packed.embeddings_NE) == packed.rows.num_tokens == count - expected * (len(rows) - 1)
    # Ascending, as they cross, and each once.
    assert packed.select_M.tolist() == sorted(set(packed.select_M.tolist()))
    assert torch.equal(packed.embeddings_NE[packed.select_M][number_M], batch.embeddings_NE[batch.select_M])
    layout = packed.rows.layout(torch.device("cpu"), joined=True)
    positions = layout.positions_BT.flatten()[packed.select_M] if expected else None
    if positions is not None:
        in_rows = torch.cat([torch.arange(len(row)) for row in rows])
        assert torch.equal(positions[number_M], in_rows[batch.select_M])
    assert (packed.seed, packed.training) == (9, True)


@given(st.integers(LEAST, 12), ROWS)
def test_tokens_keep_the_positions_of_their_own_rows(prefix, own):
    assume(len(own) > 1)
    lengths = tuple(prefix + len(row) for row in own)
    rows = Rows((0,) * len(own), lengths, max(lengths), prefix)
    layout = rows.layout(torch.device("cpu"), joined=True)
    assert layout.positions_BT is not None
    assert layout.shape_BT == (1, rows.num_tokens)
    assert layout.mask.flatten().tolist() == [prefix, *lengths]
    assert layout.indices_N is None
    places = list(range(prefix)) + [prefix + place for row in own for place in range(len(row))]
    assert layout.positions_BT.tolist() == [places]


def test_micro_batches_count_on_from_each_other():
    rows = [[*range(100, 110), 1, 2], [*range(100, 110), 3]]
    batches, number_M = shared(a_batch(rows, [9, 11, 21]), a_batch([[1, 2], [3]], [0, 2]), a_batch(rows, [0, 12]))
    assert [batch.rows.shared for batch in batches] == [10, 0, 10]
    assert [batch.select_M.tolist() for batch in batches] == [[9, 11], [0, 2], [0]]
    # The last token of the prefix predicts for both rows; so does the first.
    assert number_M.tolist() == [0, 1, 0, 2, 3, 4, 4]


def test_equal_rows_keep_a_token_each():
    (packed,), _ = shared(a_batch([list(range(100, 110))] * 3))
    assert packed.rows.shared == 9
    assert packed.embeddings_NE[:, 0].tolist() == [*range(100, 110), 109, 109]


@pytest.mark.parametrize(
    ("rows", "starts"),
    [
        ([[*range(LEAST - 1), 9], [*range(LEAST - 1), 8]], None),
        ([list(range(12)), list(range(12))], (0, 1)),
        ([list(range(12)), list(range(12))], (2, 2)),
        ([list(range(12))], None),
        ([list(range(1, 13)), list(range(12))], None),
    ],
    ids=["too short", "padded at the left", "all padded at the left", "one row", "different"],
)
def test_what_is_not_shared_stays_as_it_is(rows, starts):
    batch = a_batch(rows, starts=starts)
    (packed,), number_M = shared(batch)
    assert packed is batch
    assert number_M.tolist() == batch.select_M.tolist()


def test_tokens_are_the_same_only_if_all_their_numbers_are():
    batch = a_batch([list(range(100, 112))] * 2)
    batch.embeddings_NE[12 + 9, 2] += 1
    assert shared(batch)[0][0].rows.shared == 9


def test_rows_that_share_are_refused_where_rows_are_not_joined():
    with pytest.raises(ConfigError, match="Rows that share 8 tokens: expected blocks that take rows end to end"):
        Rows((0, 0), (10, 11), 11, 8).layout(torch.device("cpu"))


def test_sharing_leaves_a_batchs_sites_as_they_are():
    rows = [[*range(100, 110), 1], [*range(100, 110), 2]]
    batch = replace(a_batch(rows), active={attn(1): PROJECTIONS}, learns_from=1)
    (packed,), _ = shared(batch)
    assert (packed.active, packed.learns_from, packed.lowest) == (batch.active, 1, attn(1))
