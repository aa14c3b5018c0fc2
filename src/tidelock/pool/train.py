"""One peer's run: for a side network an epoch through the pipeline, then epochs on what was kept, in data parallel.

PAC (arXiv 2408.10746, section 5): once each example has gone through the frozen blocks, every peer gets the whole side
network and the blocks' outputs for its own share of the examples; the blocks are let go. What learns in the blocks
needs them to the end: all epochs go through the pipeline. When the pool changes, the peers that are there then go on
from the state that peer 0 has; outputs that went with a lost peer are computed again.

May import `pool`, `device`, `cache`, `peft`, `model`, errors and libraries.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, cast, final

import psutil
import torch

from tidelock.model.ends import read_config
from tidelock.model.memory import give_back_memory
from tidelock.model.sizes import sizes_of
from tidelock.peft.adapter_files import HEAD
from tidelock.peft.side import SideConfig
from tidelock.pool.beside import cached_model, no_scores, side_stage
from tidelock.pool.block_stage import BlockStage
from tidelock.pool.full_part import FullConfig
from tidelock.pool.held_out import sum_of_measures
from tidelock.pool.pipeline import Pipeline, sum_gradients, sum_of_losses
from tidelock.pool.recipe import Optimizer
from tidelock.pool.redistribute import Widths, find_routes, gather, redistribute
from tidelock.pool.side_stage import padded
from tidelock.pool.timeline import Timeline, activities, from_json, to_json
from tidelock.pool.trained import TrainedModel, TrainedModules

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from tidelock.device.beside_blocks import BesideBlocks
    from tidelock.peft.methods import ModuleConfig
    from tidelock.pool.example import Example
    from tidelock.pool.held_out import Measured
    from tidelock.pool.job import PoolJob, Trained, Watcher
    from tidelock.pool.layout import PoolLayout
    from tidelock.pool.peers import Peers
    from tidelock.pool.pipeline import StageCompute
    from tidelock.pool.recipe import Progress
    from tidelock.pool.redistribute import Kept
    from tidelock.pool.seq2seq_stage import Seq2SeqStage
    from tidelock.pool.side_stage import SideStage

# Of the steps of a round, the one whose timelines are kept: what the first one does once is no part of it.
_SHOWN_STEP = 2
# Besides, every so many steps peers tell each other in short what they do.
_TOLD_EVERY = 5
# While blocks are run, as often every peer gets all that is trained, so that a lost one costs fewer steps than that.
_MIRRORED_EVERY = 5


@final
class PoolTraining:
    """One round of a run: what a set of peers does until the run is done, or the pool changes.

    Args:
        peers: All peers.
        layout: Who computes what while the blocks are run.
        job: What is trained.
        watcher: Told how it gets on.
    """

    def __init__(self, peers: Peers, layout: PoolLayout, job: PoolJob, watcher: Watcher) -> None:
        self._peers = peers
        self._job = job
        self._watcher = watcher
        self._per_epoch = job.recipe.steps_per_epoch(len(job.examples))
        self._steps = job.recipe.epochs * self._per_epoch
        self._pipeline_steps = self._per_epoch if isinstance(job.config, SideConfig) else self._steps
        self._stages = _Stages(peers, layout, job)
        # All weights of a model are too much to be sent to peer 0 so often.
        self._mirrors = not isinstance(job.config, FullConfig)
        self._gathered = job.begin
        self._optimizer: Optimizer | None = None

    @property
    def progress(self) -> Progress:
        """From where this peer knows that the run can go on, whatever has happened to the others."""
        return self._gathered if self._optimizer is None else self._optimizer.progress()

    def run(self) -> Trained | None:
        """Train; return what was trained, the same on every peer, or None when the pool is to change.

        Raises:
            CacheError: What this peer has kept is damaged.
            MemoryExceeded: This peer takes more than it may; the others may go on.
            NonFiniteError: A loss or a gradient is infinite or not a number.
            PeerError: A peer was lost.
            StorageError: There is no room for what is kept.
        """
        job = self._job
        if self._gathered.steps < self._pipeline_steps and self._through_pipeline():
            job.memory.hold()
            return None
        if isinstance(job.config, FullConfig):
            return TrainedModel(job.source.folder, self._gathered.parameters)
        if not isinstance(job.config, SideConfig):
            return TrainedModules(job.source.folder, job.config, self._gathered.parameters, job.num_labels)
        return self._on_outputs(job.config, cast("Kept", job.kept))

    def _through_pipeline(self) -> bool:
        """Go through the pipeline; return whether the pool is to change before what comes next."""
        job, size = self._job, self._job.recipe.batch_size
        optimizer = self._stages.begin(self._steps)
        self._evaluate_if_owed(self._stages.measure)
        for step in range(self._gathered.steps, self._pipeline_steps):
            epoch, place = divmod(step, self._per_epoch)
            order = job.recipe.order(len(job.examples), epoch)
            batch = order[place * size : (place + 1) * size]
            loss = self._stages.run([job.examples[number] for number in batch], job.recipe.dropout_seeds(step, batch))
            optimizer.step()
            self._watcher.step(optimizer.steps, loss)
            if optimizer.steps == min(job.begin.steps + _SHOWN_STEP, self._pipeline_steps):
                timelines = self._stages.timelines()
                if self._peers.peer == 0:
                    self._watcher.timelines(optimizer.steps, timelines)
            self._tell_activity(optimizer.steps, self._stages.timeline)
            changes = optimizer.steps < self._steps and self._changes()
            saves = optimizer.steps % job.save_every == 0 or optimizer.steps == self._pipeline_steps or changes
            if saves or (self._mirrors and optimizer.steps % _MIRRORED_EVERY == 0):
                self._gathered = self._stages.gather(optimizer)
            if saves:
                self._watcher.save(self._gathered)
            self._evaluate_if_due(optimizer.steps, self._stages.measure)
            if changes:
                return True
        return False

    def _on_outputs(self, config: SideConfig, kept: Kept) -> BesideBlocks | None:
        """Learn from what the blocks gave; return the model, or None when the pool is to change."""
        peers, job = self._peers, self._job
        self._share_outputs(kept)
        model = cached_model(job.source, config, kept.whole, job.num_labels)
        gathered = self._gathered.parameters.items()
        model.load_state_dict({name if name == HEAD else f"network.{name}": value for name, value in gathered})
        parameters = {name.removeprefix("network."): parameter for name, parameter in model.named_parameters()}
        optimizer = Optimizer(peers, parameters, dict.fromkeys(parameters, peers.count), job.recipe, self._steps)
        optimizer.go_on(self._gathered.steps, self._gathered.moments)
        self._optimizer = optimizer
        measure = partial(self._measure_cached, model)
        if optimizer.steps == job.begin.steps:
            self._evaluate_if_owed(measure)
        for epoch in range(optimizer.steps // self._per_epoch, job.recipe.epochs):
            shards = job.recipe.shards(len(job.examples), epoch, peers.count)
            for step in range(optimizer.steps - epoch * self._per_epoch, self._per_epoch):
                self._cached_step(model, optimizer, [shard[step] for shard in shards])
                self._evaluate_if_due(optimizer.steps, measure)
                if optimizer.steps < self._steps and self._changes():
                    job.memory.hold()
                    return None
        return model

    def _share_outputs(self, kept: Kept) -> None:
        """Bring the outputs of all examples to the peers that learn from them, and let the blocks go."""
        peers, job = self._peers, self._job
        widths = Widths.of(sizes_of(read_config(job.source.folder)))
        examples = [*job.examples, *job.held_out.examples]
        owners = job.recipe.owners(len(job.examples), peers.count) + job.held_out.owners(peers.count)
        find = partial(find_routes, peers, kept, examples, owners, widths.num_blocks)
        routes = find()
        missing = [number for number, route in enumerate(routes) if route is None]
        if missing:
            self._watcher.fill(len(missing))
            self._stages.fill([examples[number] for number in missing])
            routes = find()
        self._stages.let_go()
        self._watcher.redistributed(redistribute(peers, examples, routes, owners, kept, widths))

    def _cached_step(self, model: BesideBlocks, optimizer: Optimizer, numbers: Sequence[Sequence[int]]) -> None:
        """Learn from this peer's share of a batch, which says by peer whose examples are whose.

        The gradients are those of the whole batch.
        """
        peers, job = self._peers, self._job
        timeline = Timeline(peers.peer, None)
        with timeline.during("forward"):
            result = self._on_share(model, [[job.examples[number] for number in own] for own in numbers])
        if result is not None:
            with timeline.during("backward"):
                result[0].backward()
        job.memory.look()
        loss = 0.0 if result is None else float(result[0].detach())
        with timeline.during("all-reduce"):
            sum_gradients(peers, optimizer.parameters.values(), range(peers.count))
        total = sum_of_losses(peers, loss)
        optimizer.step()
        self._watcher.step(optimizer.steps, total)
        self._tell_activity(optimizer.steps, timeline)
        if optimizer.steps % job.save_every == 0:
            self._watcher.save(optimizer.progress())

    def _tell_activity(self, step: int, timeline: Timeline) -> None:
        if step % _TOLD_EVERY == 0 or step == self._job.begin.steps + _SHOWN_STEP:
            timeline.memory_bytes = psutil.Process().memory_info().rss
            self._watcher.activity(step, activities(self._peers.gather(timeline.numbers())))

    def _on_share(self, model: BesideBlocks, shards: Sequence[Sequence[Example]]) -> tuple[Tensor, Tensor] | None:
        """Return this peer's part of a batch's loss, and the logits of its examples; None where it has none.

        Args:
            model: The model.
            shards: The batch's examples, by peer.
        """
        own = shards[self._peers.peer]
        if not own:
            return None
        num_labels = sum(example.num_labels for shard in shards for example in shard)
        result = model(**padded(own), num_items_in_batch=num_labels)
        return result.loss, result.logits

    @torch.no_grad()
    def _measure_cached(self, model: BesideBlocks, batch: Sequence[Example]) -> Measured:
        """Return what a batch gives that is held out, of which each peer computes its share."""
        shards = self._job.held_out.shards(batch, self._peers.count)
        result = self._on_share(model, shards)
        loss, outputs_BC = 0.0, torch.zeros(len(batch), self._job.num_labels or 0)
        if result is not None:
            loss = float(result[0])
            if model.head is not None:
                first = sum(len(shard) for shard in shards[: self._peers.peer])
                outputs_BC[first : first + len(result[1])] = result[1]
        return sum_of_measures(self._peers, loss, outputs_BC)

    def _evaluate_if_due(self, step: int, measure: Callable[[Sequence[Example]], Measured]) -> None:
        if self._job.held_out.is_due(step, self._steps):
            self._watcher.evaluated(step, self._job.held_out.measured(measure))

    def _evaluate_if_owed(self, measure: Callable[[Sequence[Example]], Measured]) -> None:
        """Evaluate if the round before was broken off between a step and the evaluation after it."""
        step = self._job.begin.steps
        is_due = self._job.held_out.is_due(step, self._steps)
        if is_due and self._peers.agree(says=self._watcher.owes_evaluation(step)):
            self._evaluate_if_due(step, measure)

    def _changes(self) -> bool:
        return self._peers.agree(says=self._watcher.wants_change() or self._job.memory.is_exceeded)


@final
class _Stages:
    """This peer's part while blocks are run; an idle peer only adds nothing to the others' sums."""

    def __init__(self, peers: Peers, layout: PoolLayout, job: PoolJob) -> None:
        self._peers = peers
        self._layout = layout
        self._job = job
        self._number = layout.stage_of(peers.peer)
        self._stage = None if self._number is None else layout.stages[self._number]
        self._compute: StageCompute | None = None
        self._pipeline: Pipeline | None = None
        self._is_loaded = False

    def begin(self, steps: int) -> Optimizer:
        """Load the blocks; return the optimizer of what is trained here, of a run of so many steps."""
        job = self._job
        self._load()
        trained: dict[str, nn.Parameter] = {}
        replicas: dict[str, int] = {}
        own: dict[str, dict[str, Tensor]] = {}
        if self._compute is not None and self._stage is not None:
            trained = self._compute.trained()
            replicas = dict.fromkeys(trained, len(self._stage.peers))
            replicas |= {name: len(self._layout.peers_with(blocks)) for name, blocks in self._compute.tied.items()}
            own = {kind: self._compute.own_of(values) for kind, values in job.begin.moments.items()}
        optimizer = Optimizer(self._peers, trained, replicas, job.recipe, steps)
        optimizer.go_on(job.begin.steps, own)
        return optimizer

    def run(self, batch: Sequence[Example], dropout_seeds: Sequence[int]) -> float:
        """Take a batch through the stages; see `Pipeline.run`."""
        return sum_of_losses(self._peers, 0.0) if self._pipeline is None else self._pipeline.run(batch, dropout_seeds)

    def measure(self, batch: Sequence[Example]) -> Measured:
        """Take a batch through the stages, forward only; see `Pipeline.measure`."""
        num_outputs = self._job.num_labels or 0
        if self._pipeline is None:
            return sum_of_measures(self._peers, 0.0, torch.zeros(len(batch), num_outputs))
        return self._pipeline.measure(batch, num_outputs)

    @property
    def timeline(self) -> Timeline:
        """What this peer did when in the last batch."""
        return Timeline(self._peers.peer, None) if self._pipeline is None else self._pipeline.timeline

    def timelines(self) -> list[Timeline]:
        """Return what each peer did when in the last batch; on other peers than 0, nothing."""
        own = self.timeline
        own.memory_bytes = psutil.Process().memory_info().rss
        self._peers.notices.tell(f"timeline {self._peers.peer}", to_json([own]))
        everybody = range(self._peers.count) if self._peers.peer == 0 else ()
        return [each for peer in everybody for each in from_json(self._peers.notices.ask(f"timeline {peer}"))]

    def fill(self, examples: Sequence[Example]) -> None:
        """Run the blocks for what they give."""
        self._load()
        for first in range(0, len(examples), self._job.recipe.batch_size):
            self.measure(examples[first : first + self._job.recipe.batch_size])

    def gather(self, optimizer: Optimizer) -> Progress:
        """Return all that is trained; see `redistribute.gather`."""
        slices: Mapping[str, slice] = {}
        speaks_for = {*optimizer.parameters} if self._leads else set()
        if self._compute is not None:
            slices = self._compute.slices
            # For what several stages have, the first of these does.
            tied = self._compute.tied.items()
            speaks_for -= {name for name, blocks in tied if self._layout.stages_with(blocks)[0] != self._number}
        keeps = self._peers.peer == 0 or not isinstance(self._job.config, FullConfig)
        shapes = self._job.shapes()
        return gather(self._peers, optimizer, shapes, slices, speaks_for=speaks_for, keeps=keeps)

    def let_go(self) -> None:
        """Free the blocks."""
        self._compute = self._pipeline = None
        self._is_loaded = False
        give_back_memory()

    @property
    def _leads(self) -> bool:
        """Whether this peer speaks for its stage."""
        return self._stage is not None and self._peers.peer == self._stage.peers[0]

    def _load(self) -> None:
        if self._is_loaded:
            return
        self._is_loaded = True
        config = self._job.config
        self._compute = self._side_stage(config) if isinstance(config, SideConfig) else self._block_stage(config)
        if self._compute is not None and self._number is not None:
            memory = self._job.memory
            self._pipeline = Pipeline(self._peers, self._layout, self._number, self._compute, memory)
            memory.look()
            memory.hold()  # before anything is done

    def _block_stage(self, method: ModuleConfig | FullConfig) -> BlockStage | None:
        """Return what this peer computes, with what learns as the run has it."""
        if self._stage is None:
            return None
        stage = BlockStage.load(self._job.source, method, self._stage.blocks, self._job.num_labels)
        stage.load_whole(self._job.begin.parameters)
        return stage

    def _side_stage(self, method: SideConfig) -> SideStage | Seq2SeqStage | None:
        """Return what this peer computes, begun as the configuration says."""
        peers, job = self._peers, self._job
        by_magnitude = method.init == "magnitude" and job.begin.steps == 0
        if self._stage is None:
            if by_magnitude:
                peers.sum(no_scores(job.source), range(peers.count))
            return None
        keep = partial(cast("Kept", job.kept).keep, self._stage.blocks)
        stage = side_stage(job.source, method, self._stage.blocks, job.num_labels, keep)
        stage.load_whole(job.begin.parameters)
        if by_magnitude:
            scores = stage.residual_scores()
            peers.sum(scores if self._leads else scores.zero_(), range(peers.count))
            stage.start_from(scores)
        return stage
