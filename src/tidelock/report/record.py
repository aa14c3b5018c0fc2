"""What is known of one run, and what follows from it: all that plots and page are drawn from.

May import `report` and libraries.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tidelock.report.facts import RunFacts

_FP32_BYTES = 4
# What crosses before training begins whether or not any of the model is fetched.
_CONTROL = "control"


@final
@dataclass(frozen=True, slots=True)
class EpochTraffic:
    """What crossed in one epoch.

    Attributes:
        epoch: Its number; 0 is what came before the first.
        kinds: Bytes by kind, both directions together.
        full_fp32_bytes: What the tensors of the same passes would have taken in fp32 with all modules active; 0 where
            there are no modules.
    """

    epoch: int
    kinds: Mapping[str, int]
    full_fp32_bytes: int


@final
@dataclass(frozen=True, slots=True)
class StepTimes:
    """Where the time of some steps went.

    Attributes:
        first: The step before them.
        last: The last of them.
        seconds: Of a mean step, by what it went to: device, cloud, waiting, wire.
    """

    first: int
    last: int
    seconds: Mapping[str, float]


@final
@dataclass(frozen=True, slots=True)
class PoolRow:
    """What a stage was planned to do in a step, or what a peer of it did.

    Attributes:
        name: Of the row.
        is_planned: Whether it is the plan.
        bars: What, from when to when, in seconds since the step began.
    """

    name: str
    is_planned: bool
    bars: Sequence[tuple[str, float, float]]


@final
@dataclass(frozen=True, slots=True)
class PoolRecord:
    """What is known of a run in a pool besides.

    Attributes:
        layout: Who computed what, in words.
        rows: A step of the first epoch, stage by stage.
    """

    layout: str
    rows: Sequence[PoolRow]


@final
@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run, as its folder has it.

    Attributes:
        name: Of the run folder.
        options: What decides the run, by name.
        facts: What it is made of.
        metrics: Lines of metrics.jsonl.
        periods: Lines of schedule.jsonl.
        epochs: What crossed by epoch, as the ledger has it.
        pool: Of a run in a pool.
    """

    name: str
    options: Mapping[str, Any]
    facts: RunFacts
    metrics: Sequence[Mapping[str, Any]]
    periods: Sequence[Mapping[str, Any]]
    epochs: Sequence[Mapping[str, Any]]
    pool: PoolRecord | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return max((row["step"] for row in self.metrics), default=0)

    @property
    def epochs_done(self) -> float:
        """Passes over the data done."""
        return max((row["epoch"] for row in self.metrics if "epoch" in row), default=0.0)

    @property
    def has_ended(self) -> bool:
        """Whether Trainer came to its end, with its summary: all steps done, or stopped by Ctrl-C."""
        return any("train_runtime" in row for row in self.metrics)

    def series(self, name: str) -> list[tuple[int, float]]:
        """Return what was measured under a name, as (step, value), in the order of steps."""
        return sorted((row["step"], row[name]) for row in self.metrics if name in row)

    def last(self, name: str) -> float | None:
        """Return what was measured last under a name, or None."""
        return next((value for _, value in reversed(self.series(name))), None)

    def kinds(self) -> dict[str, int]:
        """Return all bytes that crossed, by kind, both directions together."""
        total: Counter[str] = Counter()
        for row in self.epochs:
            total.update(_by_kind(row))
        return dict(total)

    def traffic(self) -> list[EpochTraffic]:
        """Return what crossed in each epoch in which more crossed than control messages."""
        epochs = [
            EpochTraffic(row["epoch"], _by_kind(row), self._full_fp32_bytes(row.get("tokens", {})))
            for row in self.epochs
        ]
        return [epoch for epoch in epochs if epoch.kinds.keys() - {_CONTROL}]

    def _full_fp32_bytes(self, tokens: Mapping[str, int]) -> int:
        """Return what the tensors of some passes would take in fp32 with all modules active, without framing.

        DLoRA (arXiv 2404.05182, section 3): up, each token's embedding, and at each site its input and the module's
        answer; down, the gradients of the last two, but none of the input of the lowest site. At selected tokens the
        final state, and its gradient. Beside a side network there are no modules.
        """
        model = self.facts.model
        if not model.sites:
            return 0
        inputs = [site.input_width for site in model.sites]
        outputs = sum(site.output_width for site in model.sites)
        up, down = model.embedding_width + sum(inputs) + outputs, outputs + sum(inputs[1:])
        trained, evaluated = tokens.get("trained", 0), tokens.get("evaluated", 0)
        states = 2 * tokens.get("trained_selected", 0) + tokens.get("evaluated_selected", 0)
        return _FP32_BYTES * (trained * (up + down) + evaluated * up + states * model.final_width)

    def step_times(self, most: int) -> list[StepTimes]:
        """Return where the time of steps went, neighbours taken together so that there are at most so many groups."""
        rows = [row for row in self.metrics if row.get("seconds")]
        size = max(1, math.ceil(len(rows) / most))
        times = []
        for group in (rows[begin : begin + size] for begin in range(0, len(rows), size)):
            total: Counter[str] = Counter()
            for row in group:
                total.update(row["seconds"])
            steps = sum(row["timed_steps"] for row in group)
            means = {place: seconds / steps for place, seconds in total.items()}
            times.append(StepTimes(group[0]["step"] - group[0]["timed_steps"], group[-1]["step"], means))
        return times


def _by_kind(row: Mapping[str, Any]) -> dict[str, int]:
    total: Counter[str] = Counter(row["sent"])
    total.update(row["received"])
    return dict(total)
