"""One training example, in one of four forms; the only type that holds private text as text.

Not a reader of files (`source`) and not a tokenizer (`encode`). No value here shows its text in its `repr`, and no
error names it: they name the file and the line. Imports only `errors`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, TypeAlias, final

from tidelock.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

# The keys that decide a row's form, and with them all that are read. Rows of other forms may have a label too.
FORM_KEYS = ("messages", "prompt", "completion", "text", "text_a")
KEYS = (*FORM_KEYS, "text_b", "label")
ROLES = ("system", "developer", "user", "assistant")
_FORMS = "{messages}, {prompt, completion}, {text} or {text_a, text_b, label}"


@final
@dataclass(frozen=True, slots=True, repr=False)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@final
@dataclass(frozen=True, slots=True, repr=False)
class Conversation:
    """The form ``{"messages": [{"role", "content"}, ...]}``; the assistant's turns are what is learned."""

    messages: tuple[Message, ...]


@final
@dataclass(frozen=True, slots=True, repr=False)
class PromptCompletion:
    """The form ``{"prompt", "completion"}``; the completion is what is learned."""

    prompt: str
    completion: str


@final
@dataclass(frozen=True, slots=True, repr=False)
class PlainText:
    """The form ``{"text"}``; all of it is learned."""

    text: str


@final
@dataclass(frozen=True, slots=True, repr=False)
class LabelledText:
    """The form ``{"text_a", "text_b"?, "label"}``; the label of the text, or of the two, is what is learned.

    Args:
        text_b: None where there is only one text.
        label: A class, whole and from 0, or any finite number, as the task has it.
    """

    text_a: str
    text_b: str | None
    label: float


Content: TypeAlias = Conversation | PromptCompletion | PlainText | LabelledText


@final
@dataclass(frozen=True, slots=True, repr=False)
class Example:
    """One row of a data set, and where it came from.

    Args:
        source: The file's name, or the hub data set's name with its split.
        line: The line of a text file, or the row of a table; the first is 1.
    """

    source: str
    line: int
    content: Content

    @property
    def where(self) -> str:
        """Where the example came from, as messages name it: ``household.jsonl:12``."""
        return f"{self.source}:{self.line}"

    def __repr__(self) -> str:
        return f"<Example {self.where}>"


def parse_row(row: object, *, source: str, line: int) -> Example:
    """Return the example that a row holds. Keys other than those of the forms are ignored, as are null values.

    >>> parse_row({"prompt": "2 + 2 =", "completion": " 4"}, source="sums.jsonl", line=12)
    <Example sums.jsonl:12>

    Raises:
        DataError: The row is not a mapping, has none of the forms or more than one, or a part of it is of the wrong
            type, empty where it may not be, or not Unicode text.
    """
    where = f"{source}:{line}"
    if not isinstance(row, Mapping):
        _refuse("Row", "an object with keys", _kind(row), where, f"Write each row as {_FORMS}.")
    present = frozenset(key for key in FORM_KEYS if row.get(key) is not None)
    parse = _PARSERS.get(present)
    if parse is None:
        names = " and ".join(key for key in FORM_KEYS if key in present)
        _refuse("Row", f"exactly one of {_FORMS}", names or "none of these keys", where, "Keep or add the keys of one.")
    return Example(source, line, parse(row, where))


def _conversation(row: Mapping[str, object], where: str) -> Conversation:
    turns = row["messages"]
    if not isinstance(turns, (list, tuple)):
        _refuse("'messages'", "a list of turns", _kind(turns), where, 'Write [{"role": ..., "content": ...}, ...].')
    if not turns:
        _refuse("'messages'", "at least one turn", "an empty list", where, "Fill it or remove the row.")
    return Conversation(tuple(_message(turn, f"{where}, turn {index}") for index, turn in enumerate(turns, 1)))


def _message(turn: object, where: str) -> Message:
    if not isinstance(turn, Mapping):
        _refuse("Turn", "an object with 'role' and 'content'", _kind(turn), where, "Write each turn so.")
    role = turn.get("role")
    if role not in ROLES:
        # The value itself may be text that slipped into the wrong key, so it is not shown.
        got = "another text" if isinstance(role, str) else _kind(role)
        advice = "Rename it; ShareGPT's 'human' and 'gpt' are 'user' and 'assistant'."
        _refuse("'role'", f"one of {', '.join(ROLES)}", got, where, advice)
    if turn.get("tool_calls"):
        # Trained without them, the model would learn to answer nothing where it should call a tool.
        _refuse("Turn", "only text", "'tool_calls'", where, "Write the call as text in 'content' or remove the row.")
    return Message(role, _text(turn.get("content"), "'content'", where, may_be_empty=role != "assistant"))


def _prompt_completion(row: Mapping[str, object], where: str) -> PromptCompletion:
    prompt = _text(row["prompt"], "'prompt'", where, may_be_empty=True)
    return PromptCompletion(prompt, _text(row["completion"], "'completion'", where, may_be_empty=False))


def _plain_text(row: Mapping[str, object], where: str) -> PlainText:
    return PlainText(_text(row["text"], "'text'", where, may_be_empty=False))


def _labelled_text(row: Mapping[str, object], where: str) -> LabelledText:
    text_a = _text(row["text_a"], "'text_a'", where, may_be_empty=False)
    text_b, label = row.get("text_b"), row.get("label")
    if text_b is not None:
        # A table has a cell for it in every row.
        text_b = _text(text_b, "'text_b'", where, may_be_empty=True) or None
    if isinstance(label, bool) or not isinstance(label, int | float):
        _refuse("'label'", "a number", _kind(label), where, "Number classes from 0.")
    if isinstance(label, float) and not math.isfinite(label):
        _refuse("'label'", "a finite number", "an infinite or undefined one", where, "Mend or remove the row.")
    return LabelledText(text_a, text_b, label)


_PARSERS: dict[frozenset[str], Callable[[Mapping[str, object], str], Content]] = {
    frozenset({"messages"}): _conversation,
    # Some hub data sets repeat the first question beside the conversation.
    frozenset({"messages", "prompt"}): _conversation,
    frozenset({"prompt", "completion"}): _prompt_completion,
    frozenset({"text"}): _plain_text,
    frozenset({"text_a"}): _labelled_text,
}


def _text(value: object, what: str, where: str, *, may_be_empty: bool) -> str:
    if not isinstance(value, str):
        _refuse(what, "text", _kind(value), where, "Write it as a string.")
    if not value and not may_be_empty:
        _refuse(what, "text that can be learned", "an empty string", where, "Fill it or remove the row.")
    if not _is_unicode(value):
        _refuse(what, "Unicode text", "half of a surrogate pair", where, "Write the row anew as UTF-8.")
    return value


def _is_unicode(text: str) -> bool:
    """Return whether a tokenizer can take the text: JSON's escapes can spell half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a value of type {type(value).__name__}"


def _refuse(what: str, rule: str, got: str, where: str, advice: str) -> NoReturn:
    msg = f"{what}: expected {rule}, got {got} ({where}). {advice}"
    raise DataError(msg)
