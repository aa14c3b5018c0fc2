import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidelock.data.example import KEYS, Conversation, LabelledText, Message, PlainText, PromptCompletion, parse_row
from tidelock.errors import DataError

SECRET = "Marlowe"


def parse(row):
    return parse_row(row, source="household.jsonl", line=12)


def turns(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("row", "content"),
    [
        (turns(("user", "Hi"), ("assistant", "Yo")), Conversation((Message("user", "Hi"), Message("assistant", "Yo")))),
        ({"prompt": "2 + 2 =", "completion": " 4"}, PromptCompletion("2 + 2 =", " 4")),
        ({"prompt": "", "completion": "x"}, PromptCompletion("", "x")),
        ({"text": "once"}, PlainText("once")),
        ({"text": "once", "id": 7, "messages": None, "split": "train"}, PlainText("once")),
        ({"text": "once", "label": 1, "text_b": "no"}, PlainText("once")),
        ({"text_a": "good", "label": 1}, LabelledText("good", None, 1)),
        ({"text_a": "good", "text_b": None, "label": -2.5}, LabelledText("good", None, -2.5)),
        ({"text_a": "one", "text_b": "two", "label": 0, "id": 3}, LabelledText("one", "two", 0)),
        ({"text_a": "one", "text_b": "", "label": 0}, LabelledText("one", None, 0)),
        ({**turns(("user", ""), ("assistant", "Yo")), "prompt": "Hi"}, None),
    ],
)
def test_each_form_is_read(row, content):
    example = parse(row)
    assert (example.source, example.line, example.where) == ("household.jsonl", 12, "household.jsonl:12")
    if content is None:
        assert isinstance(example.content, Conversation)
    else:
        assert example.content == content


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([SECRET], r"^Row: expected an object with keys, got a value of type list \(household\.jsonl:12\)\. Write"),
        ({SECRET: SECRET}, r"^Row: expected exactly one of .*, got none of these keys \(household\.jsonl:12\)\."),
        ({"prompt": SECRET}, r"got prompt \("),
        ({"prompt": SECRET, "completion": None}, r"got prompt \("),
        ({"text": SECRET, "completion": SECRET}, r"got completion and text \("),
        ({**turns(("user", SECRET)), "text": SECRET}, r"got messages and text \("),
        ({"prompt": SECRET, "completion": SECRET, "text": SECRET}, r"got prompt and completion and text \("),
        ({"messages": SECRET}, r"'messages': expected a list of turns, got a value of type str"),
        ({"messages": []}, r"'messages': expected at least one turn, got an empty list"),
        (
            {"messages": [SECRET]},
            r"Turn: expected an object .* got a value of type str \(household\.jsonl:12, turn 1\)",
        ),
        (
            turns(("user", SECRET), (SECRET, "x")),
            r"'role': .* got another text \(household\.jsonl:12, turn 2\).*ShareGPT",
        ),
        (turns((None, SECRET)), r"'role': expected one of .* got nothing"),
        (turns((["user"], SECRET)), r"'role': expected one of .* got a value of type list"),
        (turns(("user", None)), r"'content': expected text, got nothing"),
        (turns(("user", [SECRET])), r"'content': expected text, got a value of type list"),
        (turns(("user", SECRET), ("assistant", "")), r"'content': expected text that can be learned, got an empty"),
        (
            {"messages": [{"role": "assistant", "content": SECRET, "tool_calls": [SECRET]}]},
            r"only text, got 'tool_calls'",
        ),
        ({"prompt": 3, "completion": SECRET}, r"'prompt': expected text, got a value of type int"),
        ({"prompt": SECRET, "completion": [SECRET]}, r"'completion': expected text, got a value of type list"),
        ({"prompt": SECRET, "completion": ""}, r"'completion': expected text that can be learned, got an empty string"),
        ({"text": ""}, r"'text': expected text that can be learned"),
        ({"text_a": "", "label": 1}, r"'text_a': expected text that can be learned, got an empty string"),
        ({"text_a": SECRET, "text_b": 3, "label": 1}, r"'text_b': expected text, got a value of type int"),
        ({"text_a": SECRET}, r"'label': expected a number, got nothing \("),
        ({"text_a": SECRET, "label": SECRET}, r"'label': expected a number, got a value of type str \("),
        ({"text_a": SECRET, "label": True}, r"'label': expected a number, got a value of type bool"),
        ({"text_a": SECRET, "label": float("nan")}, r"'label': expected a finite number, got an infinite or undef"),
        ({"text_a": SECRET, "label": 1, "text": SECRET}, r"got text and text_a \("),
        ({"text": f"{SECRET} \ud83d"}, r"'text': expected Unicode text, got half of a surrogate pair"),
    ],
)
def test_each_wrong_row_is_refused_without_its_text(row, expected):
    with pytest.raises(DataError, match=expected) as caught:
        parse(row)
    assert SECRET not in str(caught.value)
    assert "household.jsonl:12" in str(caught.value)


def test_no_repr_shows_text():
    conversation = parse(turns(("user", SECRET), ("assistant", SECRET)))
    completion = parse({"prompt": SECRET, "completion": SECRET})
    values = [conversation, conversation.content, conversation.content.messages, completion.content]
    values += [completion, parse({"text": SECRET}).content]
    assert repr(conversation) == "<Example household.jsonl:12>"
    for value in values:
        assert SECRET not in repr(value)
        assert SECRET not in f"{value}"


def test_values_cannot_be_changed():
    example = parse({"text": "x"})
    with pytest.raises(AttributeError):
        example.line = 3


_values = st.recursive(
    st.none() | st.integers() | st.text(max_size=4) | st.sampled_from(["user", "assistant"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["role", "content", "tool_calls"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*KEYS, "id"]), _values))
def test_any_row_is_read_or_refused_with_its_place(row):
    try:
        said = repr(parse(row))
    except DataError as error:
        said = str(error)
    assert "household.jsonl:12" in said
