"""The passes of a run before they are made: from its batches to what crosses, in bytes and in order.

Shapes: N tokens, E width of the embedding. May import everything below `run`.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast, final

import torch
from transformers import Trainer, set_seed

from tidelock.data.batch import Collator
from tidelock.device.model import DeviceModel
from tidelock.model.rows import Rows
from tidelock.model.walk import Batch
from tidelock.plan.flight import Act, Flight, Processors, fly
from tidelock.plan.forecast import Traffic
from tidelock.run.train import training_arguments

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from tidelock.backbone.crossings import Crossing, PassSizes
    from tidelock.device.side_model import SideModel
    from tidelock.device.tap_source import ExampleIds
    from tidelock.model.families import Family
    from tidelock.plan.link import CloudLink
    from tidelock.run.config import RunConfig
    from tidelock.run.examples import EncodedRows


@final
@dataclass(frozen=True, slots=True)
class PlannedPass:
    """One pass: how large it is, and what crosses in it.

    Attributes:
        tokens: Real ones.
        rows: How many.
        width: Positions of each, padding included.
        positions: What the blocks compute: tokens, and padding where rows are not joined.
        forward: Until the final states are there.
        backward: From their gradient to the end; empty where nothing goes back.
    """

    tokens: int
    rows: int
    width: int
    positions: int
    forward: list[Crossing]
    backward: list[Crossing]

    @property
    def round_trips(self) -> int:
        """How often the device waits for the cloud; all one after another."""
        crossings = [*self.forward, *self.backward]
        return sum(a.sent and not b.sent for a, b in itertools.pairwise(crossings))


@final
@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """The passes of a batch.

    Attributes:
        passes: In the order of its rows; none of what is cached.
        own_tokens: Tokens that take the device time beside the passes: those with a label, for head and loss; with a
            side network all, for the network.
    """

    passes: list[PlannedPass]
    own_tokens: int


@final
@dataclass(frozen=True, slots=True)
class Pace:
    """How quick device and cloud are, in seconds.

    Attributes:
        device: Computing on the device at the sites, for each token of a pass.
        cloud: Computing in the cloud, for each position.
        wire: What messages take beside the link, for each token: gRPC, TLS, and the cloud's encoding and decoding.
        own: Computing on the device beside the passes, for each of a batch's own tokens (`PlannedBatch`).
        update: The optimizer, for each step.
    """

    device: float
    cloud: float
    wire: float
    own: float
    update: float


def epoch_batches(config: RunConfig, model: DeviceModel | SideModel, rows: EncodedRows) -> list[dict[str, Tensor]]:
    """Return the batches of a run's first epoch, from Trainer's own loader; later ones have the same examples."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(config, Path(folder), len(rows))
        trainer = Trainer(model, arguments, train_dataset=cast("torch.utils.data.Dataset[object]", rows),
                          data_collator=Collator(0))  # fmt: skip
        set_seed(config.seed)
        return list(trainer.get_train_dataloader())


def plan_micro_batches(
    model: DeviceModel, sizes: PassSizes, batch: dict[str, Tensor], *, training: bool = True
) -> PlannedBatch:
    """Return the passes of a batch through the sites that are active now.

    Args:
        model: The device's.
        sizes: Knows what crosses.
        batch: What the model takes.
        training: Whether they come back.
    """
    ids_N, rows, select_M = model.selection(batch)
    bank, learns_from = model.bank, model.bank.learns_from if training else None
    # Ids are alike where embeddings are, which is all that is asked of these.
    alike_N1 = ids_N[:, None].double()
    whole = Batch(alike_N1, rows, select_M, bank.active, training, learns_from=learns_from, frames=bank.frames)
    model.train(training)
    passes = [
        _planned(part, sizes.forward(part), sizes.backward(part) if training else [], model.ends.geometry.family)
        for part in model.micro_batches(whole)[0]
    ]
    return PlannedBatch(passes, len(select_M))


def plan_taps(
    model: SideModel, sizes: PassSizes, batch: dict[str, Tensor], cached: set[ExampleIds] | None
) -> PlannedBatch:
    """Return the passes of those examples of a batch that are not cached yet.

    Args:
        model: The device's.
        sizes: Knows what crosses.
        batch: What the model takes.
        cached: Examples whose taps are cached, to which this batch's are added; None caches nothing.
    """
    examples = model.examples_of(batch)
    planned = []
    for ids, (start, *selected) in examples:
        if cached is not None and (ids, (start, *selected)) in cached:
            continue
        rows = Rows((start,), (len(ids),), start + len(ids))
        embeddings_NE = torch.empty(len(ids), model.ends.geometry.embedding_width, device="meta")
        one = Batch(embeddings_NE, rows, torch.tensor(selected), {}, training=False)
        crossings = sizes.taps(one, model.tapped, model.side_config.tap_width)
        planned.append(_planned(one, crossings, [], model.ends.geometry.family))
    if cached is not None:
        cached.update(examples)
    return PlannedBatch(planned, sum(len(ids) for ids, _ in examples))


def _planned(batch: Batch, forward: list[Crossing], backward: list[Crossing], family: Family) -> PlannedPass:
    rows = batch.rows
    positions = math.prod(rows.layout(torch.device("cpu"), joined=family.joins_rows).shape_BT)
    return PlannedPass(rows.num_tokens, len(rows.lengths), rows.width, positions, forward, backward)


def traffic_of(batches: Iterable[PlannedBatch]) -> Traffic:
    """Return the bytes of batches, by kind and way."""
    sent: Counter[str] = Counter()
    received: Counter[str] = Counter()
    for one in (one for batch in batches for one in batch.passes):
        for crossing in (*one.forward, *one.backward):
            (sent if crossing.sent else received)[crossing.kind.value] += crossing.size_bytes
    return Traffic(dict(sent), dict(received))


def fly_batch(batch: PlannedBatch, pace: Pace, at_once: int, processors: Processors, link: CloudLink | None) -> Flight:
    """Return what a batch takes from its embeddings to its gradients.

    Args:
        batch: Its passes.
        pace: How quick both sides are.
        at_once: Passes on their way at the same time.
        processors: How they share what they compute with.
        link: Between them; None takes no time.
    """
    if any(one.backward for one in batch.passes):
        forward, backward = zip(*(_acts_at_sites(one, pace) for one in batch.passes), strict=True)
        flight = fly(forward, at_once, processors, link) + fly(backward, at_once, processors, link)
    else:
        flight = fly([_acts_of_taps(one, pace) for one in batch.passes], at_once, processors, link)
    return replace(flight, seconds=flight.seconds + batch.own_tokens * pace.own)


def _acts_at_sites(one: PlannedPass, pace: Pace) -> tuple[list[Act], list[Act]]:
    """Return the acts of a pass through sites, until its final states and from their gradient.

    Going back takes the cloud twice as long as going up; the device's part is as long at each site either way.
    """
    ups = 1 + sum(crossing.sent for crossing in (*one.forward[2:], *one.backward))
    turns = 2 * ups
    device, lag = one.tokens * pace.device / ups, one.tokens * pace.wire / turns
    cloud = one.positions * pace.cloud / 3
    forward = _chain(one.forward, device, cloud / _arrivals(one.forward), lag)
    # The gradient of the final states is the loss's; the lowest site's own gradients follow once all has crossed.
    backward = _chain(one.backward, device, 2 * cloud / _arrivals(one.backward), lag)[1:]
    return forward, [*backward, Act("device", device)]


def _acts_of_taps(one: PlannedPass, pace: Pace) -> list[Act]:
    """Return the acts of an example's pass, whose taps are sent while the cloud goes on."""
    received = [crossing for crossing in one.forward if not crossing.sent]
    acts = [Act("up", crossing.size_bytes) for crossing in one.forward if crossing.sent]
    acts.append(Act("lag", one.tokens * pace.wire))
    for crossing in received:
        acts += [Act("cloud", one.tokens * pace.cloud / len(received)), Act("down", crossing.size_bytes)]
    return acts


def _chain(crossings: Sequence[Crossing], device: float, cloud: float, lag: float) -> list[Act]:
    """Return crossings as acts, with what each end computes before it sends."""
    acts: list[Act] = []
    before: bool | None = None
    for crossing in crossings:
        if crossing.sent != before:
            acts += [] if before is None else [Act("lag", lag)]
            acts.append(Act("device", device) if crossing.sent else Act("cloud", cloud))
        acts.append(Act("up" if crossing.sent else "down", crossing.size_bytes))
        before = crossing.sent
    return [*acts, Act("lag", lag)]


def _arrivals(crossings: Sequence[Crossing]) -> int:
    """Return how often the cloud computes: before it sends, unless it has sent just before."""
    return sum(not now.sent and before.sent for before, now in itertools.pairwise(crossings))
