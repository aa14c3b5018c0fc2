"""The frozen stacks of an encoder-decoder in this process. May import `backbone`, `model` and libraries."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from tidelock.backbone.pass_times import TimeSplit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import Cache

    from tidelock.model.rows import Rows
    from tidelock.model.seq2seq import FrozenSeq2Seq
    from tidelock.model.taps import Taps


@final
class LocalSeq2Seq:
    """Runs the frozen stacks in this process; see `backbone.protocol.Seq2SeqBackbone`."""

    def __init__(self, frozen: FrozenSeq2Seq) -> None:
        self._frozen = frozen

    @property
    def on_own_cores(self) -> bool:
        """Whether the blocks are in main memory."""
        return self._frozen.device.type == "cpu"

    def take_times(self) -> TimeSplit:
        """Nothing is waited for: all is this process's own computing."""
        return TimeSplit()

    def encode(self, embeddings_NE: Tensor, rows: Rows, blocks: Sequence[int]) -> Taps:
        """Return the encoder's taps and its final state at every token."""
        return self._frozen.encode(embeddings_NE, rows, blocks)

    def decode(
        self,
        embeddings_KE: Tensor,
        rows: Rows,
        source: tuple[Tensor, Rows],
        blocks: Sequence[int],
        cache: Cache | None = None,
    ) -> Taps:
        """Return the decoder's taps and its final state at every token that it is given."""
        return self._frozen.decode(embeddings_KE, rows, source, blocks, cache)

    def close(self) -> None:
        """Nothing to let go of: the model goes with the last reference to it."""
