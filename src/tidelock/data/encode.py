"""Turns examples into token ids and labels, once, before training: for language modelling, a label for each token.

Not for texts with one label each (`encode_sequence`), not a collator (`batch`) and not a choice of tokenizer: the
caller loads it. Token ids are private text in another spelling, so no `repr` or error shows them. Imports `errors` and
`example`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, TypedDict, final

from jinja2 import TemplateError

from tidelock.data.example import Conversation, LabelledText, PlainText
from tidelock.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from transformers import PreTrainedTokenizerBase

    from tidelock.data.example import Example

NO_LOSS = -100
"""The label of a token that carries no loss, as in PyTorch and Hugging Face."""


@final
@dataclass(frozen=True, slots=True, repr=False)
class Encoded:
    """One example as a model takes it.

    Args:
        input_ids: Token ids, unpadded, at most the encoder's `max_length`.
        labels: As long as `input_ids` and not shifted: the token id where it carries a loss, else -100.
    """

    input_ids: list[int]
    labels: list[int]

    def __repr__(self) -> str:
        learned = sum(label != NO_LOSS for label in self.labels)
        return f"<Encoded {len(self.input_ids)} tokens, {learned} with a loss>"


@final
class TokenRow(TypedDict):
    """What ``transformers.Trainer`` takes of one example; see `Encoded`."""

    input_ids: list[int]
    labels: list[int]


@final
class Encoder:
    """Encodes examples with one tokenizer.

    Conversations are written by the tokenizer's chat template, and what the template writes for the assistant's turns
    carries the loss. Of a prompt and completion the completion does, of a text all of it, both with an end-of-sequence
    token added where the text does not end in one; those two forms come out as TRL's ``SFTTrainer`` makes them.

    Args:
        tokenizer: A fast tokenizer (one with ``tokenizers`` behind it).
        max_length: The most tokens of an example, at least 2.
        truncate: Cuts longer examples at the right, where they are otherwise refused.

    Raises:
        ConfigError: `max_length` is below 2.
        ModelError: The tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, truncate: bool) -> None:
        require_usable(tokenizer, max_length)
        # Its type declares neither what a call returns nor the special tokens.
        self._tokenizer: Any = tokenizer
        self._max_length = max_length
        self._truncate = truncate

    def encode(self, example: Example) -> Encoded:
        """Return the example's tokens and labels.

        Raises:
            ConfigError: The example is a conversation and the tokenizer has no chat template.
            DataError: The example is too long, carries no loss, has a label of its own, or the chat template refuses
                it.
            ModelError: The tokenizer has no end-of-sequence token, or its chat template rewrites or omits turns.
        """
        content = example.content
        if isinstance(content, Conversation):
            encoded = self._encode_conversation(content, example.where)
        elif isinstance(content, PlainText):
            encoded = self._encode_text(None, content.text)
        elif isinstance(content, LabelledText):
            advice = "Choose --task classification or regression, or another form."
            msg = f"Example: expected text to be continued, got {{text_a, label}} ({example.where}). {advice}"
            raise DataError(msg)
        else:
            encoded = self._encode_text(content.prompt, content.completion)
        return self._fit(encoded, example.where)

    def _encode_text(self, prompt: str | None, learned: str) -> Encoded:
        end = self._tokenizer.eos_token
        if end is None:
            advice = "Set eos_token in its tokenizer_config.json."
            msg = f"Tokenizer: expected an end-of-sequence token, got none. {advice}"
            raise ModelError(msg)
        whole = (prompt or "") + learned + ("" if learned.endswith(end) else end)
        start = self._tokenizer.bos_token
        # A text that already begins with the start token must not get a second one.
        add_special_tokens = start is None or not whole.startswith(start)
        ids = self._ids(whole, add_special_tokens=add_special_tokens)
        prompt_ids = [] if prompt is None else self._ids(prompt, add_special_tokens=add_special_tokens)
        # A token can span the end of the prompt; the loss then begins with that token.
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt_ids, ids, strict=False)))
        return Encoded(ids, [NO_LOSS] * shared + ids[shared:])

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return ids

    def _encode_conversation(self, conversation: Conversation, where: str) -> Encoded:
        if self._tokenizer.chat_template is None:
            advice = "Use an instruction-tuned model, or rows of the form {prompt, completion}."
            msg = f"Tokenizer: expected a chat template to write 'messages' with, got none ({where}). {advice}"
            raise ConfigError(msg)
        roles = [message.role for message in conversation.messages]
        if "assistant" not in roles or roles[0] == "assistant":
            got = "a conversation that begins with the assistant" if "assistant" in roles else "no assistant's turn"
            msg = f"'messages': expected an assistant's turn after another one, got {got} ({where}). Mend the row."
            raise DataError(msg)
        text, spans = self._assistant_spans(conversation, where)
        # The template has written the special tokens already.
        tokens = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        # A token learned in part is learned: it can begin before the turn or end after it.
        labels = [
            token if any(begin < stop and end > start for start, stop in spans) else NO_LOSS
            for token, (begin, end) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
        ]
        return Encoded(tokens["input_ids"], labels)

    def _assistant_spans(self, conversation: Conversation, where: str) -> tuple[str, list[tuple[int, int]]]:
        """Return the conversation as the template writes it, and where in it the assistant's turns begin and end."""
        turns = [{"role": message.role, "content": message.content} for message in conversation.messages]
        whole = self._render(turns, where, add_generation_prompt=False)
        spans = []
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before = self._render(turns[:index], where, add_generation_prompt=True)
            after = self._render(turns[: index + 1], where, add_generation_prompt=False)
            if not (after.startswith(before) and whole.startswith(after)):
                rule = "expected it to write earlier turns the same whatever follows"
                advice = "Keep one assistant's turn a row, or use rows of the form {prompt, completion}."
                msg = f"Chat template: {rule}, got a change before or in turn {index + 1} ({where}). {advice}"
                raise ModelError(msg)
            # Templates of vision models may write nothing for content that is a string. Only the last word is looked
            # for, because others rearrange the reasoning before it.
            if not all(word in after[len(before) :] for word in turn["content"].split()[-1:]):
                advice = "Use rows of the form {prompt, completion}."
                msg = f"Chat template: expected it to write turn {index + 1}, got it left out ({where}). {advice}"
                raise ModelError(msg)
            spans.append((len(before), len(after)))
        return whole, spans

    def _render(self, turns: list[dict[str, str]], where: str, *, add_generation_prompt: bool) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            reason = str(error) or type(error).__name__
        else:
            return text
        # Raised out here, without its cause: a template may quote the text.
        if any(turn["content"] and turn["content"] in reason for turn in turns):
            reason = "a refusal that quotes the text"
        advice = "Change the row's roles or their order."
        msg = f"Chat template: expected turns that it accepts, got: {reason} ({where}). {advice}"
        raise DataError(msg)

    def _fit(self, encoded: Encoded, where: str) -> Encoded:
        length, limit = len(encoded.input_ids), self._max_length
        if not self._truncate:
            require_length(length, limit, where)
        fitted = Encoded(encoded.input_ids[:limit], encoded.labels[:limit])
        # The label of the first token is never used: nothing comes before it to predict it from.
        if all(label == NO_LOSS for label in fitted.labels[1:]):
            got = f"none in the first {limit} of {length}" if length > limit else f"none in {length}"
            advice = "Raise --max-length or mend the row."
            msg = f"Example: expected a token that carries a loss, got {got} ({where}). {advice}"
            raise DataError(msg)
        return fitted


def require_usable(tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Refuse a tokenizer or a limit with which nothing can be encoded.

    Raises:
        ConfigError: `max_length` is below 2.
        ModelError: The tokenizer is not a fast one.
    """
    if max_length < 2:
        msg = f"Maximum length: expected at least 2 tokens, got {max_length}. Raise --max-length."
        raise ConfigError(msg)
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        msg = f"Tokenizer: expected a fast one, got {kind}. Use a model folder that holds a tokenizer.json."
        raise ModelError(msg)


def require_length(length: int, limit: int, where: str) -> None:
    """Refuse an example that is longer than the limit.

    Raises:
        DataError: It is.
    """
    if length > limit:
        advice = "Raise --max-length, shorten the row, or cut such rows at the right with --truncate."
        msg = f"Example: expected at most {limit} tokens, got {length} ({where}). {advice}"
        raise DataError(msg)


def encode_all(encoder: Encoder, examples: Iterable[Example]) -> Iterator[TokenRow]:
    """Yield one row for each example; a list of them is what ``transformers.Trainer`` takes as `train_dataset`.

    They come one at a time, so that a caller can show progress.

    Raises:
        TidelockError: As `Encoder.encode` does.
    """
    for example in examples:
        encoded = encoder.encode(example)
        yield {"input_ids": encoded.input_ids, "labels": encoded.labels}
