"""What each peer did when, in one step of the pipeline: to be seen beside what was planned.

May import `units` and libraries.
"""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias, final, get_args

from tidelock.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# "wait-forward" is for what the stage before sends, "wait-backward" for what the next one does; "all-reduce" sums over
# the peers of the stage, waiting for them included.
Doing: TypeAlias = Literal["forward", "backward", "wait-forward", "wait-backward", "all-reduce"]
_KINDS: tuple[Doing, ...] = get_args(Doing)


@final
@dataclass(frozen=True, slots=True)
class Bar:
    """One thing that a peer did.

    Attributes:
        work: What.
        micro_batch: For which micro-batch; None for an AllReduce.
        begin: Seconds since this peer began the step.
        end: Likewise.
    """

    work: Doing
    micro_batch: int | None
    begin: float
    end: float


@final
@dataclass
class Timeline:
    """A step on one peer. All peers begin a step within the time that a small message takes.

    Attributes:
        peer: Its number.
        stage: Its stage; None of a peer without blocks.
        memory_bytes: What its process took in memory after the step.
        bars: What it did, in order.
    """

    peer: int
    stage: int | None
    memory_bytes: int = 0
    bars: list[Bar] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._began = time.perf_counter()

    def numbers(self) -> list[float]:
        """Return what `activities` makes of it: stage, counted from 1, seconds by what was done, end, memory."""
        spent = [sum(bar.end - bar.begin for bar in self.bars if bar.work == work) for work in _KINDS]
        stage = 0 if self.stage is None else self.stage + 1
        return [stage, *spent, max((bar.end for bar in self.bars), default=0.0), self.memory_bytes]

    @contextmanager
    def during(self, work: Doing, micro_batch: int | None = None) -> Iterator[None]:
        """Note how long something takes."""
        begin = time.perf_counter() - self._began
        yield
        self.bars.append(Bar(work, micro_batch, begin, time.perf_counter() - self._began))


def to_json(timelines: Sequence[Timeline]) -> str:
    """Return them as peers tell them each other, and as a run's folder has them."""
    return json.dumps([asdict(timeline) for timeline in timelines])


def from_json(text: str) -> list[Timeline]:
    """Return what `to_json` was given.

    Raises:
        TypeError: The text is JSON of something else.
        ValueError: It is no JSON.
    """
    return [Timeline(**{**values, "bars": [Bar(**bar) for bar in values["bars"]]}) for values in json.loads(text)]


@final
@dataclass(frozen=True, slots=True)
class Activity:
    """What a peer did in a step, in shares of the time that the step took.

    Attributes:
        peer: Its number.
        stage: Its stage; None of a peer that ran no blocks.
        computing: Forward and backward.
        waiting_before: For the stage before.
        waiting_after: For the next stage.
        summing: Gradients, over the peers that have the same.
        memory_bytes: What its process took after it.
    """

    peer: int
    stage: int | None
    computing: float
    waiting_before: float
    waiting_after: float
    summing: float
    memory_bytes: int

    @property
    def idle(self) -> float:
        """The rest."""
        return max(0.0, 1 - self.computing - self.waiting_before - self.waiting_after - self.summing)

    def said(self) -> str:
        """Return it as a line for people."""
        memory = f"{format_bytes(self.memory_bytes)} of memory"
        if self.stage is None and not self.computing:
            return f"Peer {self.peer}, without blocks: {memory}."
        where = "" if self.stage is None else f", stage {self.stage + 1}"
        parts = [f"computing {self.computing:.0%}"]
        if self.stage is not None:
            for share, stage in ((self.waiting_before, self.stage), (self.waiting_after, self.stage + 2)):
                parts += [f"waiting for stage {stage} {share:.0%}"] if share else []
        parts += [f"summing gradients {self.summing:.0%}"] if self.summing else []
        return f"Peer {self.peer}{where}: {', '.join(parts)}, idle {self.idle:.0%}; {memory}."


def activities(of_peers: Sequence[Sequence[float]]) -> list[Activity]:
    """Return what each peer did, out of what `Timeline.numbers` gave there."""
    whole = max((end for *_, end, _ in of_peers), default=0.0) or 1.0
    found = []
    for peer, (stage, forward, backward, before, after, summing, _, memory) in enumerate(of_peers):
        found.append(
            Activity(
                peer=peer,
                stage=int(stage) - 1 if stage else None,
                computing=(forward + backward) / whole,
                waiting_before=before / whole,
                waiting_after=after / whole,
                summing=summing / whole,
                memory_bytes=int(memory),
            )
        )
    return found


def summary(timelines: Sequence[Timeline]) -> list[str]:
    """Return for each peer how much of the step it computed and for whom it waited, in a line."""
    return [activity.said() for activity in activities([timeline.numbers() for timeline in timelines])]
