"""A schedule's switches, and the facts that it decides on.

The choices that the DLoRA paper (arXiv 2404.05182, Algorithms 1 and 2) leaves open are fields here, each with its
default.
May import errors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from tidelock.errors import ConfigError

SCHEDULES = ("full", "early-kill", "kill-revive", "fixed", "random")
NORMS = ("difference", "difference-of-norms", "saliency")
KILLED = ("bypass", "frozen")
MOMENTS = ("reset", "keep")


@final
@dataclass(frozen=True, slots=True)
class Schedule:
    """Which modules are active when.

    Attributes:
        name: `full`: all, always. `kill-revive`: `budget` of them, a few exchanged after each period. `early-kill`:
            those with a score of at least `threshold` after the warm-up, or else the best `budget`; none returns.
            `fixed`: the best `budget` after the warm-up, for good. `random`: `budget` drawn anew for each period.
        budget: Modules active at once after the warm-up; None is half of them, rounded up (the paper: 16 of 32).
        threshold: For `early-kill`: kill modules whose score is below this share of the mean score; None uses `budget`.
        warm_up: Periods before the first decision.
        warm_up_active: Modules active at once in the warm-up, which then take turns, step by step; None is all.
        period: Optimizer steps in a period; None is an epoch.
        exchange: Share of the budget that `kill-revive` exchanges after a period; at least one module.
        longest_sleep: Periods after which `kill-revive` revives a module whatever its score; None is twice as many as
            it would take to revive all in turn.
        norm: A module's score: `difference` is the L2 norm of what its weights changed in its last active period,
            `difference-of-norms` what their L2 norm changed, without its sign; `saliency` how much the loss would rise
            without the module, to first order: the sum of -weights * gradients over that period's steps, and zero where
            it would fall (the criterion of Molchanov et al., arXiv 1906.10771, with its sign and not squared).
        per_learning_rate: Divide a score by the mean learning rate of its period, so that scores of periods compare.
        killed: A killed module is left out of every pass (`bypass`), or goes on to answer with the weights that it had
            (`frozen`).
        moments: Adam's moments of a revived module begin at zero (`reset`) or go on (`keep`).
        seed: Of `random`.

    Raises:
        ConfigError: A value breaks its rule, or is of another schedule.
    """

    name: str = "full"
    budget: int | None = None
    threshold: float | None = None
    warm_up: int = 1
    warm_up_active: int | None = None
    period: int | None = None
    exchange: float = 0.25
    longest_sleep: int | None = None
    norm: str = "saliency"
    per_learning_rate: bool = False
    killed: str = "bypass"
    moments: str = "reset"
    seed: int = 0

    def __post_init__(self) -> None:
        for field, choices in (("name", SCHEDULES), ("norm", NORMS), ("killed", KILLED), ("moments", MOMENTS)):
            value = getattr(self, field)
            _require(value in choices, field, f"one of {', '.join(choices)}", value)
        for field in ("budget", "warm_up", "warm_up_active", "period", "longest_sleep"):
            value = getattr(self, field)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            _require(value is None or whole, field, "a whole number of 1 or more", value)
        _require(0 < self.exchange <= 1, "exchange", "more than 0 and at most 1", self.exchange)
        if self.threshold is not None:
            _require(0 < self.threshold < math.inf, "threshold", "more than 0, and finite", self.threshold)
            _require(self.name == "early-kill", "threshold", "it with early-kill only", f"it with {self.name}")
            _require(self.budget is None, "threshold", "either a threshold or a budget", "both")
        for field in ("budget", "warm_up_active"):
            value = getattr(self, field)
            _require(self.name != "full" or value is None, field, "none with the schedule full", value)

    @property
    def changes(self) -> bool:
        """Whether any module is ever killed."""
        return self.name != "full"

    def budget_of(self, num_modules: int) -> int:
        """Return how many of so many modules are active after the warm-up, unless a threshold says so."""
        return min(self.budget if self.budget is not None else math.ceil(num_modules / 2), num_modules)


@final
@dataclass(frozen=True, slots=True)
class ModuleScore:
    """What a schedule knows of one module when a period has ended.

    Attributes:
        block: The module's block.
        active: Whether it was active in that period.
        score: In the last period in which it was active; see `Schedule.norm`.
        last_active: Number of that period.
    """

    block: int
    active: bool
    score: float
    last_active: int


@final
@dataclass(frozen=True, slots=True)
class ScoreTable:
    """All modules when a period has ended.

    Attributes:
        period: Number of the period that ended; the warm-up has numbers 0 to `Schedule.warm_up` - 1.
        modules: In the order of their blocks.

    Raises:
        ConfigError: It has no module, one twice, a negative or no finite score, or none that is active.
    """

    period: int
    modules: tuple[ModuleScore, ...]

    def __post_init__(self) -> None:
        blocks = [module.block for module in self.modules]
        _require(bool(blocks) and blocks == sorted(set(blocks)), "scores", "one a block, in their order", blocks[:8])
        _require(any(module.active for module in self.modules), "scores", "an active module", "none")
        for module in self.modules:
            where = f"score of the module at block {module.block}"
            _require(0 <= module.score < math.inf, where, "a finite number of 0 or more", module.score)
            known = f"one of a period from 0 to {self.period}"
            _require(0 <= module.last_active <= self.period, where, known, module.last_active)


@final
@dataclass(frozen=True, slots=True)
class Decision:
    """What is active next.

    Attributes:
        killed: Blocks whose modules were active and are no more, ascending.
        revived: Blocks whose modules were not and now are, ascending.
        active: Blocks whose modules are active now, ascending.
    """

    killed: tuple[int, ...]
    revived: tuple[int, ...]
    active: tuple[int, ...]


def _require(holds: bool, what: str, expected: str, got: object) -> None:  # noqa: FBT001
    if not holds:
        msg = f"Schedule's {what.replace('_', '-')}: expected {expected}, got {got!r}. Change it."
        raise ConfigError(msg)
