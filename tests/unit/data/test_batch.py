import torch

from tidelock.data.batch import Collator

ROWS = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]


def test_rows_are_padded_at_the_right_and_padding_is_masked_and_carries_no_loss():
    batch = Collator(pad_token_id=9)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_real_token_equal_to_the_padding_is_not_masked():
    batch = Collator(pad_token_id=6)(ROWS)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]


def test_rows_of_one_length_get_no_padding():
    assert Collator(pad_token_id=9)(ROWS[:1])["attention_mask"].tolist() == [[1, 1, 1]]


def test_rows_with_one_label_each_get_one_label_each():
    rows = [{"input_ids": [5, 6, 7], "label": 2}, {"input_ids": [8], "label": 0}]
    batch = Collator(pad_token_id=9)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [2, 0]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_numbers_to_be_predicted_are_fp32():
    rows = [{"input_ids": [5], "label": 2.0}, {"input_ids": [8], "label": 0.5}]
    labels = Collator(pad_token_id=9)(rows)["labels"]
    assert (labels.tolist(), labels.dtype) == ([2.0, 0.5], torch.float32)
