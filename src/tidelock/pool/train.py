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
from tidelock.pool.pipeline import Pipeline, sum_gradients
from tidelock.pool.recipe import Optimizer
from tidelock.pool.redistribute import Pieces, Routes, gather, holders, redistribute
from tidelock.pool.side_stage import SideStage, padded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from tidelock.cache.store import ActivationCache
    from tidelock.model.checkpoint import TensorSource
    from tidelock.peft.side import SideConfig
    from tidelock.pool.layout import PoolLayout
    from tidelock.pool.peers import Peers
    from tidelock.pool.pipeline import Example
    from tidelock.pool.recipe import Recipe


class Watcher(Protocol):
    """Is told how a run gets on."""

    def step(self, step: int, loss: float) -> None:
        """An optimizer step is done, with the batch's loss before it."""
        ...

    def redistributed(self, sent_bytes: int) -> None:
        """The first epoch's outputs are where later epochs need them; this peer has sent so many bytes."""
        ...


@final
@dataclass(frozen=True, slots=True)
class PoolJob:
    """What is trained.

    Attributes:
        source: The model's stored tensors.
        side_config: What the side network is like.
        start: Its parameters at the beginning, by name, the same on every peer; with `init="magnitude"`, of what does
            not come from the model's weights.
        examples: All of them, on every peer.
        recipe: How it is trained.
        open_cache: Given the tapped blocks, returns where their outputs are kept.
    """

    source: TensorSource
    side_config: SideConfig
    start: Mapping[str, Tensor]
    examples: Sequence[Example]
    recipe: Recipe
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
    shapes = {name: tensor.shape for name, tensor in job.start.items()}

    stage = layout.stages[layout.stage_of(peers.peer)]
    side = SidePart(job.side_config, config, geometry, stage.blocks)
    side.load_whole(job.start)
    frozen = ModelPart(job.source, stage.blocks)
    ends = Ends(config, job.source) if side.is_first or side.is_last else None
    leads = peers.peer == stage.peers[0]
    if job.side_config.init == "magnitude":
        scores = side.residual_scores(frozen, None if ends is None else ends.embedding)
        peers.sum(scores if leads else scores.zero_(), range(peers.count))
        side.start_from(frozen, scores)
    optimizer = Optimizer(peers, side.trained(), len(stage.peers), job.recipe, steps)
    pieces = Pieces(job.open_cache(tuple(stage.blocks)))
    _first_epoch(peers, layout, job, SideStage(frozen, side, ends, pieces.keep), optimizer, watcher)
    del frozen
    slices = {GATES: slice(stage.blocks.start, stage.blocks.stop)}
    whole, moments = gather(peers, optimizer, shapes, slices, leads=leads)
    give_back_memory()

    outputs = job.open_cache(tuple(range(geometry.num_blocks)))
    model = SideModel(Ends(config, job.source), TapSource(_no_blocks, outputs), job.side_config)
    model.load_state_dict({f"network.{name}": tensor for name, tensor in whole.items()})
    watcher.redistributed(_share_outputs(peers, layout, job, pieces, outputs))
    later = Optimizer(peers, dict(model.network.named_parameters()), peers.count, job.recipe, steps)
    later.go_on(moments, optimizer.steps)
    for epoch in range(1, job.recipe.epochs):
        _cached_epoch(peers, job, model, later, epoch, watcher)
    return model


def _first_epoch(
    peers: Peers, layout: PoolLayout, job: PoolJob, stage: SideStage, optimizer: Optimizer, watcher: Watcher
) -> None:
    pipeline = Pipeline(peers, layout, stage)
    order = job.recipe.order(len(job.examples), 0)
    for first in range(0, len(order), job.recipe.batch_size):
        batch = [job.examples[number] for number in order[first : first + job.recipe.batch_size]]
        loss = pipeline.run(batch)
        optimizer.step()
        watcher.step(optimizer.steps, loss)


def _share_outputs(peers: Peers, layout: PoolLayout, job: PoolJob, pieces: Pieces, whole: ActivationCache) -> int:
    """Bring the outputs of all examples to the peers that learn from them; return how many bytes this one sent."""
    owners = [0] * len(job.examples)
    for peer, batches in enumerate(job.recipe.shards(len(job.examples), 1, [1] * peers.count)):
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
    shards = job.recipe.shards(len(job.examples), epoch, [1] * peers.count)
    for step in range(job.recipe.steps_per_epoch(len(job.examples))):
        numbers = [shard[step] for shard in shards]
        labels = sum(label != -100 for own in numbers for n in own for label in job.examples[n].labels[1:])
        own = [job.examples[number] for number in numbers[peers.peer]]
        loss = torch.zeros(1, dtype=torch.float64)
        if own:
            result = model(**padded(own), num_items_in_batch=labels).loss
            result.backward()
            loss += result.detach().double()
        sum_gradients(peers, optimizer.parameters.values(), everyone)
        peers.sum(loss, everyone)
        optimizer.step()
        watcher.step(optimizer.steps, float(loss))


def _no_blocks() -> NoReturn:
    msg = (
        "Pool: expected the outputs of all blocks for an example to be kept, got none or damaged ones, and the blocks "
        "are let go. Start again: what is kept is not computed again."
    )
    raise CacheError(msg)
