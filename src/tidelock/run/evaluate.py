"""Measures a run's model on labelled examples.

May import everything below `run`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, final

import torch

from tidelock.data.batch import Collator
from tidelock.data.encode import NO_LOSS
from tidelock.data.source import read_examples
from tidelock.device.side_seq2seq import SideSeq2SeqModel
from tidelock.run.examples import encode_examples
from tidelock.run.generate import open_trained
from tidelock.run.metrics import sequence_metrics
from tidelock.run.open_model import load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from tidelock.device.device_lm import DeviceLM
    from tidelock.run.config import RunConfig
    from tidelock.run.examples import EncodedRows
    from tidelock.run.folder import RunFolder


class Tracker(Protocol):
    """Shows how far the work is."""

    def advance(self, n: int = 1) -> None:
        """Say that `n` more examples are done."""
        ...


# Given how many examples there are, lasts as long as the work.
Track: TypeAlias = Callable[[int], AbstractContextManager[Tracker]]


@final
@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a model was measured to be.

    Attributes:
        examples: How many it was measured on.
        labels: How many labels: tokens with a loss, or one an example.
        metrics: `loss`, the mean over labels, and by the task `perplexity`, or what `sequence_metrics` gives. Of text
            to text also `exact_match`, the share of the answers that greedy generation gives as they are.
    """

    examples: int
    labels: int
    metrics: dict[str, float]


def evaluate(folder: RunFolder, config: RunConfig, data: str, split: str | None, track: Track) -> Evaluation:
    """Return how well a run's model does on a data set.

    Args:
        folder: The run.
        config: Its configuration, with another cloud perhaps.
        data: A file or hub data set, as for training.
        split: Only rows of this split.
        track: Shows how far it is.

    Raises:
        DataError: The data cannot be read, or is not that of the run's task.
        CheckpointError: The run has no adapter yet.
        TidelockError: As `connect`.
    """
    examples = read_examples(data, split=split)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model = open_trained(folder, config)
    try:
        rows = encode_examples(config, model, load_tokenizer(model.ends.folder), examples)
        return measure(model, rows, config.batch_size, track)
    finally:
        model.close()


@torch.no_grad()
def measure(model: DeviceLM, rows: EncodedRows, batch_size: int, track: Track) -> Evaluation:
    """Return how well a model does on encoded rows, with dropout off.

    Raises:
        TidelockError: As the model's forward.
    """
    model.eval()
    total, count, exact, outputs, labels = 0.0, 0, 0, [], []
    with track(len(rows)) as tracker:
        for start in range(0, len(rows), batch_size):
            batch = Collator(0)(rows[start : start + batch_size])
            # Summed, so that every label counts alike, whatever batch it is in.
            output = model(**batch, num_items_in_batch=1)
            total += float(output.loss)
            targets = model.targets_of(batch["labels"])
            count += int((targets != NO_LOSS).sum())
            if model.num_labels is not None:
                outputs.append(output.logits.cpu())
                labels.append(targets)
            elif isinstance(model, SideSeq2SeqModel):
                exact += _count_exact(output.logits.cpu(), targets)
            tracker.advance(len(targets))
    metrics = {"loss": total / count}
    if model.num_labels is None:
        metrics["perplexity"] = float(torch.tensor(metrics["loss"], dtype=torch.float64).exp())
        if isinstance(model, SideSeq2SeqModel):
            metrics["exact_match"] = exact / len(rows)
    else:
        metrics |= sequence_metrics(torch.cat(outputs).numpy(), torch.cat(labels).numpy())
    return Evaluation(len(rows), count, metrics)


def _count_exact(logits_BTV: Tensor, targets_BT: Tensor) -> int:
    """Return in how many rows each target is the likeliest token after those before it: greedy generation's answer."""
    return int(((logits_BTV.argmax(2) == targets_BT) | (targets_BT == NO_LOSS)).all(1).sum())
