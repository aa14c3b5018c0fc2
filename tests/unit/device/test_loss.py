"""Losses of whole texts and what their labels must be; those of tokens are tested with the model."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss

from tidelock.device.loss import last_tokens, sequence_loss
from tidelock.errors import ConfigError, NonFiniteError
from tidelock.model.rows import Rows

LOGITS = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])


def test_the_last_token_of_each_row_is_found_among_the_packed_ones():
    assert last_tokens(Rows((0, 2, 1), (3, 1, 2), 5)).tolist() == [2, 3, 5]


@pytest.mark.parametrize("count", [None, 5, torch.tensor(5)])
def test_classes(count):
    labels = torch.tensor([2, 1])
    expected = cross_entropy(LOGITS, labels, reduction="sum") / (count or 2)
    torch.testing.assert_close(sequence_loss(LOGITS, labels, count), expected)


@pytest.mark.parametrize("count", [None, 5, torch.tensor(5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_numbers(count, dtype):
    labels = torch.tensor([2, -1], dtype=dtype)
    expected = mse_loss(LOGITS[:, 0], labels.float(), reduction="sum") / (count or 2)
    torch.testing.assert_close(sequence_loss(LOGITS[:, :1], labels, count), expected)


@pytest.mark.parametrize("labels", [[0, 3], [-1, 0], [-100, 0]])
def test_classes_that_are_not_there_are_refused_without_saying_which(labels):
    with pytest.raises(ConfigError, match="one class from 0 to 2 for each row, got another number") as caught:
        sequence_loss(LOGITS, torch.tensor(labels), None)
    assert "3" not in str(caught.value)


def test_classes_are_whole():
    with pytest.raises(ConfigError, match=r"got torch\.float32"):
        sequence_loss(LOGITS, torch.tensor([0.0, 1.0]), None)


@pytest.mark.parametrize("shape", [(2, 1), (1,), (2, 3), ()], ids=str)
def test_there_is_one_label_a_row(shape):
    with pytest.raises(ConfigError, match=r"for each of 2 rows, got labels of shape .*task='causal-lm'"):
        sequence_loss(LOGITS, torch.zeros(shape, dtype=torch.long), None)


def test_a_loss_that_is_no_number_is_refused():
    with pytest.raises(NonFiniteError, match="Loss: expected a finite number, got inf"):
        sequence_loss(LOGITS[:, :1], torch.tensor([1e30, 0.0]), None)
    with pytest.raises(NonFiniteError, match="got nan"):
        sequence_loss(LOGITS * float("nan"), torch.tensor([1, 0]), None)
