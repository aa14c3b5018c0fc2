"""A run's examples: read from where its options say, and encoded as its task has it.

May import everything below `run`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from tidelock.data.encode import Encoder, TokenRow, encode_all
from tidelock.data.encode_pair import PairEncoder, PairRow
from tidelock.data.encode_sequence import SequenceEncoder, SequenceRow, count_classes
from tidelock.data.source import read_examples

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from tidelock.data.example import Example
    from tidelock.device.device_lm import DeviceLM
    from tidelock.run.config import RunConfig

EncodedRows: TypeAlias = list[TokenRow] | list[PairRow] | list[SequenceRow]

_FALLBACK_MAX_LENGTH = 2048


def read_run_examples(config: RunConfig) -> tuple[list[Example], list[Example]]:
    """Return the examples to learn from, and those to measure on.

    Raises:
        DataError: As `read_examples`.
    """
    examples = read_examples(config.data, split=config.split)
    if config.eval_data is None and config.eval_split is None:
        return examples, []
    return examples, read_examples(config.eval_data or config.data, split=config.eval_split)


def with_classes_counted(config: RunConfig, examples: Sequence[Example]) -> RunConfig:
    """Return the configuration with the number of classes, found in the examples where it is left out.

    Raises:
        DataError: The labels are not classes.
    """
    if config.task != "classification" or config.num_labels is not None:
        return config
    return replace(config, num_labels=count_classes(examples))


def encode_examples(
    config: RunConfig, model: DeviceLM, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> EncodedRows:
    """Return the rows that a model learns from or is measured on.

    Raises:
        TidelockError: As the encoders.
    """
    return encode_for(config, model.num_labels, model.ends.max_positions, tokenizer, examples)


def encode_for(
    config: RunConfig,
    num_labels: int | None,
    limit: int | None,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
) -> EncodedRows:
    """Return the rows that a model learns from or is measured on, of which this is known.

    Args:
        config: The run.
        num_labels: Classes of whole texts, 1 for a number; None without labels of whole texts.
        limit: Most positions that the model was made for, or None.
        tokenizer: The model's.
        examples: To encode.

    Raises:
        TidelockError: As the encoders.
    """
    max_length = longest_example(config, limit)
    if num_labels is not None:
        encoder = SequenceEncoder(tokenizer, max_length=max_length, truncate=config.truncate, num_labels=num_labels)
        return list(encoder.encode_all(examples))
    if config.task == "text-to-text":
        return list(PairEncoder(tokenizer, max_length=max_length, truncate=config.truncate).encode_all(examples))
    return list(encode_all(Encoder(tokenizer, max_length=max_length, truncate=config.truncate), examples))


def longest_example(config: RunConfig, limit: int | None) -> int:
    """Return the most tokens that an example of a run may have.

    Args:
        config: The run.
        limit: Most positions that the model was made for, or None.
    """
    return min(config.max_length or limit or _FALLBACK_MAX_LENGTH, limit or config.max_length or 1 << 30)
