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
from tidelock.model.ends import read_config
from tidelock.model.sizes import sizes_of
from tidelock.pool.train import PoolTraining
from tidelock.run.config import RunConfig
from tidelock.run.facts import facts_of_pool
from tidelock.run.folder import RunFolder
from tidelock.run.pool_checkpoint import load_progress, save_progress, shared_begin
from tidelock.run.pool_job import Holdings, job_of, measured_profile, read_data, shared_data
from tidelock.run.pool_layout import described, layout_from_json, layout_to_json
from tidelock.run.pool_notes import Desk, PoolNotes
from tidelock.run.pool_processes import remember_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from tidelock.plan.inputs import Profile
    from tidelock.pool.job import PoolJob
    from tidelock.pool.layout import PoolLayout
    from tidelock.pool.meeting import MeetingPlace, Seat
    from tidelock.pool.peers import Peers
    from tidelock.pool.recipe import Progress
    from tidelock.run.pool_job import PoolData
    from tidelock.run.pool_notes import PoolObserver

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
        loss: Of the last batch, before its step; None of a peer that did no step, as all were done.
        eval_loss: On what is held out, after the last step; None without any.
        seconds: How long it took.
    """

    adapter: Path | None
    steps: int
    loss: float | None
    eval_loss: float | None
    seconds: float


def lead(
    config: RunConfig,
    meeting: MeetingPlace,
    count: int,
    layout_of: LayoutOf,
    observer: PoolObserver,
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
    _check_task(config, checkpoint)
    layout_of(_num_blocks(checkpoint), count, None)  # refuses a layout that cannot be before anybody comes
    config, data = read_data(config, checkpoint)
    folder.write_config(config)
    on_ready()
    observer.say(f"Data: {len(data.examples)} examples to learn from, {len(data.held_out)} to measure on.")
    return _Lead(config, folder, checkpoint, data, meeting, layout_of, observer, None).run(count)


def resume(
    path: Path,
    meeting: MeetingPlace,
    count: int,
    layout_of: LayoutOf,
    observer: PoolObserver,
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
    config, data = read_data(config, checkpoint)
    saved = folder.latest_checkpoint()
    found = None if saved is None else load_progress(saved)

    def as_before(num_blocks: int, peers: int, profile: Profile | None) -> Decision | None:
        if profile is None and peers == before.num_peers:
            return before, None
        return layout_of(num_blocks, peers, profile)

    on_ready()
    observer.say(f"Going on from {saved or 'the beginning: there is no whole checkpoint yet'}.")
    return _Lead(config, folder, checkpoint, data, meeting, as_before, observer, found).run(count)


def follow(
    own: RunConfig, meeting: MeetingPlace, observer: PoolObserver, *, wish: int | None, insists: bool
) -> PoolResult:
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
    holdings = Holdings.of(config, Path(own.out) / "cache")
    while True:
        seat = meeting.arrive(wish=wish, insists=insists and seat is None, was=seat)
        remember_number(Path(own.out), seat.peer)
        try:
            notes = _follow_round(config, checkpoint, meeting, seat, holdings, observer)
        except PeerError as error:
            observer.say(f"A peer is lost. {error} Asking peer 0 how it goes on.")
            notes = None
        if notes is not None:
            return PoolResult(None, notes.steps, notes.loss, notes.eval_loss, time.monotonic() - began)


def _follow_round(
    config: RunConfig,
    checkpoint: Checkpoint,
    meeting: MeetingPlace,
    seat: Seat,
    holdings: Holdings,
    observer: PoolObserver,
) -> PoolNotes | None:
    """Take part in a round; return None when another one follows."""
    peers = meeting.open(seat)
    try:
        data = shared_data(peers, None)
        job = job_of(config, checkpoint, data, holdings, shared_begin(peers, config, checkpoint, None))
        if peers.notices.ask(_MEASURES) == str(True):
            measured_profile(peers, job, config)
        layout = layout_from_json(peers.notices.ask(_LAYOUT))
        _introduce(peers, layout, observer)
        notes = PoolNotes(None, observer, job)
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
        data: Its examples.
        meeting: Where the others come.
        layout_of: Says who computes what.
        observer: Told how it gets on.
        progress: From where the run goes on; None is the beginning.
    """

    config: RunConfig
    folder: RunFolder
    checkpoint: Checkpoint
    data: PoolData
    meeting: MeetingPlace
    layout_of: LayoutOf
    observer: PoolObserver
    progress: Progress | None

    def run(self, count: int) -> PoolResult:
        """Train with so many peers at first."""
        began = time.monotonic()
        self.meeting.notices.tell(_CONFIG, self.config.to_toml())
        self.meeting.notices.tell(_MODEL, str(self.checkpoint.fingerprint()))
        seat = self.meeting.seat_first(count)
        holdings = Holdings.of(self.config, self.folder.cache)
        while True:
            try:
                notes = self._round(seat, holdings)
            except PeerError as error:
                self.observer.say(f"A peer is lost. {error} Going on with those that are left.")
                notes = None
            if notes is not None:
                seconds = time.monotonic() - began
                summary_row = {"step": notes.steps, "epoch": self.config.epochs, "train_runtime": seconds}
                self.folder.append_metrics(summary_row)
                return PoolResult(self._trained, notes.steps, notes.loss, notes.eval_loss, seconds)
            seat = self.meeting.seat_again(seat)
            steps = 0 if self.progress is None else self.progress.steps
            self.observer.say(f"The pool has changed: going on after step {steps}, {seat.count} peers.")

    def _round(self, seat: Seat, holdings: Holdings) -> PoolNotes | None:
        """Train until the run is done; return None when the pool is to change before that."""
        peers = self.meeting.open(seat)
        try:
            shared_data(peers, self.data)
            begin = shared_begin(peers, self.config, self.checkpoint, self.progress)
            job = job_of(self.config, self.checkpoint, self.data, holdings, begin)
            self.folder.keep_until(begin.steps)
            self.folder.write_facts(facts_of_pool(job).model_dump_json(indent=2))
            layout = self._layout(peers, job)
            _introduce(peers, layout, self.observer)
            notes = PoolNotes(Desk(self.folder, self.config.keep, self.meeting), self.observer, job)
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


def _introduce(peers: Peers, layout: PoolLayout, observer: PoolObserver) -> None:
    observer.say(f"Pool: peer {peers.peer} of {peers.count}; {described(layout)}.")


def _num_blocks(checkpoint: Checkpoint) -> int:
    return sizes_of(read_config(checkpoint.folder)).num_blocks


def _check_task(config: RunConfig, checkpoint: Checkpoint) -> None:
    """Refuse a task or a method that is for the other kind of model."""
    model = read_config(checkpoint.folder)
    rules = [("--task text-to-text", config.task == "text-to-text", f"--task {config.task}"),
             ("--method side", config.method == "side", f"--method {config.method}")]  # fmt: skip
    if not model.is_encoder_decoder:
        expected = "--task causal-lm, classification or regression"
        rules = [(expected, config.task != "text-to-text", f"--task {config.task}")]
    kind = "an encoder-decoder" if model.is_encoder_decoder else "a decoder"
    for expected, holds, got in rules:
        if not holds:
            msg = f"Training {kind} ({model.model_type}) in a pool: expected {expected}, got {got}. Change it."
            raise ConfigError(msg)


def _check(config: RunConfig) -> None:
    """Refuse what a pool does not do."""
    rules = (
        ("--method " + " or ".join(METHODS), config.method in METHODS, f"--method {config.method}"),
        ("every block to be read with --method side", config.method != "side" or not config.layer, "--layer"),
        ("no dropout with --method side", config.method != "side" or not config.dropout, f"--dropout {config.dropout}"),
        ("no weight decay with --method full", config.method != "full" or not config.weight_decay, "--weight-decay"),
        ("whole epochs", config.epochs == int(config.epochs) >= 1, f"--epochs {config.epochs}"),
        ("--side-init magnitude or random", config.side_init != "fisher", "--side-init fisher"),
    )  # fmt: skip
    for expected, holds, got in rules:
        if not holds:
            msg = f"Training in a pool: expected {expected}, got {got}. Change it, or train on one device."
            raise ConfigError(msg)
