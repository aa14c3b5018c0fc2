"""Rows: what is padding is told from the mask, and packing loses nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tidelock.errors import ConfigError
from tidelock.model.rows import Rows, pack, unpack

RUNS = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5)), min_size=1, max_size=5)


def mask_of(runs, width):
    mask = torch.zeros(len(runs), width, dtype=torch.long)
    for row, (start, length) in enumerate(runs):
        mask[row, start : start + length] = 1
    return mask


@given(RUNS, st.integers(0, 3), st.sampled_from([torch.long, torch.bool, torch.float32]))
def test_rows_are_read_from_a_mask_and_give_it_back(runs, beyond, dtype):
    used = max(start + length for start, length in runs)
    mask = mask_of(runs, used + beyond)
    rows = Rows.from_mask(mask.to(dtype))
    assert rows == Rows(tuple(s for s, _ in runs), tuple(n for _, n in runs), used)
    assert torch.equal(rows.mask(), mask[:, :used])
    assert rows.num_tokens == mask.sum()
    assert rows.is_dense == bool(mask[:, :used].all())
    assert torch.equal(rows.indices(), mask[:, :used].flatten().nonzero().squeeze(1))


@pytest.mark.parametrize(
    ("mask", "row"),
    [
        ([[0, 0]], 0),
        ([[1, 1], [0, 0]], 1),
        ([[1, 1, 1], [1, 1, 1], [1, 0, 1]], 2),
        ([[0, 1, 0, 1]], 0),
        ([[1, 0, 0, 1], [0, 0, 0, 0]], 0),
    ],
)
def test_gaps_and_empty_rows_are_refused_by_number(mask, row):
    with pytest.raises(ConfigError, match=rf"Attention mask: expected one run .*\(row {row}\)"):
        Rows.from_mask(torch.tensor(mask))


@given(RUNS)
def test_packing_and_unpacking_undo_each_other(runs):
    starts, lengths = zip(*runs, strict=True)
    rows = Rows(starts, lengths, max(start + length for start, length in runs))
    packed = torch.randn(rows.num_tokens, 3)
    shape = (len(runs), rows.width)
    padded = unpack(packed, rows.indices(), shape)
    assert padded.shape == (*shape, 3)
    assert torch.equal(pack(padded, rows.indices()), packed)
    assert torch.equal(padded[~rows.mask().bool()], torch.zeros(rows.width * len(runs) - rows.num_tokens, 3))


def test_dense_rows_are_not_copied():
    x = torch.randn(2, 3, 4)
    assert pack(x, None).data_ptr() == x.data_ptr()
    assert torch.equal(unpack(pack(x, None), None, (2, 3)), x)


def test_unpacking_is_differentiated():
    rows = Rows((0, 1), (2, 1), 2)
    packed = torch.randn(3, 4, requires_grad=True)
    weights = torch.randn(2, 2, 4)
    (unpack(packed, rows.indices(), (2, 2)) * weights).sum().backward()
    assert packed.grad is not None
    assert torch.equal(packed.grad, weights.view(4, 4)[rows.indices()])


def test_a_layout_says_where_tokens_are_and_takes_them_there_and_back():
    layout = Rows((1, 0), (2, 3), 3).layout(torch.device("cpu"), counted=True)
    assert layout.mask_BT.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert layout.positions_BT is not None
    assert layout.positions_BT.tolist() == [[0, 0, 1], [0, 1, 2]]
    x_ND = torch.arange(10.0).view(5, 2)
    padded = layout.unpack(x_ND)
    assert padded[0, 0].tolist() == [0.0, 0.0]
    assert torch.equal(layout.pack(padded), x_ND)


def test_positions_are_left_to_the_decoder_unless_they_are_counted():
    assert Rows((0,), (2,), 2).layout(torch.device("cpu")).positions_BT is None


def test_the_next_layout_is_one_token_after_all_that_came():
    layout = Rows((1, 0), (2, 3), 3).next_layout(4, torch.device("cpu"))
    assert layout.mask_BT.tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert layout.positions_BT is not None
    assert layout.positions_BT.tolist() == [[3], [4]]
    assert layout.unpack(torch.ones(2, 7)).shape == (2, 1, 7)
