"""Kill and Revive as a `TrainerCallback`: measures the modules, and has those active that the schedule says.

DLoRA (arXiv 2404.05182, section on Kill and Revive, Algorithms 1 and 2). What a schedule knows is kept in buffers of
the bank and so in every checkpoint that Trainer writes: a resumed run goes on in the middle of a period as if nothing
had happened.

May import `schedule`, `device`, errors and libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from transformers import TrainerCallback

from tidelock.device.model import DeviceModel
from tidelock.errors import ConfigError
from tidelock.schedule.decide import warm_up_turns
from tidelock.schedule.schedule import Decision, ModuleScore, Schedule, ScoreTable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.optim import Optimizer
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from tidelock.device.bank import Bank

# Trainer's epoch is a sum of fractions.
_EPOCH_TOLERANCE = 1e-6


@final
@dataclass(frozen=True, slots=True)
class PeriodReport:
    """What became of one period.

    Attributes:
        table: All modules at its end.
        decision: What is active next.
        epoch: Epochs done, as Trainer counts.
        step: Optimizer steps done.
    """

    table: ScoreTable
    decision: Decision
    epoch: float
    step: int


@final
class Activity(nn.Module):
    """What a schedule knows of a bank's modules, as buffers; M modules in the order of their blocks.

    Attributes:
        alive: Which are active, bool of shape (M,).
        scores: Each one's score in its last active period, float64 of shape (M,).
        last_active: The number of that period, int64 of shape (M,).
        start: All weights at the beginning of the period, in one row.
        period: Its number, int64.
        steps: Optimizer steps done in it, int64.
        rates: Sum of their learning rates, float64.
        saliencies: Each one's sum of -weights * gradients over them, float64 of shape (M,).
    """

    alive: Tensor
    scores: Tensor
    last_active: Tensor
    start: Tensor
    period: Tensor
    steps: Tensor
    rates: Tensor
    saliencies: Tensor

    def __init__(self, bank: Bank) -> None:
        super().__init__()
        count = len(bank.numbers)
        self.register_buffer("alive", torch.ones(count, dtype=torch.bool))
        self.register_buffer("scores", torch.zeros(count, dtype=torch.float64))
        self.register_buffer("last_active", torch.zeros(count, dtype=torch.long))
        self.register_buffer("start", _weights(bank.blocks).clone())
        self.register_buffer("period", torch.zeros((), dtype=torch.long))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("rates", torch.zeros((), dtype=torch.float64))
        self.register_buffer("saliencies", torch.zeros(count, dtype=torch.float64))


# ruff: noqa: ARG002  (Trainer gives every callback the same arguments)


@final
class KillRevive(TrainerCallback):
    """Has few PEFT modules active at once, those that matter most.

    One line for whoever trains a connected model with `transformers.Trainer`::

        Trainer(model, args, ..., callbacks=[tidelock.KillRevive(tidelock.Schedule("kill-revive", budget=8))])

    Args:
        schedule: Which modules are active when.
        on_period: Told of every period that ended.

    Raises:
        ConfigError: From Trainer's constructor, when its model is not tidelock's.
    """

    def __init__(self, schedule: Schedule, on_period: Callable[[PeriodReport], None] | None = None) -> None:
        self.schedule = schedule
        self._on_period = on_period
        self._model: DeviceModel | None = None

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Give the model its buffers, before a checkpoint is read into them."""
        if not isinstance(model, DeviceModel):
            msg = (
                f"Kill and Revive: expected a model from tidelock.connect, got {type(model).__name__}. Train that one "
                "without this callback."
            )
            raise ConfigError(msg)
        self._model = model
        model.bank.activity = Activity(model.bank)
        model.bank.activate(model.bank.numbers)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the first period, or go on with the one that a checkpoint was in."""
        activity = self._activity
        if state.global_step == 0:
            activity.load_state_dict(Activity(self._bank).state_dict())
        # Trainer moves a model after its callbacks have seen it.
        activity.to("cpu")
        max_active = self._require_model().backbone.max_active
        asks_all = not self.schedule.changes or self.schedule.killed == "frozen"
        if asks_all and max_active is not None and max_active < len(self._blocks):
            msg = (
                f"Schedule {self.schedule.name}: expected at most {max_active} modules to be asked in a pass, as the "
                f"cloud's operator allows, got {len(self._blocks)}. Choose kill-revive with killed modules bypassed, "
                "or adapt fewer blocks."
            )
            raise ConfigError(msg)
        self._activate()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """In a warm-up that takes turns, have this step's modules active."""
        activity = self._activity
        limits = (self.schedule.warm_up_active, self._require_model().backbone.max_active, len(self._blocks))
        at_once = min(limit for limit in limits if limit is not None)
        if activity.period < self.schedule.warm_up and at_once < len(self._blocks):
            turns = warm_up_turns(self._blocks, at_once)
            self._bank.activate(turns[int(activity.steps) % len(turns)], frozen=self.schedule.killed == "frozen")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note what each module's weights are worth to the loss, before the step moves them."""
        if self.schedule.norm == "saliency":
            for index, block in enumerate(self._blocks):
                self._activity.saliencies[index] += _saliency(self._bank.module(block))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the learning rate of a step that was taken."""
        activity = self._activity
        activity.rates += kwargs["lr_scheduler"].get_last_lr()[0]

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Count the step; when it ends a period, have the next one's modules chosen."""
        activity, schedule = self._activity, self.schedule
        activity.steps += 1
        epoch = state.epoch or 0.0
        ends_epoch = abs(epoch - round(epoch)) < _EPOCH_TOLERANCE
        if not (ends_epoch if schedule.period is None else int(activity.steps) >= schedule.period):
            return
        table = self._measure()
        decision = Decision((), (), tuple(module.block for module in table.modules if module.active))
        # What was trained together stays together at the end.
        if schedule.changes and state.global_step < state.max_steps and activity.period >= schedule.warm_up - 1:
            decision = self._require_model().backbone.decide(schedule, table)
        for index, block in enumerate(self._blocks):
            activity.alive[index] = block in decision.active
        activity.start.copy_(_weights(self._bank.blocks))
        activity.period += 1
        activity.steps.zero_()
        activity.rates.zero_()
        activity.saliencies.zero_()
        self._activate()
        if optimizer is not None and schedule.moments == "reset":
            for block in decision.killed:
                for parameter in self._bank.module(block).parameters():
                    optimizer.state.pop(parameter, None)
        if self._on_period is not None:
            self._on_period(PeriodReport(table, decision, epoch, state.global_step))

    def _measure(self) -> ScoreTable:
        """Score the modules that were active in the period that ends; return the table of all."""
        activity, period = self._activity, int(self._activity.period)
        sizes = [sum(p.numel() for p in self._bank.module(block).parameters()) for block in self._blocks]
        before, after = activity.start.split(sizes), _weights(self._bank.blocks).split(sizes)
        rate = float(activity.rates / activity.steps) if self.schedule.per_learning_rate else 1.0
        for index in activity.alive.nonzero().flatten().tolist():
            if self.schedule.norm == "saliency":
                score = float(activity.saliencies[index].relu())
            else:
                score = _distance(before[index], after[index], self.schedule.norm)
            activity.scores[index] = score / rate if rate else score
            activity.last_active[index] = period
        rows = zip(
            self._blocks,
            activity.alive.tolist(),
            activity.scores.tolist(),
            activity.last_active.tolist(),
            strict=True,
        )
        return ScoreTable(period, tuple(ModuleScore(*row) for row in rows))

    def _activate(self) -> None:
        alive = [block for block, is_alive in zip(self._blocks, self._activity.alive.tolist(), strict=True) if is_alive]
        self._bank.activate(alive, frozen=self.schedule.killed == "frozen")

    @property
    def _bank(self) -> Bank:
        return self._require_model().bank

    @property
    def _blocks(self) -> Sequence[int]:
        return self._bank.numbers

    @property
    def _activity(self) -> Activity:
        activity = self._bank.activity
        if activity is None:
            msg = "Kill and Revive: expected a Trainer that it was given to, got none. Pass it in callbacks=[...]."
            raise ConfigError(msg)
        return activity

    def _require_model(self) -> DeviceModel:
        if self._model is None:
            msg = "Kill and Revive: expected a Trainer that it was given to, got none. Pass it in callbacks=[...]."
            raise ConfigError(msg)
        return self._model


def _weights(blocks: nn.ModuleDict) -> Tensor:
    """Return all weights in one row, block by block, as they are now."""
    ordered = sorted(blocks, key=int)
    return parameters_to_vector(p.detach().float().cpu() for block in ordered for p in blocks[block].parameters())


def _distance(before: Tensor, after: Tensor, norm: str) -> float:
    # In fp64: the small changes of late training must not be lost in the sum of squares.
    if norm == "difference":
        return float((after.double() - before.double()).norm())
    return abs(float(after.double().norm() - before.double().norm()))


def _saliency(module: nn.Module) -> float:
    """Return how much the loss would rise, to first order, if all weights of a module were zero.

    For a low-rank branch y = B A x that is twice the rise if its answer y were left out.
    """
    learned = ((p.detach().double(), p.grad.double()) for p in module.parameters() if p.grad is not None)
    return -sum(float((weight * grad).sum()) for weight, grad in learned)
