"""`transformers.Trainer` with what a run needs beside it: a journal, whole checkpoints, and an orderly stop.

Not a trainer of our own: the loop, the optimizer and the schedule are Trainer's.
May import everything below `run`, and `run.folder`.
"""

from __future__ import annotations

import math
import random
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, final

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from tidelock.errors import StorageError, TidelockError
from tidelock.run.folder import RunFolder, storage_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import TrainerControl, TrainerState, TrainingArguments

    from tidelock.device.device_lm import DeviceLM
    from tidelock.device.kill_revive import PeriodReport
    from tidelock.wire.ledger import Ledger


class Observer(Protocol):
    """Is told how a run gets on; the command line draws it."""

    def say(self, text: str) -> None:
        """Take a notice."""
        ...

    def start(self, total_steps: int, first_step: int) -> None:
        """Training begins, after `first_step` steps of an earlier part of the run."""
        ...

    def step(self, step: int, loss: float | None) -> None:
        """An optimizer step is done; `loss` is the last one logged."""
        ...

    def finish(self) -> None:
        """Training is over, or has failed."""
        ...


@final
class StopFlag:
    """Set by Ctrl-C: finish the step, save, stop. A second Ctrl-C stops at once.

    Args:
        say: Tells the person so.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.is_set = False
        self._say = say

    @contextmanager
    def on_interrupt(self) -> Iterator[None]:
        """Have Ctrl-C set the flag inside."""

        def handler(_signal: int, _frame: object) -> None:
            if self.is_set:
                raise KeyboardInterrupt
            self.is_set = True
            # In a thread: the signal may have come in the middle of the same stream's writing.
            notice = "Stopping after this step; Ctrl-C again stops at once."
            threading.Thread(target=self._say, args=(notice,)).start()

        try:
            before = signal.signal(signal.SIGINT, handler)
        except ValueError:  # not the main thread: whoever runs us there handles Ctrl-C
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


# ruff: noqa: ARG002  (Trainer gives every callback the same arguments)


@final
class StepClock:
    """Adds up where the time of optimizer steps goes; what lies between them, evaluations above all, is left out."""

    def __init__(self) -> None:
        self._began = 0.0
        self._steps = 0
        self._seconds: dict[str, float] = {}

    def begin(self, model: DeviceLM) -> None:
        """Begin a step."""
        model.take_times()  # of passes that belong to no step
        self._began = time.perf_counter()

    def end(self, model: DeviceLM) -> None:
        """End it."""
        seconds, split = time.perf_counter() - self._began, asdict(model.take_times())
        for name, value in {"device": max(0.0, seconds - sum(split.values())), **split}.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + value
        self._steps += 1

    def take(self) -> tuple[int, dict[str, float]]:
        """Return how many steps there were since the last call, and their seconds: device, cloud, waiting, wire."""
        taken = self._steps, self._seconds
        self._steps, self._seconds = 0, {}
        return taken


@final
class Journal(TrainerCallback):
    """Writes metrics and ledger, tells the observer, and stops when asked to.

    Args:
        folder: Where to write.
        ledger: What crossed.
        observer: Told of every step.
        stop: Looked at after every step.

    Attributes:
        observer: As given.
        random_state: Of Python, NumPy and PyTorch after the last finished step; None before the first.
        between_steps: Whether the weights are those of a finished step, and not on their way to the next.
    """

    def __init__(self, folder: RunFolder, ledger: Ledger, observer: Observer, stop: StopFlag) -> None:
        self._folder = folder
        self._ledger = ledger
        self.observer = observer
        self._stop = stop
        self._last_loss: float | None = None
        self._clock = StepClock()
        self.random_state: dict[str, Any] | None = None
        self.between_steps = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell how many steps there are."""
        self.observer.start(state.max_steps, state.global_step)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have the ledger count a new epoch, or go on with the one in which a checkpoint was."""
        # Trainer's epoch is a sum of fractions.
        self._ledger.begin_epoch(math.floor((state.epoch or 0.0) + 1e-6) + 1)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to measure where the step's time goes."""
        self._clock.begin(kwargs["model"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note that the weights begin to move."""
        self.between_steps = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the random state that a resumed run must begin with; stop if asked to."""
        self.between_steps = True
        self._clock.end(kwargs["model"])
        self.random_state = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
        }
        if not control.should_log:  # else with the loss of this step, in a moment
            self.observer.step(state.global_step, self._last_loss)
        if self._stop.is_set:
            control.should_save = True
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a line of metrics."""
        numbers = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        row: dict[str, Any] = {"step": state.global_step, **numbers, "bytes": self._ledger.totals()}
        if tokens := self._ledger.tokens():
            row["tokens"] = tokens
        if "loss" in numbers:
            self._last_loss = numbers["loss"]
            self.observer.step(state.global_step, self._last_loss)
            row["timed_steps"], row["seconds"] = self._clock.take()
        self._folder.append_metrics(row)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the ledger as it is at this checkpoint."""
        self.write_ledger()

    def on_period(self, report: PeriodReport) -> None:
        """Write what became of a period, and tell of it if it changed anything."""
        modules, decision = report.table.modules, report.decision
        row = {
            "period": report.table.period,
            "epoch": report.epoch,
            "step": report.step,
            "active": [module.block for module in modules if module.active],
            "scores": {str(module.block): module.score for module in modules},
            "killed": decision.killed,
            "revived": decision.revived,
            "next_active": decision.active,
        }
        self._folder.append_schedule(row)
        if decision.killed or decision.revived:
            blocks = ", ".join(map(str, decision.active))
            self.observer.say(
                f"Period {report.table.period}: {len(decision.killed)} modules killed, {len(decision.revived)} "
                f"revived; active now: {blocks}."
            )

    def write_ledger(self) -> None:
        """Write what has crossed until now."""
        self._folder.write_ledger(self._ledger)

    def restore_random_state(self) -> None:
        """Undo the random draws of a step that was not finished."""
        if self.random_state is not None:
            random.setstate(self.random_state["python"])
            np.random.set_state(self.random_state["numpy"])
            torch.set_rng_state(self.random_state["torch"])


@final
class RunTrainer(Trainer):
    """A Trainer whose checkpoints are whole or not there.

    Args:
        folder: The run's folder.
        journal: Its callback, which knows the random state at the last finished step.
        callbacks: Those of its method, called before the journal.
        keep: Complete checkpoints to keep; Trainer's own limit would count half-written ones too.
        **kwargs: Trainer's own.
    """

    def __init__(
        self, *, folder: RunFolder, journal: Journal, callbacks: Sequence[TrainerCallback], keep: int, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs, callbacks=[*callbacks, journal])
        self.remove_callback(PrinterCallback)  # the observer tells the same, in its own way
        self._folder = folder
        self._journal = journal
        self._keep = keep

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as Trainer does, and draw no random number that training would have drawn."""
        # A data loader draws one for each pass over it. A run resumed between a checkpoint and the evaluation after it
        # does not evaluate again, and would go on with other dropout masks.
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)

    def train_or_save(self, checkpoint: Path | None) -> None:
        """Train; when that fails half-way, save what the finished steps have learned, and fail.

        Raises:
            TidelockError: Whatever went wrong.
        """
        if checkpoint is not None and self.eval_dataset is not None:
            self.args.eval_on_start = self._owes_evaluation(checkpoint)
        try:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except StorageError:
            raise
        except (TidelockError, KeyboardInterrupt):
            self._save_finished_steps()
            raise
        finally:
            self._journal.observer.finish()

    def _owes_evaluation(self, checkpoint: Path) -> bool:
        """Return whether the run failed in the evaluation after the last step, which was saved and is not repeated."""
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        is_due = state.global_step % self.args.eval_steps == 0 or state.global_step == state.max_steps
        return is_due and self._folder.metric(state.global_step, "eval_loss") is None

    def _save_finished_steps(self) -> None:
        self._journal.write_ledger()
        saved = self._folder.checkpoints / f"checkpoint-{self.state.global_step}"
        finished = self.state.global_step and self._journal.between_steps
        if finished and self.optimizer is not None and self._folder.latest_checkpoint() != saved:
            self._journal.restore_random_state()
            self._save_checkpoint(self.model_wrapped, None)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:  # noqa: ANN401  (as Trainer has it)
        checkpoint = self._folder.checkpoints / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            self._folder.mark_complete(checkpoint)
            self._folder.keep_newest(self._keep)
        # PyTorch and safetensors report a full disk as errors of their own.
        except (OSError, RuntimeError, SafetensorError) as error:
            refusal = storage_error("Writing a checkpoint", error, checkpoint)
            self._folder.discard(checkpoint)
            raise refusal from error
