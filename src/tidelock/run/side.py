"""What a run with a side network does beside training: its start, its cache, and letting go of the frozen blocks.

May import everything below `run`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import psutil
import torch
from transformers import TrainerCallback

from tidelock.backbone.remote import RemoteBackbone
from tidelock.data.batch import Collator
from tidelock.run.connect_side import start_side
from tidelock.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from tidelock.device.beside_blocks import BesideBlocks
    from tidelock.run.config import RunConfig
    from tidelock.run.examples import EncodedRows


def begin(config: RunConfig, model: BesideBlocks, rows: EncodedRows) -> None:
    """Begin a run's side network as its options say.

    Raises:
        ConfigError: The start needs the whole model on this device, and none was named.
        ModelError: It cannot be loaded whole.
    """
    start_side(model, config.model, _sample(rows[: config.fisher_examples]))


def _sample(rows: EncodedRows) -> Iterator[dict[str, Tensor]]:
    """Yield each row as a batch of its own for the causal model; a text with one label is learned whole."""
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        yield {"input_ids": ids, "labels": torch.tensor([row["labels"]]) if "labels" in row else ids}


def describe_cache(model: BesideBlocks, rows: EncodedRows) -> str:
    """Return how many examples are cached already and how much the others will take, once there is room for them.

    Args:
        model: With a cache.
        rows: All examples of the run.

    Raises:
        StorageError: They would not leave enough room, within the limit or on the disk.
    """
    cache = model.source.cache
    if cache is None:
        return "Activation cache: none, each epoch runs the frozen blocks."
    examples = [ids for row in rows for ids in model.examples_of(Collator(0)([row]))]
    missing = list(cache.missing(examples))
    size = sum(cache.entry_bytes(model.tap_shapes(examples[number])) for number in missing)
    cache.require_room(size)
    return (
        f"Activation cache: {len(set(examples)) - len(missing):,} of {len(set(examples)):,} examples are in it; the "
        f"others take {format_bytes(size)}."
    )


@final
class AnnouncingCollator:
    """Makes batches, and has the taps of each read from the cache while the batch before it is learned from.

    Args:
        collate: Makes a batch.
        model: Whose batches they are.
    """

    def __init__(self, collate: Collator, model: BesideBlocks) -> None:
        self._collate = collate
        self._model = model

    def __call__(self, rows: Sequence[Mapping[str, object]]) -> dict[str, Tensor]:
        """Return a batch; see `Collator`."""
        batch = self._collate(rows)
        self._model.announce(batch)
        return batch


@final
class LetGo(TrainerCallback):
    """Lets go of the frozen blocks after an epoch, when all that they gave is in the cache: later ones do without them.

    Args:
        model: With a cache.
        rows: All examples of the run.
        say: Tells the person so.
    """

    def __init__(self, model: BesideBlocks, rows: EncodedRows, say: Callable[[str], None]) -> None:
        self._model = model
        self._rows = rows
        self._say = say

    def on_epoch_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Cache what no pass has asked for yet, such as what is to be measured later, and let go of them."""
        source = self._model.source
        if not source.has_blocks or source.cache is None:
            return
        for row in self._rows:
            batch = Collator(0)([row])
            if any(ids not in source.cache for ids in self._model.examples_of(batch)):
                self._model.read_taps(batch)
        if isinstance(source.blocks(), RemoteBackbone):
            source.release()
            self._say("All taps are cached; the cloud is not needed any more, and its connection is closed.")
            return
        before = psutil.Process().memory_info().rss
        source.release()
        after = psutil.Process().memory_info().rss
        self._say(
            "All taps are cached; the frozen blocks are let go. Memory of this process: "
            f"{format_bytes(before)} before, {format_bytes(after)} now."
        )
