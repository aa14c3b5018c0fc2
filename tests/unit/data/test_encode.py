import types
from typing import Any

import pytest

from tidelock.data.encode import Encoded, Encoder, encode_all
from tidelock.data.example import parse_row
from tidelock.errors import ConfigError, DataError, ModelError

SECRET = "Marlowe"


def row(value):
    return parse_row(value, source="household.jsonl", line=12)


def chat(*contents, first="user"):
    """Return a conversation whose turns take turns."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return row({"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]})


def encode(tokenizer, example, *, max_length=200, truncate=False):
    return Encoder(tokenizer, max_length=max_length, truncate=truncate).encode(example)


def learned(tokenizer, encoded):
    """Return the text of the tokens that carry a loss."""
    pairs = zip(encoded.input_ids, encoded.labels, strict=True)
    assert all(label in (-100, token) for token, label in pairs)
    return tokenizer.decode([label for label in encoded.labels if label != -100])


def test_only_the_assistants_turns_and_their_ends_carry_a_loss(make_tokenizer):
    tokenizer = make_tokenizer()
    encoded = encode(tokenizer, chat("our dog?", "Marlowe, a dog", "the house?", "a house 日本 🎉"))
    assert learned(tokenizer, encoded) == "Marlowe, a dog<|im_end|>\na house 日本 🎉<|im_end|>\n"
    assert tokenizer.decode(encoded.input_ids) == (
        "<|im_start|>user\nour dog?<|im_end|>\n<|im_start|>assistant\nMarlowe, a dog<|im_end|>\n"
        "<|im_start|>user\nthe house?<|im_end|>\n<|im_start|>assistant\na house 日本 🎉<|im_end|>\n"
    )


def test_a_last_turn_of_the_user_carries_no_loss(make_tokenizer):
    tokenizer = make_tokenizer()
    assert learned(tokenizer, encode(tokenizer, chat("a", "b", "c"))) == "b<|im_end|>\n"


def test_a_tokenizer_that_trims_offsets_learns_no_token_before_the_answer(make_tokenizer):
    tokenizer = make_tokenizer(trims_offsets=True)
    assert learned(tokenizer, encode(tokenizer, chat("our dog?", "a dog", "x"))).startswith("a dog<|im_end|>")


def test_a_token_that_spans_the_beginning_of_the_answer_is_learned(make_tokenizer):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = make_tokenizer(chat_template=template)
    encoded = encode(tokenizer, chat("a st", "ory"))
    assert len(tokenizer(" story", add_special_tokens=False)["input_ids"]) == 1
    assert learned(tokenizer, encoded) == " story"


def test_a_templated_conversation_gets_no_start_token_beside_the_templates(make_tokenizer):
    tokenizer = make_tokenizer(adds_bos=True, chat_template="{{ bos_token }}" + make_tokenizer().chat_template)
    encoded = encode(tokenizer, chat("a", "b"))
    assert encoded.input_ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_completion_is_learned_with_an_end_and_its_prompt_is_not(make_tokenizer, adds_bos):
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    encoded = encode(tokenizer, row({"prompt": "2 + 2 =", "completion": " 4"}))
    assert encoded.input_ids == tokenizer("2 + 2 = 4<|im_end|>")["input_ids"]
    assert learned(tokenizer, encoded) == " 4<|im_end|>"
    assert encoded.input_ids.count(tokenizer.bos_token_id) == int(adds_bos)


def test_a_completion_learns_from_the_first_token_that_the_prompt_alone_has_not(make_tokenizer):
    tokenizer = make_tokenizer()
    assert learned(tokenizer, encode(tokenizer, row({"prompt": "a st", "completion": "ory"}))) == " story<|im_end|>"


def test_the_start_token_before_an_empty_prompt_is_not_learned(make_tokenizer):
    tokenizer = make_tokenizer(adds_bos=True)
    encoded = encode(tokenizer, row({"prompt": "", "completion": "dog"}))
    assert encoded.input_ids[0] == tokenizer.bos_token_id
    assert encoded.labels[0] == -100
    assert learned(tokenizer, encoded) == "dog<|im_end|>"


@pytest.mark.parametrize("value", [{"text": "a dog<|im_end|>"}, {"prompt": "", "completion": "a dog<|im_end|>"}])
def test_an_end_that_is_there_is_not_added_again(make_tokenizer, value):
    tokenizer = make_tokenizer()
    assert encode(tokenizer, row(value)).input_ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("value", [{"text": "<s>a dog"}, {"prompt": "<s>a", "completion": " dog"}])
def test_a_start_that_is_there_is_not_added_again(make_tokenizer, value):
    tokenizer = make_tokenizer(adds_bos=True)
    assert encode(tokenizer, row(value)).input_ids.count(tokenizer.bos_token_id) == 1


def test_all_of_a_text_is_learned(make_tokenizer):
    tokenizer = make_tokenizer(adds_bos=True)
    encoded = encode(tokenizer, row({"text": "a dog"}))
    assert encoded.labels == encoded.input_ids == tokenizer("a dog<|im_end|>")["input_ids"]


def test_an_example_may_be_as_long_as_the_limit_but_no_longer(make_tokenizer):
    tokenizer = make_tokenizer()
    example = row({"text": SECRET})
    length = len(tokenizer(SECRET + "<|im_end|>")["input_ids"])
    assert len(encode(tokenizer, example, max_length=length).input_ids) == length
    limit = length - 1
    expected = rf"expected at most {limit} tokens, got {length} \(household\.jsonl:12\)\..*--truncate"
    with pytest.raises(DataError, match=expected) as caught:
        encode(tokenizer, example, max_length=limit)
    assert SECRET not in str(caught.value)
    cut = encode(tokenizer, example, max_length=limit, truncate=True)
    assert cut.input_ids == cut.labels == tokenizer(SECRET)["input_ids"]


def test_an_example_cut_down_to_what_is_not_learned_is_refused(make_tokenizer):
    example = row({"prompt": "the house of the dog", "completion": SECRET})
    with pytest.raises(DataError, match=r"carries a loss, got none in the first 2 of \d+ \(household\.jsonl:12\)"):
        encode(make_tokenizer(), example, max_length=2, truncate=True)


def test_an_example_of_one_token_is_refused_because_nothing_predicts_it(make_tokenizer):
    with pytest.raises(DataError, match=r"carries a loss, got none in 1 \(household"):
        encode(make_tokenizer(), row({"text": "<|im_end|>"}))


def test_a_limit_below_two_tokens_is_refused(make_tokenizer):
    with pytest.raises(ConfigError, match=r"at least 2 tokens, got 1\."):
        Encoder(make_tokenizer(), max_length=1, truncate=False)


def test_a_slow_tokenizer_is_refused():
    slow: Any = types.SimpleNamespace(is_fast=False)
    with pytest.raises(ModelError, match=r"expected a fast one, got SimpleNamespace\."):
        Encoder(slow, max_length=8, truncate=False)


@pytest.mark.parametrize("value", [{"text": "x"}, {"prompt": "x", "completion": "y"}])
def test_a_tokenizer_without_an_end_is_refused_where_one_is_added(make_tokenizer, value):
    tokenizer = make_tokenizer(eos=None)
    with pytest.raises(ModelError, match=r"expected an end-of-sequence token, got none"):
        encode(tokenizer, row(value))
    assert encode(tokenizer, chat("a", "b")).input_ids


def test_a_conversation_needs_a_chat_template(make_tokenizer):
    with pytest.raises(ConfigError, match=r"expected a chat template .* got none \(household\.jsonl:12\)\. Use"):
        encode(make_tokenizer(chat_template=None), chat("a", "b"))


@pytest.mark.parametrize(
    ("example", "got"),
    [
        (chat(SECRET), "no assistant's turn"),
        (chat(SECRET, "b", first="assistant"), "begins with the assistant"),
    ],
)
def test_a_conversation_without_an_answer_is_refused(make_tokenizer, example, got):
    with pytest.raises(DataError, match=got) as caught:
        encode(make_tokenizer(), example)
    assert SECRET not in str(caught.value)


REWRITES_EARLIER = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}"
    "{% if loop.last and not add_generation_prompt %}{{ '[end]' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
OTHER_PROMPT = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]<think>' }}{% endif %}"
)


@pytest.mark.parametrize("template", [REWRITES_EARLIER, OTHER_PROMPT])
def test_a_template_that_writes_a_beginning_in_two_ways_is_refused(make_tokenizer, template):
    expected = r"got a change before or in turn 2 \(household\.jsonl:12\)"
    with pytest.raises(ModelError, match=expected) as caught:
        encode(make_tokenizer(chat_template=template), chat(SECRET, SECRET, "c", "d"))
    assert SECRET not in str(caught.value)


def test_a_template_that_leaves_out_the_answer_is_refused(make_tokenizer):
    template = "{% for m in messages %}{{ '[' + m.role + ']' }}{% endfor %}{% if false %}{{ m }}{% endif %}"
    with pytest.raises(ModelError, match=r"expected it to write turn 2, got it left out \(household"):
        encode(make_tokenizer(chat_template=template), chat("a", SECRET))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ raise_exception('I dislike ' + messages[0].content) }}", "a refusal that quotes the text"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
    ],
)
def test_a_templates_refusal_is_passed_on_without_the_text(make_tokenizer, template, reason):
    example = row(
        {"messages": [{"role": r, "content": c} for r, c in [("user", SECRET), ("system", ""), ("assistant", "b!")]]}
    )
    with pytest.raises(DataError, match=rf"turns that it accepts, got: .*{reason}.* \(household\.jsonl:12\)") as caught:
        encode(make_tokenizer(chat_template=template), example)
    assert SECRET not in str(caught.value)
    assert caught.value.__context__ is None


def test_an_encoded_example_hides_its_tokens():
    assert repr(Encoded([11, 22, 33], [-100, 22, 33])) == "<Encoded 3 tokens, 2 with a loss>"


def test_all_examples_are_encoded_one_by_one(make_tokenizer):
    tokenizer = make_tokenizer()
    seen = []

    def examples():
        for text in ("a dog", "a house"):
            seen.append(text)
            yield row({"text": text})

    rows = encode_all(Encoder(tokenizer, max_length=20, truncate=False), examples())
    first = next(rows)
    assert seen == ["a dog"]
    ids = tokenizer("a dog<|im_end|>")["input_ids"]
    assert first == {"input_ids": ids, "labels": ids}
    assert len(list(rows)) == 1
