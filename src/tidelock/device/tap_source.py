"""Where a side network's taps come from: the frozen blocks, one example at a time, or what was kept of them.

An example goes through the blocks by itself. So its taps depend on nothing but the example: with a cache, epochs give
what they give without one, bit for bit on a CPU, in whatever order and in batches of whatever size. Where this
process's own cores compute, each has an example to itself: products of so few rows gain little from a second core.

May import `backbone`, `cache`, `model` and libraries.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Generic, Protocol, TypeAlias, TypeVar, final

import torch

from tidelock.backbone.pass_times import TimeSplit
from tidelock.model.memory import give_back_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from tidelock.cache.store import ActivationCache

# What an example's taps depend on, as a cache has it: its token ids, and whatever else (see `SideModel.examples_of`).
ExampleIds: TypeAlias = tuple[tuple[int, ...], ...]


class FrozenBlocks(Protocol):
    """What gives taps."""

    @property
    def on_own_cores(self) -> bool:
        """Whether it is this process's own processor that computes."""
        ...

    def take_times(self) -> TimeSplit:
        """Return what passes have waited for since the last call, in seconds on the clock."""
        ...

    def close(self) -> None:
        """Let go of the model or of the connection."""
        ...


BlocksT = TypeVar("BlocksT", bound=FrozenBlocks)


@final
class TapSource(Generic[BlocksT]):
    """Gives what frozen blocks make of examples: from a cache where it is there, from the blocks where it is not.

    Args:
        open_blocks: Called when the blocks are needed and not at hand: at first, and after `release`.
        cache: Keeps the taps of examples; None computes them each time.
        at_once: Examples on their way through the blocks at the same time; None is one for each core where this
            process's own cores compute, else one.

    Attributes:
        cache: As given.
        computed: Examples that went through the blocks.
    """

    def __init__(
        self, open_blocks: Callable[[], BlocksT], cache: ActivationCache | None = None, *, at_once: int | None = None
    ) -> None:
        self.cache = cache
        self.computed = 0
        self._open_blocks = open_blocks
        self._blocks: BlocksT | None = None
        self._at_once = at_once
        self._threads: ThreadPoolExecutor | None = None
        # Batches that were announced and not read yet.
        self._announced: list[list[ExampleIds]] = []

    @property
    def has_blocks(self) -> bool:
        """Whether the blocks are at hand."""
        return self._blocks is not None

    def blocks(self) -> BlocksT:
        """Return the blocks, which are opened if they are not at hand."""
        if self._blocks is None:
            self._blocks = self._open_blocks()
        return self._blocks

    def read(
        self, examples: list[ExampleIds], compute: Callable[[BlocksT, int], tuple[Tensor, ...]]
    ) -> list[tuple[Tensor, ...]]:
        """Return the tensors of each example.

        Args:
            examples: The examples of a batch.
            compute: Given the blocks and an example's number in the batch, returns its tensors, each (rows, width).

        Raises:
            StorageError: The cache has no room, or the file system refused.
            TidelockError: As the blocks.
        """
        found = [None if self.cache is None else self.cache.get(ids) for ids in examples]
        self._drop_announced(examples)
        missing = [number for number, tensors in enumerate(found) if tensors is None]
        if missing:
            blocks = self.blocks()
            with _one_core_each() if blocks.on_own_cores else nullcontext(1) as cores:
                passes = self._pool(self._at_once or cores).map(lambda number: compute(blocks, number), missing)
                for number, tensors in zip(missing, passes, strict=True):
                    found[number] = self._keep(examples[number], tensors)
                    self.computed += 1
        return [tensors for tensors in found if tensors is not None]

    def announce(self, examples: list[ExampleIds]) -> None:
        """Say what batch will be asked for after those that were announced before, so that it is read meanwhile."""
        if self.cache is not None:
            self._announced.append(examples)
            self.cache.read_ahead(ids for batch in self._announced for ids in batch)

    def take_times(self) -> TimeSplit:
        """Return what was waited for since the last call, in seconds on the clock."""
        return TimeSplit() if self._blocks is None else self._blocks.take_times()

    def release(self) -> None:
        """Let go of the blocks, and of their memory, until they are needed again."""
        if self._blocks is not None:
            self._blocks.close()
            self._blocks = None
            give_back_memory()

    def close(self) -> None:
        """Let go of the blocks and of the cache."""
        self.release()
        if self.cache is not None:
            self.cache.close()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _pool(self, at_once: int) -> ThreadPoolExecutor:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="taps")
        return self._threads

    def _drop_announced(self, batch: list[ExampleIds]) -> None:
        """Forget a batch that is read now, and what was announced before it and is read no more."""
        if batch in self._announced:
            del self._announced[: self._announced.index(batch) + 1]

    def _keep(self, ids: ExampleIds, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if self.cache is None:
            return tuple(tensors)
        self.cache.put(ids, tensors)
        # What a later epoch reads, so that this one learns from the same.
        return self.cache.as_stored(tensors)


@contextmanager
def _one_core_each() -> Iterator[int]:
    """Have each of torch's operations use one core; give how many there are to use."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield count
    finally:
        torch.set_num_threads(count)
