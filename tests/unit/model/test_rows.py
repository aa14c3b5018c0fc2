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
    assert layout.mask.tolist() == [[0, 1, 1], [1, 1, 1]]
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
    assert layout.mask.tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert layout.positions_BT is not None
    assert layout.positions_BT.tolist() == [[3], [4]]
    assert layout.unpack(torch.ones(2, 7)).shape == (2, 1, 7)


@pytest.mark.parametrize(
    ("lengths", "prefix", "groups"),
    [
        ((158,) * 8, 0, [2, 2, 2, 2]),
        ((158,) * 8, 119, [4, 4]),
        ((158,) * 8, 150, [8]),
        ((100, 160, 100, 100, 100), 95, [2, 3]),
        ((264,) * 4, 200, [4]),
        ((264,) * 16, 8, [4, 4, 4, 4]),
    ],
)
def test_a_prefix_counts_for_each_group(lengths, prefix, groups):
    """A group has as many tokens beside it as it has, and those others are what is divided evenly."""
    count = 2 if prefix == 95 else None
    rows = Rows((0,) * len(lengths), lengths, max(lengths))
    assert [len(group.lengths) for group in rows.split(count, prefix)] == groups


@given(RUNS, st.integers(1, 8))
def test_groups_are_all_rows_in_order(runs, count):
    starts, lengths = zip(*runs, strict=True)
    groups = Rows(starts, lengths, max(start + length for start, length in runs)).split(count)
    assert len(groups) == min(count, len(runs))
    assert sum((group.starts for group in groups), ()) == starts
    assert sum((group.lengths for group in groups), ()) == lengths
    assert all(group.width == max(map(sum, zip(group.starts, group.lengths, strict=True))) for group in groups)


@given(st.lists(st.integers(1, 50), min_size=8, max_size=30), st.integers(2, 4))
def test_groups_have_about_as_many_tokens_each(lengths, count):
    groups = Rows((0,) * len(lengths), tuple(lengths), max(lengths)).split(count)
    mean = sum(lengths) / count
    # A cut is at most half a row from where it should be, unless the rows run out.
    if max(lengths) <= mean:
        assert all(abs(group.num_tokens - mean) <= max(lengths) for group in groups)


def test_tokens_decide_and_not_rows():
    groups = Rows((0,) * 5, (40, 10, 10, 10, 10), 40).split(2)
    assert [group.lengths for group in groups] == [(40,), (10, 10, 10, 10)]


@pytest.mark.parametrize(
    ("lengths", "count"),
    [((127,), 1), ((63, 64), 1), ((64, 64), 2), ((64,) * 3, 3), ((64,) * 64, 4), ((1000,), 1), ((500, 500), 2)],
)
def test_a_batch_decides_into_how_many_it_is_split(lengths, count):
    assert len(Rows((0,) * len(lengths), lengths, max(lengths)).split()) == count
