"""Fills an activation cache before a run begins, so that the run never needs the frozen blocks.

May import everything below `run`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

import torch

from tidelock.data.batch import Collator
from tidelock.device.beside_blocks import BesideBlocks
from tidelock.errors import ConfigError
from tidelock.run.examples import encode_examples, read_run_examples, with_classes_counted
from tidelock.run.open_model import load_tokenizer, open_model
from tidelock.run.side import describe_cache
from tidelock.wire.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable

    from tidelock.run.config import RunConfig
    from tidelock.run.evaluate import Track


@final
@dataclass(frozen=True, slots=True)
class Cached:
    """What became of the examples.

    Attributes:
        examples: Different ones that are in the cache now.
        computed: Those of them that went through the frozen blocks for it.
    """

    examples: int
    computed: int


def cache_ahead(config: RunConfig, say: Callable[[str], None], track: Track) -> Cached:
    """Put the taps of a run's examples into its cache, those that are not there yet.

    Args:
        config: As the run will have it, with the folder of the cache.
        say: Takes a notice.
        track: Shows how far it is.

    Raises:
        StorageError: There is no room; what is cached stays.
        TidelockError: As `train`.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    examples, eval_examples = read_run_examples(config)
    examples = [*examples, *eval_examples]
    config = with_classes_counted(config, examples)
    model = open_model(config, Ledger(), None if config.cache is None else Path(config.cache))
    try:
        if not isinstance(model, BesideBlocks) or model.source.cache is None:
            msg = f"Filling a cache: expected a run with one, got --method {config.method}. Choose side, with a cache."
            raise ConfigError(msg)
        rows = encode_examples(config, model, load_tokenizer(model.ends.folder), examples)
        say(describe_cache(model, rows))
        different = {ids: row for row in rows for ids in model.examples_of(Collator(0)([row]))}
        left = [row for ids, row in different.items() if ids not in model.source.cache]
        with track(len(left)) as tracker:
            for first in range(0, len(left), config.batch_size):
                some = left[first : first + config.batch_size]
                model.read_taps(Collator(0)(some))
                tracker.advance(len(some))
        return Cached(len(different), model.source.computed)
    finally:
        model.close()
