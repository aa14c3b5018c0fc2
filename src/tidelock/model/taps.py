"""Runs the frozen blocks without any graph and keeps what a side network reads of them.

Shapes: N real tokens, M selected tokens, B rows, D hidden width, F width of the state that the head reads.
May import `model` and libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from transformers import Cache

    from tidelock.model.cut import BlockCall, CutModel
    from tidelock.model.rows import Layout
    from tidelock.model.walk import Batch


@final
@dataclass(frozen=True, slots=True)
class Taps:
    """What a side network reads of a backbone, besides the word embeddings, which the device has itself.

    Attributes:
        blocks: The output of each tapped block at the real tokens, each of shape (N, D), in the order of the blocks;
            of shape (N, W) where it is projected.
        final_MD: The decoder's final state, after its own last norm, at the selected tokens, shape (M, F).
    """

    blocks: tuple[Tensor, ...]
    final_MD: Tensor


@final
class TapPass:
    """One micro-batch through the frozen blocks, forward only.

    Args:
        cut: The frozen decoder.
        batch: What to run; its sites stay as they are, active or not.
        blocks: The tapped blocks, ascending.
        width: W, numbers per token to which each tap is projected (see `Frames.narrow`); None leaves it whole.
        on_tap: Given each tap as soon as it is there, and then it is not kept; None keeps all.
        between_blocks: Called between blocks, so that a server can let another user compute.
    """

    def __init__(
        self,
        cut: CutModel,
        batch: Batch,
        blocks: Sequence[int],
        width: int | None = None,
        on_tap: Callable[[int, Tensor], None] | None = None,
        between_blocks: Callable[[], None] = lambda: None,
    ) -> None:
        self._cut = cut
        self._batch = batch
        self._blocks = frozenset(blocks)
        self._width = width
        self._on_tap = on_tap
        self._between_blocks = between_blocks

    def forward(self, cache: Cache | None = None) -> Taps:
        """Return the taps of the batch, without a graph; a cache is filled for `extend`."""
        layout = self._cut.layout(self._batch.rows, generates=cache is not None)
        return self._run(self._batch.embeddings_NE, layout, self._batch.select_M, cache)

    def extend(self, embeddings_BE: Tensor, cache: Cache) -> Taps:
        """Return the taps of one more token in every row (N = M = B), after a `forward` with this cache."""
        layout = self._batch.rows.next_layout(cache.get_seq_length(), self._cut.device)
        return self._run(embeddings_BE, layout, torch.arange(len(embeddings_BE)), cache)

    @torch.no_grad()
    def _run(self, embeddings_NE: Tensor, layout: Layout, select_M: Tensor, cache: Cache | None) -> Taps:
        taps: list[Tensor] = []

        def run_blocks(calls: Sequence[BlockCall], hidden_BTD: Tensor) -> Tensor:
            for index, call in enumerate(calls):
                if index:
                    self._between_blocks()
                hidden_BTD = call(hidden_BTD)
                if index in self._blocks:
                    tap = self._cut.frames.narrow(index, layout.pack(hidden_BTD), self._width)
                    if self._on_tap is None:
                        taps.append(tap)
                    else:
                        self._on_tap(index, tap)
            return hidden_BTD

        embeddings_BTE = layout.unpack(embeddings_NE.to(self._cut.device, self._cut.dtype))
        final_BTD = self._cut.run(embeddings_BTE, layout, run_blocks, cache)
        final_MD = layout.pack(final_BTD).index_select(0, select_M.to(final_BTD.device))
        return Taps(tuple(taps), final_MD)
