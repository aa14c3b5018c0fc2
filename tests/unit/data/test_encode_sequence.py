from __future__ import annotations

import math

import pytest
from tokenizers.normalizers import Replace
from tokenizers.processors import TemplateProcessing

from tidelock.data.encode import Encoder
from tidelock.data.encode_sequence import SequenceEncoder, count_classes
from tidelock.data.example import parse_row
from tidelock.errors import ConfigError, DataError

SECRET, SECRET_LABEL = "Marlowe", 73


def row(value):
    return parse_row(value, source="reviews.jsonl", line=12)


def labelled(label, text_a="our dog", **more):
    return row({"text_a": text_a, "label": label, **more})


def encode(tokenizer, example, *, num_labels=2, max_length=200, truncate=False):
    return SequenceEncoder(tokenizer, max_length=max_length, truncate=truncate, num_labels=num_labels).encode(example)


def with_pairs(tokenizer):
    """Give a tokenizer a pair form of its own: a start token before each text."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    return tokenizer


@pytest.mark.parametrize("adds_bos", [False, True])
def test_one_text_is_what_the_tokenizer_makes_of_it(make_tokenizer, adds_bos):
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    encoded = encode(tokenizer, labelled(1))
    assert encoded == {"input_ids": tokenizer("our dog")["input_ids"], "label": 1}
    assert (encoded["input_ids"][0] == tokenizer.bos_token_id) is adds_bos


def test_two_texts_are_joined_by_a_newline_where_the_tokenizer_puts_nothing_between(make_tokenizer):
    tokenizer = make_tokenizer()
    encoded = encode(tokenizer, labelled(0, text_b="the house"))
    assert tokenizer.decode(encoded["input_ids"]) == "our dog\nthe house"


def test_two_texts_are_written_in_the_tokenizers_own_form_where_it_has_one(make_tokenizer):
    tokenizer = with_pairs(make_tokenizer())
    encoded = encode(tokenizer, labelled(0, text_b="the house"))
    assert encoded["input_ids"] == tokenizer("our dog", "the house")["input_ids"]
    assert encoded["input_ids"].count(tokenizer.bos_token_id) == 2


def test_an_empty_second_text_is_none(make_tokenizer):
    assert encode(make_tokenizer(), labelled(0, text_b="")) == encode(make_tokenizer(), labelled(0))


@pytest.mark.parametrize(("num_labels", "kind"), [(2, int), (1, float)])
def test_a_label_is_a_class_or_a_number_as_the_task_has_it(make_tokenizer, num_labels, kind):
    label = encode(make_tokenizer(), labelled(1), num_labels=num_labels)["label"]
    assert (label, type(label)) == (1, kind)


@pytest.mark.parametrize(
    ("label", "num_labels", "said"),
    [
        (2, 2, "'label': expected a class from 0 to 1, got another number"),
        (-1, 2, "'label': expected a class from 0 to 1, got another number"),
        (1.0, 2, "'label': expected a whole number for a class, got a value of type float"),
        (1e39, 1, "'label': expected a number that fp32 can hold"),
        (10**400, 1, "'label': expected a number that fp32 can hold"),
        (-100, 1, "'label': expected a number that fp32 can hold, and not -100"),
        (-100.0, 1, "'label': expected a number that fp32 can hold, and not -100"),
    ],
)
def test_a_label_that_does_not_fit_the_task_is_refused(make_tokenizer, label, num_labels, said):
    with pytest.raises(DataError, match=rf"{said}.*\(reviews\.jsonl:12\)"):
        encode(make_tokenizer(), labelled(label), num_labels=num_labels)


def test_no_error_shows_text_or_label(make_tokenizer):
    example = labelled(SECRET_LABEL, SECRET)
    for settings in ({"num_labels": 2}, {"num_labels": 99, "max_length": 2}):
        with pytest.raises(DataError) as caught:
            encode(make_tokenizer(), example, **settings)
        assert SECRET not in str(caught.value)
        assert str(SECRET_LABEL) not in str(caught.value)
    shown, _, _ = repr(example.content).partition(" at 0x")  # an address has digits of its own
    assert SECRET not in shown
    assert str(SECRET_LABEL) not in shown


def test_a_long_text_is_refused_or_cut_at_the_right(make_tokenizer):
    tokenizer = make_tokenizer()
    ids = tokenizer("our dog")["input_ids"]
    with pytest.raises(DataError, match=rf"expected at most {len(ids) - 1} tokens, got {len(ids)} \(reviews"):
        encode(tokenizer, labelled(1), max_length=len(ids) - 1)
    cut = encode(tokenizer, labelled(1), max_length=len(ids) - 1, truncate=True)
    assert cut == {"input_ids": ids[:-1], "label": 1}
    assert encode(tokenizer, labelled(1), max_length=len(ids))["input_ids"] == ids


def test_a_text_without_a_token_is_refused(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = Replace("our dog", "")
    with pytest.raises(DataError, match=r"expected at least one token, got none \(reviews\.jsonl:12\)"):
        encode(tokenizer, labelled(1))


def test_a_limit_below_two_is_refused(make_tokenizer):
    with pytest.raises(ConfigError, match="expected at least 2 tokens, got 1"):
        SequenceEncoder(make_tokenizer(), max_length=1, truncate=False, num_labels=2)


def test_each_task_refuses_the_others_rows(make_tokenizer):
    with pytest.raises(DataError, match=r"expected a text with a label.*\(reviews\.jsonl:12\)\. .*--task causal-lm"):
        encode(make_tokenizer(), row({"text": SECRET}))
    with pytest.raises(DataError, match=r"expected text to be continued, got \{text_a, label\} \(reviews\.jsonl:12\)"):
        Encoder(make_tokenizer(), max_length=9, truncate=False).encode(labelled(1))


def test_classes_are_counted_by_the_highest(make_tokenizer):
    examples = [labelled(label) for label in (0, 3, 1, 3)]
    assert count_classes(examples) == 4
    # One that is no class is refused later, with its place.
    assert count_classes([*examples, labelled(2.5), row({"text": "x"})]) == 4


@pytest.mark.parametrize(
    ("labels", "got"),
    [([0, 0, 0], "got no two"), ([-1], "got no two"), ([0.5], "got no two"), ([0, 3, 1], "more than there are ex")],
)
def test_labels_that_are_no_classes_are_refused(labels, got):
    with pytest.raises(DataError, match=f"Classes: expected .* {got}.* Give --num-labels"):
        count_classes([labelled(label) for label in labels])


def test_a_label_is_no_nan():
    with pytest.raises(DataError):
        labelled(math.nan)
