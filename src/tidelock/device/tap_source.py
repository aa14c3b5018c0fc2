"""Where a side network's taps come from: the frozen blocks, one example at a time, or what was kept of them.

An example goes through the blocks by itself. So its taps depend on nothing but the example: with a cache, epochs give
what they give without one, bit for bit on a CPU, in whatever order and in batches of whatever size.

Shapes: N real tokens, M tokens whose final state is wanted.
May import `backbone`, `cache`, `model` and libraries.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeAlias, final

import torch

from tidelock.backbone.pass_times import TimeSplit
from tidelock.model.memory import give_back_memory
from tidelock.model.rows import Rows
from tidelock.model.taps import Taps
from tidelock.model.walk import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

    from tidelock.backbone.protocol import TapGeneration, TappedBackbone
    from tidelock.cache.store import ActivationCache

# What an example's taps depend on, as a cache has it: its token ids; where its row begins, and which of its tokens'
# final states are wanted.
ExampleIds: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]


@final
class TapSource:
    """Gives the taps of batches, from a cache where there is one and from the frozen blocks where there is not.

    Args:
        open_backbone: Called when the blocks are needed and not at hand: at first, and after `release`.
        cache: Keeps the taps of examples; None computes them each time.
        at_once: Examples on their way through the blocks at the same time.

    Attributes:
        cache: As given.
        computed: Examples that went through the blocks.
    """

    def __init__(
        self,
        open_backbone: Callable[[], TappedBackbone],
        cache: ActivationCache | None = None,
        *,
        at_once: int = 1,
    ) -> None:
        self.cache = cache
        self.computed = 0
        self._open_backbone = open_backbone
        self._backbone: TappedBackbone | None = None
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="taps")
        # Batches that were announced and not read yet.
        self._announced: list[list[ExampleIds]] = []

    @property
    def has_backbone(self) -> bool:
        """Whether the blocks are at hand."""
        return self._backbone is not None

    def read(self, ids_N: Tensor, batch: Batch, blocks: Sequence[int], width: int | None = None) -> Taps:
        """Return the taps of a batch.

        Args:
            ids_N: Ids of the real tokens.
            batch: The same tokens, embedded; the selected ones in ascending order.
            blocks: The tapped blocks.
            width: Numbers per token to which each tap is projected; None is as many as the block gives.

        Raises:
            StorageError: The cache has no room, or the file system refused.
            TidelockError: As the backbone.
        """
        wanted = examples_of(ids_N, batch.rows, batch.select_M)
        found = [None if self.cache is None else self.cache.get(ids) for ids in wanted]
        self._drop_announced(wanted)
        missing = [number for number, tensors in enumerate(found) if tensors is None]
        if missing:
            backbone, examples = self._at_hand(), _split(batch)
            passes = self._threads.map(lambda number: backbone.read_taps(examples[number], blocks, width), missing)
            for number, taps in zip(missing, passes, strict=True):
                found[number] = self._keep(wanted[number], taps)
                self.computed += 1
        *taps_ND, final_MD = (torch.cat(parts) for parts in zip(*filter(None, found), strict=True))
        return Taps(tuple(taps_ND), final_MD)

    def announce(self, ids_N: Tensor, rows: Rows, select_M: Tensor) -> None:
        """Say what batch will be asked for after those that were announced before, so that it is read meanwhile."""
        if self.cache is not None:
            self._announced.append(examples_of(ids_N, rows, select_M))
            self.cache.read_ahead(ids for batch in self._announced for ids in batch)

    def generate(self, batch: Batch, blocks: Sequence[int], width: int | None = None) -> TapGeneration:
        """Run prompts padded at the left, and keep keys and values for more tokens."""
        return self._at_hand().generate_taps(batch, blocks, width)

    def take_times(self) -> TimeSplit:
        """Return what was waited for since the last call, in seconds on the clock."""
        return TimeSplit() if self._backbone is None else self._backbone.take_times()

    def release(self) -> None:
        """Let go of the blocks, and of their memory, until they are needed again."""
        if self._backbone is not None:
            self._backbone.close()
            self._backbone = None
            give_back_memory()

    def close(self) -> None:
        """Let go of the blocks and of the cache."""
        self.release()
        if self.cache is not None:
            self.cache.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _at_hand(self) -> TappedBackbone:
        if self._backbone is None:
            self._backbone = self._open_backbone()
        return self._backbone

    def _drop_announced(self, batch: list[ExampleIds]) -> None:
        """Forget a batch that is read now, and what was announced before it and is read no more."""
        if batch in self._announced:
            del self._announced[: self._announced.index(batch) + 1]

    def _keep(self, ids: ExampleIds, taps: Taps) -> tuple[Tensor, ...]:
        tensors = (*taps.blocks, taps.final_MD)
        if self.cache is None:
            return tensors
        self.cache.put(ids, tensors)
        # What a later epoch reads, so that this one learns from the same.
        return self.cache.as_stored(tensors)


def examples_of(ids_N: Tensor, rows: Rows, select_M: Tensor) -> list[ExampleIds]:
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
