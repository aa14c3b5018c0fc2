from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing

from tidelock.data.encode_pair import PairEncoder
from tidelock.data.example import parse_row
from tidelock.errors import ConfigError, DataError, ModelError

SECRET = "Marlowe"


def row(value):
    return parse_row(value, source="letters.jsonl", line=12)


def encode(tokenizer, prompt="our dog", completion="the house", *, max_length=200, truncate=False):
    encoder = PairEncoder(tokenizer, max_length=max_length, truncate=truncate)
    return encoder.encode(row({"prompt": prompt, "completion": completion}))


def with_end(tokenizer):
    """Have a tokenizer end every text, as T5's does."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)]
    )
    return tokenizer


def test_source_and_target_are_what_the_tokenizer_makes_of_them(make_tokenizer):
    tokenizer = with_end(make_tokenizer())
    encoded = encode(tokenizer)
    assert encoded == {"input_ids": tokenizer("our dog")["input_ids"], "labels": tokenizer("the house")["input_ids"]}
    assert encoded["input_ids"][-1] == encoded["labels"][-1] == tokenizer.eos_token_id


def test_a_target_ends_also_where_the_tokenizer_ends_nothing(make_tokenizer):
    tokenizer = make_tokenizer()
    encoded = encode(tokenizer)
    assert encoded["input_ids"] == tokenizer("our dog")["input_ids"]
    assert encoded["labels"] == [*tokenizer("the house")["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("ends", [False, True])
def test_what_is_cut_keeps_its_end(make_tokenizer, ends):
    tokenizer = with_end(make_tokenizer()) if ends else make_tokenizer()
    texts = ("where is it?", "in a small box")
    whole, cut = encode(tokenizer, *texts), encode(tokenizer, *texts, max_length=3, truncate=True)
    assert len(whole["labels"]) > 3
    assert len(cut["input_ids"]) == len(cut["labels"]) == 3
    assert cut["labels"] == [*whole["labels"][:2], tokenizer.eos_token_id]
    assert cut["input_ids"][:2] == whole["input_ids"][:2]


def test_what_is_too_long_is_refused_and_not_shown(make_tokenizer):
    for texts in ({"prompt": SECRET * 9}, {"completion": SECRET * 9}):
        with pytest.raises(DataError, match=r"expected at most 20 tokens, got \d+ \(letters.jsonl:12\)") as refused:
            encode(make_tokenizer(), **texts, max_length=20)
        assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "value",
    [{"text": SECRET}, {"text_a": SECRET, "label": 1}, {"messages": [{"role": "user", "content": SECRET}]}],
    ids=["text", "label", "messages"],
)
def test_other_forms_are_refused(make_tokenizer, value):
    encoder = PairEncoder(make_tokenizer(), max_length=20, truncate=False)
    with pytest.raises(DataError, match=r"expected a source and a target, \{prompt, completion\}, got") as refused:
        encoder.encode(row(value))
    assert SECRET not in str(refused.value)


def test_an_empty_source_and_an_unusable_tokenizer_are_refused(make_tokenizer):
    with pytest.raises(DataError, match="expected at least one token in 'prompt', got none"):
        encode(make_tokenizer(), prompt="")
    with pytest.raises(ConfigError):
        PairEncoder(make_tokenizer(), max_length=1, truncate=False)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="expected an end-of-sequence token, got none"):
        PairEncoder(tokenizer, max_length=20, truncate=False)


def test_all_of_them_one_by_one(make_tokenizer):
    encoder = PairEncoder(make_tokenizer(), max_length=20, truncate=False)
    rows = [row({"prompt": text, "completion": text}) for text in ("our", "dog")]
    assert list(encoder.encode_all(rows)) == [encoder.encode(example) for example in rows]
