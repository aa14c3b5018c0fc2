"""One example of a run in a pool, and how many numbers of a message between two stages are of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

IGNORED = -100


@final
@dataclass(frozen=True, slots=True)
class Example:
    """One example.

    Attributes:
        input_ids: A text's; of an encoder-decoder, the source's.
        labels: As long as these, -100 where there is no loss; of an encoder-decoder, the target's, all of them learned;
            or one for the whole text, an int is a class, a float a number to be predicted.
        decoder_ids: What an encoder-decoder's decoder is given to predict the labels; empty of a text.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...] | float
    decoder_ids: tuple[int, ...] = ()

    @property
    def selected(self) -> tuple[int, ...]:
        """Which of the tokens predict a label: those before one; of a whole text its last; all that a decoder has."""
        if self.decoder_ids:
            return tuple(range(len(self.decoder_ids)))
        if isinstance(self.labels, tuple):
            return tuple(place for place, label in enumerate(self.labels[1:]) if label != IGNORED)
        return (len(self.input_ids) - 1,)

    @property
    def num_labels(self) -> int:
        """How many of the tokens predict a label."""
        return len(self.selected)


@final
@dataclass(frozen=True, slots=True)
class Width:
    """How many numbers a message has for each token of an example.

    Attributes:
        text: For each of its input ids.
        target: For each id that an encoder-decoder's decoder is given.
    """

    text: int
    target: int = 0

    def numbers(self, example: Example) -> int:
        """Return how many numbers of a message are of an example."""
        return self.text * len(example.input_ids) + self.target * len(example.decoder_ids)


@final
@dataclass(frozen=True, slots=True)
class Boundary:
    """What crosses between two neighbouring stages.

    Attributes:
        forward: To the later one.
        backward: To the earlier one; None when nothing learns in the earlier one or before, and nothing is sent.
    """

    forward: Width
    backward: Width | None
