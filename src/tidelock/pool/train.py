"""One peer's run: an epoch through the pipeline, then epochs on what was kept, in data parallel.

PAC (arXiv 2408.10746, section 5): once each example has gone through the frozen blocks, every peer gets the whole side
network and the blocks' outputs for its own share of the examples; the blocks are let go.

May import `pool`, `device`, `cache`, `peft`, `model`, errors and libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, Protocol, final

import torch

from tidelock.device.side_model import SideModel
from tidelock.device.tap_source import TapSource
from tidelock.errors import CacheError
from tidelock.model.ends import Ends, empty_model, read_config
from tidelock.model.geometry import geometry_of
from tidelock.model.memory import give_back_memory
from tidelock.model.part import ModelPart
from tidelock.peft.side_part import GATES, SidePart
from tidelock.pool.pipeline import Pipeline, sum_gradients, sum_of_losses
from tidelock.pool.recipe import Optimizer
from tidelock.pool.redistribute import Pieces, Routes, gather, holders, redistribute
from tidelock.pool.side_stage import SideStage, padded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tidelock.cache.store import ActivationCache
    from tidelock.model.checkpoint import TensorSource
    from tidelock.peft.side import SideConfig
    from tidelock.pool.layout import PoolLayout
    from tidelock.pool.peers import Peers
    from tidelock.pool.pipeline import Example
    from tidelock.pool.recipe import Progress, Recipe


class Watcher(Protocol):
    """Is told how a run gets on."""

    def step(self, step: int, loss: float) -> None:
        """An optimizer step is done, with the batch's loss before it."""
        ...

    def save(self, progress: Progress) -> None:
        """The whole network as it is now, which a run can go on with; the same on every peer."""
        ...

    def redistributed(self, sent_bytes: int) -> None:
        """The first epoch's outputs are where later epochs need them; this peer has sent so many bytes."""
        ...


@final
@dataclass(frozen=True, slots=True)
class PoolJob:
    """What is trained.

    Attributes:
        model: Says which model it is.
        source: The model's stored tensors.
        side_config: What the side network is like.
        begin: What it begins or goes on with, the same on every peer; before the first step, with `init="magnitude"`,
            of what does not come from the model's weights.
        examples: All of them, on every peer.
        recipe: How it is trained.
        save_every: Steps between two calls of `Watcher.save`.
        open_cache: Given the tapped blocks, returns where their outputs are kept.
    """

    model: str
    source: TensorSource
    side_config: SideConfig
    begin: Progress
    examples: Sequence[Example]
    recipe: Recipe
    save_every: int
    open_cache: Callable[[tuple[int, ...]], ActivationCache]


def train_in_pool(peers: Peers, layout: PoolLayout, job: PoolJob, watcher: Watcher) -> SideModel:
    """Train a side network in a pool; return the model, whose network is the same on every peer.

    Args:
        peers: All peers.
        layout: Who computes what in the first epoch.
        job: What is trained.
        watcher: Told how it gets on.

    Raises:
        NonFiniteError: A loss or a gradient is infinite or not a number.
        PeerError: A peer was lost.
        StorageError: There is no room for what is kept.
    """
    config = read_config(job.source.folder)
    geometry = geometry_of(empty_model(config))
    steps = job.recipe.epochs * job.recipe.steps_per_epoch(len(job.examples))
    per_epoch = job.recipe.steps_per_epoch(len(job.examples))
    first, progress = _FirstEpoch(peers, layout, job), job.begin
    if progress.steps < per_epoch:
        progress = first.run(steps, watcher)
    give_back_memory()
    outputs = job.open_cache(tuple(range(geometry.num_blocks)))
    model = SideModel(Ends(config, job.source), TapSource(_no_blocks, outputs), job.side_config)
    model.load_state_dict({f"network.{name}": tensor for name, tensor in progress.parameters.items()})
    watcher.redistributed(_share_outputs(peers, layout, job, first.pieces, outputs))
    optimizer = Optimizer(peers, dict(model.network.named_parameters()), peers.count, job.recipe, steps)
    optimizer.go_on(progress.steps, progress.moments)
    for epoch in range(1, job.recipe.epochs):
        _cached_epoch(peers, job, model, optimizer, epoch, watcher)
    return model


@final
class _FirstEpoch:
    """The epoch through the pipeline; an idle peer only adds nothing to the others' sums.

    Attributes:
        pieces: What this peer's blocks gave; None of an idle one.
    """

    def __init__(self, peers: Peers, layout: PoolLayout, job: PoolJob) -> None:
        self._peers = peers
        self._layout = layout
        self._job = job
        self._number = layout.stage_of(peers.peer)
        self._stage = None if self._number is None else layout.stages[self._number]
        self.pieces = None if self._stage is None else Pieces(job.open_cache(tuple(self._stage.blocks)))

    def run(self, steps: int, watcher: Watcher) -> Progress:
        """Return the whole network after the epoch, of a run of so many steps."""
        peers, job, stage = self._peers, self._job, self._stage
        compute = self._begin()
        pipeline = None
        if compute is not None and self._number is not None:
            pipeline = Pipeline(peers, self._layout, self._number, compute)
        trained = {} if compute is None else compute.trained()
        optimizer = Optimizer(peers, trained, 1 if stage is None else len(stage.peers), job.recipe, steps)
        if compute is not None:
            moments = {kind: compute.side.own_of(values) for kind, values in job.begin.moments.items()}
            optimizer.go_on(job.begin.steps, moments)
        else:
            optimizer.steps = job.begin.steps
        order, progress = job.recipe.order(len(job.examples), 0), job.begin
        for first in range(job.begin.steps * job.recipe.batch_size, len(order), job.recipe.batch_size):
            batch = [job.examples[number] for number in order[first : first + job.recipe.batch_size]]
            loss = sum_of_losses(peers, 0.0) if pipeline is None else pipeline.run(batch)
            optimizer.step()
            watcher.step(optimizer.steps, loss)
            if optimizer.steps % job.save_every == 0 or first + job.recipe.batch_size >= len(order):
                progress = self._gather(optimizer)
                watcher.save(progress)
        return progress

    def _gather(self, optimizer: Optimizer) -> Progress:
        stage = self._stage
        shapes = {name: tensor.shape for name, tensor in self._job.begin.parameters.items()}
        slices = {} if stage is None else {GATES: slice(stage.blocks.start, stage.blocks.stop)}
        return gather(self._peers, optimizer, shapes, slices, leads=self._leads)

    @property
    def _leads(self) -> bool:
        """Whether this peer speaks for its stage."""
        return self._stage is not None and self._peers.peer == self._stage.peers[0]

    def _begin(self) -> SideStage | None:
        """Return what this peer computes, begun as the configuration says."""
        peers, job = self._peers, self._job
        config = read_config(job.source.folder)
        geometry = geometry_of(empty_model(config))
        by_magnitude = job.side_config.init == "magnitude" and job.begin.steps == 0
        if self._stage is None or self.pieces is None:
            if by_magnitude:
                peers.sum(torch.zeros(geometry.block_width), range(peers.count))
            return None
        side = SidePart(job.side_config, config, geometry, self._stage.blocks)
        side.load_whole(job.begin.parameters)
        frozen = ModelPart(job.source, self._stage.blocks)
        ends = Ends(config, job.source) if side.is_first or side.is_last else None
        if by_magnitude:
            scores = side.residual_scores(frozen, None if ends is None else ends.embedding)
            peers.sum(scores if self._leads else scores.zero_(), range(peers.count))
            side.start_from(frozen, scores)
        return SideStage(frozen, side, ends, self.pieces.keep)


def _share_outputs(
    peers: Peers, layout: PoolLayout, job: PoolJob, pieces: Pieces | None, whole: ActivationCache
) -> int:
    """Bring the outputs of all examples to the peers that learn from them; return how many bytes this one sent."""
    owners = [0] * len(job.examples)
    for peer, batches in enumerate(job.recipe.shards(len(job.examples), 1, peers.count)):
        for batch in batches:
            for number in batch:
                owners[number] = peer
    geometry = geometry_of(empty_model(read_config(job.source.folder)))
    routes = Routes(
        job.examples,
        holders(layout, job.recipe, len(job.examples)),
        owners,
        [len(stage.blocks) for stage in layout.stages],
        geometry.block_width,
        geometry.final_width,
    )
    return redistribute(peers, routes, pieces, whole)


def _cached_epoch(
    peers: Peers, job: PoolJob, model: SideModel, optimizer: Optimizer, epoch: int, watcher: Watcher
) -> None:
    """Learn from this peer's share of each batch; the gradients are those of the whole batch."""
    everyone = range(peers.count)
    shards = job.recipe.shards(len(job.examples), epoch, peers.count)
    per_epoch = job.recipe.steps_per_epoch(len(job.examples))
    for step in range(per_epoch):
        if epoch * per_epoch + step < optimizer.steps:  # done before the run was broken off
            continue
        numbers = [shard[step] for shard in shards]
        num_labels = sum(job.examples[number].num_labels for own in numbers for number in own)
        own = [job.examples[number] for number in numbers[peers.peer]]
        loss = 0.0
        if own:
            result = model(**padded(own), num_items_in_batch=num_labels).loss
            result.backward()
            loss = float(result.detach())
        sum_gradients(peers, optimizer.parameters.values(), everyone)
        total = sum_of_losses(peers, loss)
        optimizer.step()
        watcher.step(optimizer.steps, total)
        if optimizer.steps % job.save_every == 0:
            watcher.save(optimizer.progress())


def _no_blocks() -> NoReturn:
    msg = (
        "Pool: expected the outputs of all blocks for an example to be kept, got none or damaged ones, and the blocks "
        "are let go. Begin another run."
    )
    raise CacheError(msg)
