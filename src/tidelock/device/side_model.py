"""The side method's model: a frozen backbone that is only read, and a trained side network beside it.

A sibling of `device.model`: any training loop for causal language models, or for classifiers, can train it. No gradient
goes through the backbone, so a pass asks it for its taps once, forward, and the rest happens here.

Shapes: B rows, T positions, N real tokens, M tokens whose final state is wanted, F width of that state.
May import `backbone`, `peft`, `model`, `device`, errors and libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch

from tidelock.device.beside_blocks import BesideBlocks
from tidelock.device.causal_lm import DeviceCausalLM, fresh_head, packed_ids
from tidelock.model.rows import Rows
from tidelock.model.taps import Taps
from tidelock.model.walk import Batch
from tidelock.peft.side import SideNetwork

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor

    from tidelock.backbone.protocol import Generation, TapGeneration, TappedBackbone
    from tidelock.device.tap_source import ExampleIds, TapSource
    from tidelock.model.ends import Ends
    from tidelock.peft.side import SideConfig


@final
class SideModel(BesideBlocks, DeviceCausalLM):
    """A causal language model, or a classifier, whose side network is trained beside its frozen blocks.

    Args:
        ends: The model's embedding and head.
        source: Gives the frozen blocks' outputs.
        config: What the side network is like.
        num_labels: Classes of whole texts, 1 for a number; a head for them is trained too. None is a model of language.

    Raises:
        ConfigError: The configuration names blocks that the model does not have.
        ModelError: The family's class does not take the reduced widths.
    """

    network: SideNetwork
    source: TapSource[TappedBackbone]

    def __init__(
        self, ends: Ends, source: TapSource[TappedBackbone], config: SideConfig, *, num_labels: int | None = None
    ) -> None:
        super().__init__(ends, source, SideNetwork(config, ends.config, ends.geometry), num_labels)
        self.head = None if num_labels is None else fresh_head(ends.config, ends.geometry, num_labels)

    @property
    def tapped(self) -> tuple[int, ...]:
        """The blocks that are read, by number."""
        return self.network.blocks

    def final_states(self, ids_BT: Tensor, rows: Rows, select_M: Tensor) -> Tensor:
        """Return the states that the head reads at the selected tokens, shape (M, F).

        Raises:
            ConfigError: The network has not begun as its configuration says; see `start`.
        """
        self._require_start()
        ids_N = packed_ids(ids_BT, rows)
        batch = self._open_batch(ids_N, rows, select_M)
        taps = self._read(ids_N, batch)
        layout = rows.layout(self.device, joined=self.network.family.joins_rows)
        final_MF: Tensor = self.network(batch.embeddings_NE, taps, layout, select_M)
        return final_MF

    def open_generation(self, ids_BT: Tensor, rows: Rows, select_B: Tensor) -> Generation:
        """Run prompts padded at the left; frozen and side blocks keep keys and values."""
        batch = self._open_batch(packed_ids(ids_BT, rows), rows, select_B)
        taps = self.source.blocks().generate_taps(batch, self.network.blocks, self.side_config.tap_width)
        return _SideGeneration(self.network, batch, taps)

    def examples_of(self, batch: Mapping[str, Tensor]) -> list[ExampleIds]:
        """Return for each row of a batch its token ids; where it begins, and which of its tokens are selected.

        Args:
            batch: What `forward` takes.
        """
        return _examples_of(*self.selection(batch))

    def tap_shapes(self, example: ExampleIds) -> list[tuple[int, int]]:
        """Return the shapes (tokens, width) of what a cache keeps of an example: its taps, and the final states."""
        ids, (_, *selected) = example
        taps = [(len(ids), self.network.tap_width)] * len(self.network.blocks)
        return [*taps, (len(selected), self.ends.geometry.final_width)]

    def read_taps(self, batch: Mapping[str, Tensor]) -> None:
        """Have the taps of a batch that are new computed and cached; the side network is not asked.

        Args:
            batch: What `forward` takes.
        """
        ids_N, rows, select_M = self.selection(batch)
        self._read(ids_N, self._open_batch(ids_N, rows, select_M))

    def _read(self, ids_N: Tensor, batch: Batch) -> Taps:
        """Return the taps of a batch, whose selected tokens are in ascending order."""
        examples, alone = _examples_of(ids_N, batch.rows, batch.select_M), _split(batch)

        def compute(backbone: TappedBackbone, number: int) -> tuple[Tensor, ...]:
            taps = backbone.read_taps(alone[number], self.network.blocks, self.side_config.tap_width)
            return (*taps.blocks, taps.final_MD)

        parts = self.source.read(examples, compute)
        *taps_ND, final_MF = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return Taps(tuple(taps_ND), final_MF)

    def _open_batch(self, ids_N: Tensor, rows: Rows, select_M: Tensor) -> Batch:
        return Batch(self.ends.embed(ids_N), rows, select_M, active={}, training=False)


@final
class _SideGeneration:
    """A growing batch, with keys and values of the frozen blocks and of the side blocks."""

    def __init__(self, network: SideNetwork, batch: Batch, taps: TapGeneration) -> None:
        self._network = network
        self._taps = taps
        self._rows = batch.rows
        self._device = batch.embeddings_NE.device
        self._cache = network.new_cache()
        layout = batch.rows.layout(self._device, counted=True)
        self.final_BD = network(batch.embeddings_NE, taps.taps, layout, batch.select_M, self._cache)

    def extend(self, embeddings_BE: Tensor) -> Tensor:
        """Return the final states of one more token in each row, shape (B, F)."""
        taps = self._taps.extend(embeddings_BE)
        layout = self._rows.next_layout(self._cache.get_seq_length(), self._device)
        select_B = torch.arange(len(embeddings_BE))
        final_BD: Tensor = self._network(embeddings_BE, taps, layout, select_B, self._cache)
        self.final_BD = final_BD
        return final_BD

    def close(self) -> None:
        """Free all keys and values."""
        self._taps.close()
        self._cache = self._network.new_cache()


def _examples_of(ids_N: Tensor, rows: Rows, select_M: Tensor) -> list[ExampleIds]:
    """Return what the taps of each row of a batch depend on.

    Args:
        ids_N: Ids of the real tokens.
        rows: Where they are.
        select_M: Which of them are selected, ascending.
    """
    ids = ids_N.tolist()
    return [
        (tuple(ids[tokens]), (start, *select.tolist()))
        for start, tokens, select in zip(rows.starts, _tokens(rows), _select(rows, select_M), strict=True)
    ]


def _split(batch: Batch) -> list[Batch]:
    """Return each row of a batch as one of its own."""
    return [
        Batch(batch.embeddings_NE[tokens], Rows((start,), (length,), start + length), select, {}, training=False)
        for start, length, tokens, select in zip(
            batch.rows.starts,
            batch.rows.lengths,
            _tokens(batch.rows),
            _select(batch.rows, batch.select_M),
            strict=True,
        )
    ]


def _tokens(rows: Rows) -> Iterator[slice]:
    """Yield where among the packed tokens those of each row are."""
    first = 0
    for length in rows.lengths:
        yield slice(first, first + length)
        first += length


def _select(rows: Rows, select_M: Tensor) -> Iterator[Tensor]:
    """Yield the selected tokens of each row, counted from its first."""
    ends = torch.tensor(rows.lengths).cumsum(0)
    select_M = select_M.cpu()
    groups: Iterable[Tensor] = select_M.tensor_split(torch.searchsorted(select_M, ends)[:-1])
    return (group - (end - length) for group, end, length in zip(groups, ends, rows.lengths, strict=True))
