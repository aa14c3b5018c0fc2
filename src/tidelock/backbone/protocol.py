"""What the device asks of whatever runs the frozen blocks, wherever that is.

May import `backbone`, `model`, `schedule` and libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import Cache

    from tidelock.backbone.pass_times import TimeSplit
    from tidelock.model.geometry import Geometry
    from tidelock.model.rows import Rows
    from tidelock.model.taps import Taps
    from tidelock.model.walk import Batch, Sites
    from tidelock.schedule.schedule import Decision, Schedule, ScoreTable


class AttemptSites(Protocol):
    """The device's half of a pass, which can be told to begin again when an attempt is lost."""

    def begin(self) -> Sites:
        """Return the answering half for a new attempt; whatever an earlier one computed is forgotten."""
        ...


class Pass(Protocol):
    """One micro-batch that has been run forward.

    Attributes:
        final_MD: The decoder's final states at the selected tokens, shape (M, D), detached.
    """

    final_MD: Tensor

    def backward(self, grad_MD: Tensor) -> None:
        """Take the gradient of `final_MD` and hand every active site its own; once, and only when training."""
        ...

    def close(self) -> None:
        """Free what was kept for backward; harmless when that is done already."""
        ...


class Generation(Protocol):
    """A batch of rows that grows by one token at a time, with keys and values kept where the blocks are.

    Attributes:
        final_BD: The final state of the last token of each row, shape (B, D).
    """

    final_BD: Tensor

    def extend(self, embeddings_BE: Tensor) -> Tensor:
        """Return the final states, shape (B, D), after one more token in each row."""
        ...

    def close(self) -> None:
        """Free the keys and values."""
        ...


class Backbone(Protocol):
    """The frozen blocks of one model."""

    @property
    def geometry(self) -> Geometry:
        """The shape of the model."""
        ...

    @property
    def max_active(self) -> int | None:
        """Most active modules that a training pass may have, or None."""
        ...

    def decide(self, schedule: Schedule, table: ScoreTable) -> Decision:
        """Return which modules are active in the period after the one that ended, as the scheduler there decides."""
        ...

    def take_times(self) -> TimeSplit:
        """Return what training passes have waited for since the last call, in seconds on the clock."""
        ...

    def passes_at_once(self) -> int:
        """Return how many passes at once are worth having; results do not depend on how many there are."""
        ...

    def forward(self, batch: Batch, sites: AttemptSites) -> Pass:
        """Run a batch through the blocks, asking `sites` at every active site."""
        ...

    def generate(self, batch: Batch, sites: AttemptSites) -> Generation:
        """Run the prompts of a batch, padded at the left, and keep keys and values for more tokens."""
        ...

    def close(self) -> None:
        """Let go of the model or of the connection."""
        ...


class TapGeneration(Protocol):
    """As `Generation`, for a side network: the taps of every token come, and nothing is asked.

    Attributes:
        taps: Those of the tokens that came last.
    """

    taps: Taps

    def extend(self, embeddings_BE: Tensor) -> Taps:
        """Return the taps, N = M = B, of one more token in each row."""
        ...

    def close(self) -> None:
        """Free the keys and values."""
        ...


class TappedBackbone(Protocol):
    """The frozen blocks of one model, for a side network: run forward only, without active sites."""

    @property
    def geometry(self) -> Geometry:
        """The shape of the model."""
        ...

    @property
    def on_own_cores(self) -> bool:
        """Whether it is this process's own processor that computes."""
        ...

    def take_times(self) -> TimeSplit:
        """Return what passes have waited for since the last call, in seconds on the clock."""
        ...

    def read_taps(self, batch: Batch, blocks: Sequence[int], width: int | None = None) -> Taps:
        """Run a batch through the blocks and return what the tapped ones gave, projected to a width or whole."""
        ...

    def generate_taps(self, batch: Batch, blocks: Sequence[int], width: int | None = None) -> TapGeneration:
        """Run the prompts of a batch, padded at the left, read the taps, and keep keys and values for more tokens."""
        ...

    def close(self) -> None:
        """Let go of the model or of the connection."""
        ...


class Seq2SeqBackbone(Protocol):
    """The frozen stacks of one encoder-decoder, for a side network: run forward only."""

    @property
    def on_own_cores(self) -> bool:
        """Whether it is this process's own processor that computes."""
        ...

    def take_times(self) -> TimeSplit:
        """Return what passes have waited for since the last call, in seconds on the clock."""
        ...

    def encode(self, embeddings_NE: Tensor, rows: Rows, blocks: Sequence[int]) -> Taps:
        """Return the encoder's taps and its final state at every token."""
        ...

    def decode(
        self,
        embeddings_KE: Tensor,
        rows: Rows,
        source: tuple[Tensor, Rows],
        blocks: Sequence[int],
        cache: Cache | None = None,
    ) -> Taps:
        """Return the decoder's taps and its final state at every token that it is given.

        Args:
            embeddings_KE: Word embeddings of the decoder's inputs.
            rows: Where they are; with a filled cache, where the first ones were.
            source: The encoder's final state, shape (N, D), and where its tokens are.
            blocks: The tapped blocks of the decoder.
            cache: Keys and values of the targets before these, and of the source; extended in place.
        """
        ...

    def close(self) -> None:
        """Let go of the model."""
        ...
