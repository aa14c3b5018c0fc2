"""Turns texts with one label each, a class or a number, into token ids, once, before training.

Not for language modelling, where each token has a label (`encode`). A label is as private as a text: no `repr` or error
shows one. Imports `errors`, `encode` and `example`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict, final

from tidelock.data.encode import require_length, require_usable
from tidelock.data.example import LabelledText
from tidelock.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from tidelock.data.example import Example

_LARGEST_NUMBER = 3.4028234663852886e38  # of fp32
# Trainer takes it for no label, and would divide the loss by too few.
_NO_LABEL = -100


@final
class SequenceRow(TypedDict):
    """What ``transformers.Trainer`` takes of one example.

    Attributes:
        input_ids: Token ids, unpadded.
        label: An int is a class, a float a number to be predicted.
    """

    input_ids: list[int]
    label: float


@final
class SequenceEncoder:
    """Encodes texts, and pairs of texts, that have one label.

    A pair is written as the tokenizer writes pairs, where it puts a special token between the two; else as `text_a`, a
    newline and `text_b`. No end-of-sequence token is added that the tokenizer does not add by itself.

    Args:
        tokenizer: A fast tokenizer.
        max_length: The most tokens of an example, at least 2.
        truncate: Cuts longer examples at the right, where they are otherwise refused.
        num_labels: How many classes there are; 1 is a number to be predicted.

    Raises:
        ConfigError: `max_length` is below 2.
        ModelError: The tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, truncate: bool, num_labels: int) -> None:
        require_usable(tokenizer, max_length)
        # Its type does not declare what a call returns.
        self._tokenizer: Any = tokenizer
        specials = tokenizer.num_special_tokens_to_add
        self._has_pairs = specials(pair=True) > specials(pair=False)
        self._max_length = max_length
        self._truncate = truncate
        self._num_labels = num_labels

    def encode(self, example: Example) -> SequenceRow:
        """Return the example's tokens and its label.

        Raises:
            DataError: The example has no label, one that does not fit the task, no token, or too many.
        """
        content, where = example.content, example.where
        if not isinstance(content, LabelledText):
            advice = "Write rows of that form, or choose --task causal-lm."
            msg = f"Example: expected a text with a label, {{text_a, label}}, got another form ({where}). {advice}"
            raise DataError(msg)
        label = self._number(content, where) if self._num_labels == 1 else self._class(content, where)
        ids = self._ids(content)
        if not self._truncate:
            require_length(len(ids), self._max_length, where)
        if not ids:
            msg = f"Example: expected at least one token, got none ({where}). Mend or remove the row."
            raise DataError(msg)
        return {"input_ids": ids[: self._max_length], "label": label}

    def encode_all(self, examples: Iterable[Example]) -> Iterator[SequenceRow]:
        """Yield one row for each example.

        Raises:
            DataError: As `encode` does.
        """
        return (self.encode(example) for example in examples)

    def _ids(self, content: LabelledText) -> list[int]:
        if content.text_b is not None and self._has_pairs:
            encoded = self._tokenizer(content.text_a, content.text_b, verbose=False)
        else:
            texts = [content.text_a] if content.text_b is None else [content.text_a, content.text_b]
            encoded = self._tokenizer("\n".join(texts), verbose=False)
        ids: list[int] = encoded["input_ids"]
        return ids

    def _class(self, content: LabelledText, where: str) -> int:
        if not isinstance(content.label, int):
            advice = "Number the classes from 0, or choose --task regression."
            msg = f"'label': expected a whole number for a class, got a value of type float ({where}). {advice}"
            raise DataError(msg)
        if not 0 <= content.label < self._num_labels:
            rule = f"expected a class from 0 to {self._num_labels - 1}"
            msg = f"'label': {rule}, got another number ({where}). Mend the row, or change --num-labels."
            raise DataError(msg)
        return content.label

    def _number(self, content: LabelledText, where: str) -> float:
        if abs(content.label) > _LARGEST_NUMBER or content.label == _NO_LABEL:
            rule = f"expected a number that fp32 can hold, and not {_NO_LABEL}, which stands for no label"
            msg = f"'label': {rule}, got another ({where}). Scale or shift the labels."
            raise DataError(msg)
        return float(content.label)


def count_classes(examples: Sequence[Example]) -> int:
    """Return how many classes there are, by the highest label; labels that are no class do not count.

    Raises:
        DataError: There is only one, or there are more than examples.
    """
    labels = [example.content.label for example in examples if isinstance(example.content, LabelledText)]
    count = max((label for label in labels if isinstance(label, int)), default=-1) + 1
    if not 2 <= count <= max(2, len(examples)):
        got = "labels up to more than there are examples" if count > 2 else "no two"
        msg = f"Classes: expected labels that number at least two of them from 0, got {got}. Give --num-labels."
        raise DataError(msg)
    return count
