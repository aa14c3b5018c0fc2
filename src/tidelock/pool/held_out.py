"""Examples that a pool does not learn from: when the loss on them is measured, and who has which of them.

May import `pool`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from tidelock.pool.layout import divide

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tidelock.pool.pipeline import Example


@final
@dataclass(frozen=True, slots=True)
class HeldOut:
    """What a run is measured on; the same on every peer.

    Attributes:
        examples: In the order in which they are measured; none measures nothing.
        batch_size: Examples measured at once.
        every: Steps between two measurements; there is one after the last step besides.
    """

    examples: Sequence[Example] = ()
    batch_size: int = 1
    every: int = 1

    def is_due(self, step: int, last_step: int) -> bool:
        """Return whether the loss is measured after a step."""
        return bool(self.examples) and step > 0 and (step % self.every == 0 or step == last_step)

    def shards(self, batch: Sequence[Example], peers: int) -> list[Sequence[Example]]:
        """Return which examples of a batch are whose, once their outputs are cached."""
        return [batch[own.start : own.stop] for own in divide(range(len(batch)), [1] * peers)]

    def owners(self, peers: int) -> list[int]:
        """Return for each example which peer measures on it then."""
        return [
            peer
            for batch in self._batches()
            for peer, own in enumerate(self.shards(batch, peers))
            for _ in range(len(own))
        ]

    def mean(self, loss_of: Callable[[Sequence[Example]], float]) -> float:
        """Return the mean over examples of the loss of the batch that they are in, as `transformers.Trainer` has it.

        Args:
            loss_of: Given a batch, returns its loss: the mean over its labels.
        """
        return sum(loss_of(batch) * len(batch) for batch in self._batches()) / len(self.examples)

    def _batches(self) -> list[Sequence[Example]]:
        return [
            self.examples[first : first + self.batch_size] for first in range(0, len(self.examples), self.batch_size)
        ]
