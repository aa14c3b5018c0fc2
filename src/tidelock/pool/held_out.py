"""Examples that a pool does not learn from: when they are measured, who has which of them, and what came of it.

Shapes: N examples, C classes (1 for a number). May import `pool` and libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch

from tidelock.pool.layout import divide

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from tidelock.pool.example import Example
    from tidelock.pool.peers import Peers


@final
@dataclass(frozen=True, slots=True)
class Measured:
    """What a batch was measured to give, the same on every peer.

    Attributes:
        loss: Its loss.
        outputs_BC: What a head for whole texts gave for its rows; C is 0 without one.
    """

    loss: float
    outputs_BC: Tensor


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

    def measured(self, measure: Callable[[Sequence[Example]], Measured]) -> Measured:
        """Return what all examples were measured to give, with outputs of shape (N, C).

        The loss is the mean over examples of that of the batch that they are in, as `transformers.Trainer` has it.

        Args:
            measure: Given a batch, returns what it gives; the loss is the mean over its labels.
        """
        batches = self._batches()
        found = [measure(batch) for batch in batches]
        total = sum(each.loss * len(batch) for each, batch in zip(found, batches, strict=True))
        return Measured(total / len(self.examples), torch.cat([each.outputs_BC for each in found]))

    def _batches(self) -> list[Sequence[Example]]:
        return [
            self.examples[first : first + self.batch_size] for first in range(0, len(self.examples), self.batch_size)
        ]


def sum_of_measures(peers: Peers, loss: float, outputs_BC: Tensor) -> Measured:
    """Return what a batch was measured to give, out of what each peer has of it.

    Args:
        peers: All peers; all of them call this.
        loss: This peer's part of it.
        outputs_BC: What a head gave for this peer's rows; zero at others'.

    Raises:
        PeerError: A peer was lost.
    """
    total = torch.cat([torch.tensor([loss], dtype=torch.float64), outputs_BC.flatten().double()])
    peers.sum(total, range(peers.count))
    return Measured(float(total[0]), total[1:].view_as(outputs_BC).float())
