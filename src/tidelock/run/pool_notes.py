"""What becomes known while a pool trains: peer 0 writes it into the run's folder, and every peer says it.

May import everything below `run`, and `run.folder`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, final

import numpy as np

from tidelock.pool.timeline import summary, to_json
from tidelock.run.metrics import sequence_metrics
from tidelock.run.pool_checkpoint import save_progress
from tidelock.run.trainer import Observer
from tidelock.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidelock.pool.held_out import Measured
    from tidelock.pool.job import PoolJob
    from tidelock.pool.meeting import MeetingPlace
    from tidelock.pool.recipe import Progress
    from tidelock.pool.timeline import Activity, Timeline
    from tidelock.run.folder import RunFolder

_EVAL_LOSS = "eval_loss"


class PoolObserver(Observer, Protocol):
    """Is told how a run in a pool gets on."""

    def peers(self, step: int, of_peers: Sequence[Activity]) -> None:
        """What each peer did in a step; told to peer 0's every few steps."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Desk:
    """What only peer 0 has.

    Attributes:
        folder: The run's.
        keep: Checkpoints to keep.
        meeting: Where others come.
    """

    folder: RunFolder
    keep: int
    meeting: MeetingPlace


@final
class PoolNotes:
    """The watcher of a round, as `PoolTraining` has it.

    Args:
        desk: Of peer 0; None of another one.
        observer: Told how the run gets on.
        job: What is trained.

    Attributes:
        steps: Those done.
        loss: Of the last batch; None before the first.
        eval_loss: Of the last evaluation; None before the first.
    """

    def __init__(self, desk: Desk | None, observer: PoolObserver, job: PoolJob) -> None:
        self.steps = job.begin.steps
        self.loss = None if desk is None else desk.folder.metric(self.steps, "loss")
        self.eval_loss = None if desk is None else desk.folder.metric(self.steps, _EVAL_LOSS)
        self._desk = desk
        self._observer = observer
        self._per_epoch = job.recipe.steps_per_epoch(len(job.examples))
        self._held_out = job.held_out.examples
        self._began = time.monotonic()
        observer.start(job.recipe.epochs * self._per_epoch, job.begin.steps)

    def step(self, step: int, loss: float) -> None:
        """Take a step."""
        now = time.monotonic()
        self.steps, self.loss = step, loss
        self._observer.step(step, loss)
        if self._desk is not None:
            row = {"step": step, "loss": loss, "epoch": step / self._per_epoch, "step_seconds": now - self._began}
            self._desk.folder.append_metrics(row)
        self._began = now

    def save(self, progress: Progress) -> None:
        """Write a checkpoint, which is whole or not there."""
        if self._desk is not None:
            save_progress(progress, self._desk.folder, self._desk.keep)

    def evaluated(self, step: int, found: Measured) -> None:
        """Take an evaluation."""
        self.eval_loss = found.loss
        metrics = {}
        if found.outputs_BC.shape[1]:
            metrics = sequence_metrics(
                found.outputs_BC.numpy(), np.array([example.labels for example in self._held_out])
            )
        said = "".join(f", {name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items())
        self._observer.say(f"After step {step}, loss on the evaluation data {found.loss:.4f}{said}.")
        if self._desk is not None:
            measured = {_EVAL_LOSS: found.loss, **{f"eval_{name}": value for name, value in metrics.items()}}
            self._desk.folder.append_metrics({"step": step, **measured, "epoch": step / self._per_epoch})
        self._began = time.monotonic()

    def owes_evaluation(self, step: int) -> bool:
        """Whether an evaluation is not in the folder."""
        return self._desk is not None and self._desk.folder.metric(step, _EVAL_LOSS) is None

    def activity(self, step: int, of_peers: list[Activity]) -> None:
        """Have what the peers do shown on peer 0."""
        if self._desk is not None:
            self._observer.peers(step, of_peers)

    def timelines(self, step: int, of_peers: list[Timeline]) -> None:
        """Say who waits for whom, and keep it for the report."""
        self._observer.say("\n".join([f"What the peers did in step {step}:", *summary(of_peers)]))
        if self._desk is not None:
            self._desk.folder.write_timelines(to_json(of_peers))

    def fill(self, examples: int) -> None:
        """Say that blocks are run again."""
        self._observer.say(f"Outputs of {examples} examples are not there: the blocks are run for them.")

    def redistributed(self, sent_bytes: int) -> None:
        """Say that the pipeline is done."""
        self._observer.say(
            f"From here on the pool learns from what is cached, without the frozen blocks; this peer has sent "
            f"{format_bytes(sent_bytes)} of it to others."
        )
        self._began = time.monotonic()

    def wants_change(self) -> bool:
        """Whether somebody has come who is to take part."""
        return self._desk is not None and self._desk.meeting.somebody_waits()
