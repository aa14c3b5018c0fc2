"""Turns prompts and completions into a source and a target each, once, before training: for encoder-decoders.

Not for language models without an encoder, which read both as one text (`encode`). Token ids are private text in
another spelling, so no error shows them. Imports `errors`, `encode` and `example`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict, final

from tidelock.data.encode import require_length, require_usable
from tidelock.data.example import PromptCompletion
from tidelock.errors import DataError, ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from transformers import PreTrainedTokenizerBase

    from tidelock.data.example import Example


@final
class PairRow(TypedDict):
    """What ``transformers.Trainer`` takes of one example.

    Attributes:
        input_ids: Token ids of the source, unpadded.
        labels: Token ids of the target, unpadded, all of them learned.
    """

    input_ids: list[int]
    labels: list[int]


@final
class PairEncoder:
    """Encodes prompts and completions with one tokenizer, each with the special tokens that it adds by itself.

    A target ends in an end-of-sequence token, also where the tokenizer adds none or it was cut.

    Args:
        tokenizer: A fast tokenizer.
        max_length: The most tokens of a source, and of a target, at least 2.
        truncate: Cuts longer ones at the right, where they are otherwise refused.

    Raises:
        ConfigError: `max_length` is below 2.
        ModelError: The tokenizer is not a fast one, or has no end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, truncate: bool) -> None:
        require_usable(tokenizer, max_length)
        if tokenizer.eos_token_id is None:
            msg = "Tokenizer: expected an end-of-sequence token, got none. Set eos_token in its tokenizer_config.json."
            raise ModelError(msg)
        # Its type does not declare what a call returns.
        self._tokenizer: Any = tokenizer
        self._max_length = max_length
        self._truncate = truncate

    def encode(self, example: Example) -> PairRow:
        """Return the example's source and target.

        Raises:
            DataError: It is of another form, is too long, or its prompt has no token.
        """
        content, where = example.content, example.where
        if not isinstance(content, PromptCompletion):
            advice = "Write rows of that form, or choose another --task."
            msg = f"Example: expected a source and a target, {{prompt, completion}}, got another form ({where}). "
            raise DataError(msg + advice)
        source, target = self._ids(where, content.prompt), self._ids(where, text_target=content.completion)
        if not source:
            msg = f"Example: expected at least one token in 'prompt', got none ({where}). Mend or remove the row."
            raise DataError(msg)
        end: int = self._tokenizer.eos_token_id
        if not target or target[-1] != end:
            target = [*target[: self._max_length - 1], end]
        return {"input_ids": source, "labels": target}

    def encode_all(self, examples: Iterable[Example]) -> Iterator[PairRow]:
        """Yield one row for each example.

        Raises:
            DataError: As `encode` does.
        """
        return (self.encode(example) for example in examples)

    def _ids(self, where: str, text: str | None = None, text_target: str | None = None) -> list[int]:
        settings = {"truncation": True, "max_length": self._max_length} if self._truncate else {}
        ids: list[int] = self._tokenizer(text, text_target=text_target, verbose=False, **settings)["input_ids"]
        require_length(len(ids), self._max_length, where)
        return ids
