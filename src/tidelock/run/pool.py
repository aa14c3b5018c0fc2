"""A run in a pool: peer 0 reads the data and says what is done; the others join it, and may be lost and come again.

May import everything below `run`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast, final

from tidelock.errors import ConfigError, ModelMismatch, PeerError
from tidelock.model.checkpoint import Checkpoint
from tidelock.model.ends import empty_model, read_config
from tidelock.model.geometry import geometry_of
from tidelock.pool.timeline import summary, to_json
from tidelock.pool.train import PoolTraining
from tidelock.run.config import RunConfig
from tidelock.run.facts import facts_of_pool
from tidelock.run.folder import RunFolder
from tidelock.run.pool_checkpoint import load_progress, save_progress, shared_begin
from tidelock.run.pool_job import job_of, measured_profile, read_encoded, shared_examples
from tidelock.run.pool_layout import described, layout_from_json, layout_to_json
from tidelock.run.pool_processes import remember_number
from tidelock.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tidelock.plan.inputs import Profile
    from tidelock.pool.layout import PoolLayout
    from tidelock.pool.meeting import MeetingPlace, Seat
    from tidelock.pool.peers import Peers
    from tidelock.pool.pipeline import Example
    from tidelock.pool.recipe import Progress
    from tidelock.pool.timeline import Timeline
    from tidelock.pool.train import PoolJob
    from tidelock.run.trainer import Observer

# Those that a pool trains.
METHODS = ("side", "lora", "adapter", "full")

_CONFIG, _LAYOUT, _MODEL, _MEASURES = "configuration", "layout", "model's fingerprint", "word whether to measure"

# Given the numbers of blocks and of peers, and the pool's profile, says who computes what, and by which profile if by
# any. It is asked without a profile first; when it then returns None, the pool is measured.
Decision: TypeAlias = "tuple[PoolLayout, Profile | None]"
LayoutOf: TypeAlias = "Callable[[int, int, Profile | None], Decision | None]"


@final
@dataclass(frozen=True, slots=True)
class PoolResult:
    """What a run in a pool came to, as a peer sees it.

    Attributes:
        adapter: Folder of the trained adapter, or of the whole model; None on other peers than 0.
        steps: Optimizer steps.
        loss: Of the last batch, before its step.
        seconds: How long it took.
    """

    adapter: Path | None
    steps: int
    loss: float
    seconds: float


@final
class _Notes:
    """Writes metrics on peer 0, and tells the observer."""

    def __init__(self, lead: _Lead | None, observer: Observer, job: PoolJob) -> None:
        self.loss = float("nan")
        self.steps = job.begin.steps
        self._lead = lead
        self._observer = observer
        self._per_epoch = job.recipe.steps_per_epoch(len(job.examples))
        self._began = time.monotonic()
        observer.start(job.recipe.epochs * self._per_epoch, job.begin.steps)

    def step(self, step: int, loss: float) -> None:
        """Take a step."""
        now = time.monotonic()
        self.steps, self.loss = step, loss
        self._observer.step(step, loss)
        if self._lead is not None:
            row = {"step": step, "loss": loss, "epoch": step / self._per_epoch, "step_seconds": now - self._began}
            self._lead.folder.append_metrics(row)
        self._began = now

    def save(self, progress: Progress) -> None:
        """Write a checkpoint, which is whole or not there."""
        if self._lead is not None:
            save_progress(progress, self._lead.folder, self._lead.config.keep)

    def timelines(self, step: int, of_peers: list[Timeline]) -> None:
        """Say who waits for whom, and keep it for the report."""
        self._observer.say("\n".join([f"What the peers did in step {step}:", *summary(of_peers)]))
        if self._lead is not None:
            self._lead.folder.write_timelines(to_json(of_peers))

    def fill(self, examples: int) -> None:
        """Say that blocks are run again."""
        self._observer.say(f"Outputs of {examples} examples are not there any more: the blocks are run for them again.")

    def redistributed(self, sent_bytes: int) -> None:
        """Say that the pipeline is done."""
        self._observer.say(
            f"From here on the pool learns from what is cached, without the frozen blocks; this peer has sent "
            f"{format_bytes(sent_bytes)} of it to others."
        )
        self._began = time.monotonic()

    def wants_change(self) -> bool:
        """Whether somebody has come who is to take part."""
        return self._lead is not None and self._lead.meeting.somebody_waits()


def lead(
    config: RunConfig,
    meeting: MeetingPlace,
    count: int,
    layout_of: LayoutOf,
    observer: Observer,
    on_ready: Callable[[], None],
) -> PoolResult:
    """Train in a pool, as peer 0.

    A peer that is lost is done without, and one that comes takes part: the pool is then measured, and another layout
    planned; the run goes on from the state that peer 0 has.

    Args:
        config: The run, with its data.
        meeting: What this peer holds.
        count: How many peers there are at first.
        layout_of: Says who computes what.
        observer: Told how it gets on.
        on_ready: Called when nothing of this peer's own can be wrong any more, before it waits for the others.

    Raises:
        TidelockError: Any of its kinds.
    """
    _check(config)
    folder = RunFolder.new(Path(config.out))
    checkpoint = Checkpoint.open(str(config.model))
    checkpoint.materialise()
    layout_of(_num_blocks(checkpoint), count, None)  # refuses a layout that cannot be before anybody comes
    examples = read_encoded(config, checkpoint)
    folder.write_config(config)
    on_ready()
    observer.say(f"Data: {len(examples)} examples to learn from.")
    return _Lead(config, folder, checkpoint, examples, meeting, layout_of, observer, None).run(count)


def resume(
    path: Path,
    meeting: MeetingPlace,
    count: int,
    layout_of: LayoutOf,
    observer: Observer,
    on_ready: Callable[[], None],
) -> PoolResult:
    """Go on with a run in a pool that was broken off, as peer 0; with as many peers as before, by the same layout.

    Args:
        path: The run's folder.
        meeting: As for `lead`.
        count: As for `lead`.
        layout_of: As for `lead`, where the run's own layout is of another number of peers.
        observer: Told how it gets on.
        on_ready: As for `lead`.

    Raises:
        CheckpointError: There is no run in a pool in the folder, or its checkpoint is damaged.
        TidelockError: Any of its kinds.
    """
    folder = RunFolder.open(path)
    config = replace(folder.config(), out=str(path))
    before = layout_from_json(folder.read_layout())
    checkpoint = Checkpoint.open(str(config.model))
    checkpoint.materialise()
    examples = read_encoded(config, checkpoint)
    saved = folder.latest_checkpoint()
    found = None if saved is None else load_progress(saved)

    def as_before(num_blocks: int, peers: int, profile: Profile | None) -> Decision | None:
        if profile is None and peers == before.num_peers:
            return before, None
        return layout_of(num_blocks, peers, profile)

    on_ready()
    observer.say(f"Going on from {saved or 'the beginning: there is no whole checkpoint yet'}.")
    return _Lead(config, folder, checkpoint, examples, meeting, as_before, observer, found).run(count)


def follow(own: RunConfig, meeting: MeetingPlace, observer: Observer, *, wish: int | None, insists: bool) -> PoolResult:
    """Train in a pool, as another peer than 0.

    Args:
        own: What is this device's own matter: `model`, `out`, `threads`, `memory_limit`, `cache_key`.
        meeting: What peer 0 holds.
        observer: Told how it gets on.
        wish: This peer's number, when the run begins.
        insists: Whether it is that one or none.

    Raises:
        ModelMismatch: This peer has another model than peer 0.
        PeerError: Peer 0 is lost.
        TidelockError: Any of its kinds.
    """
    began = time.monotonic()
    checkpoint = Checkpoint.open(str(own.model))
    checkpoint.materialise()
    config = RunConfig.from_toml(meeting.notices.ask(_CONFIG), Path(_CONFIG))
    expected, found = meeting.notices.ask(_MODEL), str(checkpoint.fingerprint())
    if found != expected:
        msg = (
            f"Pool: expected the model with fingerprint {expected[:12]} that peer 0 has, got {found[:12]} "
            f"({own.model}). Give this peer the same model."
        )
        raise ModelMismatch(msg)
    mine = {name: getattr(own, name) for name in ("model", "threads", "memory_limit", "cache_key")}
    config = replace(config, **mine)
    seat: Seat | None = None
    while True:
        seat = meeting.arrive(wish=wish, insists=insists and seat is None, was=seat)
        remember_number(Path(own.out), seat.peer)
        try:
            notes = _follow_round(config, checkpoint, meeting, seat, Path(own.out) / "cache", observer)
        except PeerError as error:
            observer.say(f"A peer is lost. {error} Asking peer 0 how it goes on.")
            notes = None
        if notes is not None:
            return PoolResult(None, notes.steps, notes.loss, time.monotonic() - began)


def _follow_round(
    config: RunConfig, checkpoint: Checkpoint, meeting: MeetingPlace, seat: Seat, cache: Path, observer: Observer
) -> _Notes | None:
    """Take part in a round; return None when another one follows."""
    peers = meeting.open(seat)
    try:
        examples = shared_examples(peers, None)
        job = job_of(config, checkpoint, examples, cache, shared_begin(peers, config, checkpoint, None))
        if peers.notices.ask(_MEASURES) == str(True):
            measured_profile(peers, job, config)
        layout = layout_from_json(peers.notices.ask(_LAYOUT))
        _introduce(peers, layout, observer)
        notes = _Notes(None, observer, job)
        model = PoolTraining(peers, layout, job, notes).run()
        if model is not None:
            model.close()
        return None if model is None else notes
    finally:
        observer.finish()
        peers.close()


@final
@dataclass
class _Lead:
    """Peer 0, through all rounds of a run.

    Attributes:
        config: The run.
        folder: Its folder.
        checkpoint: Its model's.
        examples: To learn from.
        meeting: Where the others come.
        layout_of: Says who computes what.
        observer: Told how it gets on.
        progress: From where the run goes on; None is the beginning.
    """

    config: RunConfig
    folder: RunFolder
    checkpoint: Checkpoint
    examples: Sequence[Example]
    meeting: MeetingPlace
    layout_of: LayoutOf
    observer: Observer
    progress: Progress | None

    def run(self, count: int) -> PoolResult:
        """Train with so many peers at first."""
        began = time.monotonic()
        self.meeting.notices.tell(_CONFIG, self.config.to_toml())
        self.meeting.notices.tell(_MODEL, str(self.checkpoint.fingerprint()))
        seat = self.meeting.seat_first(count)
        while True:
            try:
                notes = self._round(seat)
            except PeerError as error:
                self.observer.say(f"A peer is lost. {error} Going on with those that are left.")
                notes = None
            if notes is not None:
                seconds = time.monotonic() - began
                summary_row = {"step": notes.steps, "epoch": self.config.epochs, "train_runtime": seconds}
                self.folder.append_metrics(summary_row)
                return PoolResult(self._trained, notes.steps, notes.loss, seconds)
            seat = self.meeting.seat_again(seat)
            steps = 0 if self.progress is None else self.progress.steps
            self.observer.say(f"The pool has changed: going on after step {steps}, {seat.count} peers.")

    def _round(self, seat: Seat) -> _Notes | None:
        """Train until the run is done; return None when the pool is to change before that."""
        peers = self.meeting.open(seat)
        try:
            shared_examples(peers, self.examples)
            begin = shared_begin(peers, self.config, self.checkpoint, self.progress)
            job = job_of(self.config, self.checkpoint, self.examples, self.folder.cache, begin)
            self.folder.keep_until(begin.steps)
            self.folder.write_facts(facts_of_pool(job).model_dump_json(indent=2))
            layout = self._layout(peers, job)
            _introduce(peers, layout, self.observer)
            notes = _Notes(self, self.observer, job)
            training = PoolTraining(peers, layout, job, notes)
            try:
                model = training.run()
            finally:
                self._keep(training.progress)
            if model is None:
                return None
            try:
                model.save_adapter(self._trained, self.config.model)
            finally:
                model.close()
            return notes
        finally:
            self.observer.finish()
            peers.close()

    @property
    def _trained(self) -> Path:
        """Where what is trained is written."""
        return self.folder.model if self.config.method == "full" else self.folder.adapter

    def _keep(self, progress: Progress) -> None:
        """Keep from where the run goes on, here and on the disk."""
        if progress.steps > (0 if self.progress is None else self.progress.steps):
            self.progress = progress
            save_progress(progress, self.folder, self.config.keep)

    def _layout(self, peers: Peers, job: PoolJob) -> PoolLayout:
        """Return who computes what in this round, which all peers then know."""
        num_blocks = _num_blocks(self.checkpoint)
        decision = self.layout_of(num_blocks, peers.count, None)
        peers.notices.tell(_MEASURES, str(decision is None))
        if decision is None:
            self.observer.say("Measuring the devices and the links between them.")
            measured = measured_profile(peers, job, self.config)
            # Before it is planned with: who wants to know why nothing fits can look at it.
            self.folder.write_profile(measured.model_dump_json(indent=2))
            decision = cast("Decision", self.layout_of(num_blocks, peers.count, measured))
        layout, profile = decision
        text = layout_to_json(layout)
        # Later rounds run blocks at most for what was lost: the folder keeps by what the first epoch was done.
        if job.begin.steps < job.recipe.steps_per_epoch(len(job.examples)):
            if profile is not None:
                self.folder.write_profile(profile.model_dump_json(indent=2))
            self.folder.write_layout(text)
        peers.notices.tell(_LAYOUT, text)
        return layout


def _introduce(peers: Peers, layout: PoolLayout, observer: Observer) -> None:
    observer.say(f"Pool: peer {peers.peer} of {peers.count}; {described(layout)}.")


def _num_blocks(checkpoint: Checkpoint) -> int:
    return geometry_of(empty_model(read_config(checkpoint.folder))).num_blocks


def _check(config: RunConfig) -> None:
    """Refuse what a pool does not do."""
    rules = (
        ("--method " + " or ".join(METHODS), config.method in METHODS, f"--method {config.method}"),
        ("every block to be read with --method side", config.method != "side" or not config.layer, "--layer"),
        ("--task causal-lm", config.task == "causal-lm", f"--task {config.task}"),
        ("no weight decay with --method full", config.method != "full" or not config.weight_decay, "--weight-decay"),
        ("whole epochs", config.epochs == int(config.epochs) >= 1, f"--epochs {config.epochs}"),
        ("--side-init magnitude or random", config.side_init != "fisher", "--side-init fisher"),
    )
    for expected, holds, got in rules:
        if not holds:
            msg = f"Training in a pool: expected {expected}, got {got}. Change it, or train on one device."
            raise ConfigError(msg)
