"""What each peer did when, in one step of the pipeline: to be seen beside what was planned.

May import `units` and libraries.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias, final

from tidelock.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# "wait-forward" is for what the stage before sends, "wait-backward" for what the next one does; "all-reduce" sums over
# the peers of the stage, waiting for them included.
Doing: TypeAlias = Literal["forward", "backward", "wait-forward", "wait-backward", "all-reduce"]


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


def summary(timelines: Sequence[Timeline]) -> list[str]:
    """Return for each peer how much of the step it computed and for whom it waited, in a line."""
    whole = max((bar.end for timeline in timelines for bar in timeline.bars), default=0.0)
    return [_summary(timeline, whole) for timeline in timelines]


def _summary(timeline: Timeline, whole: float) -> str:
    memory = f"{format_bytes(timeline.memory_bytes)} of memory"
    if timeline.stage is None or not whole:
        return f"Peer {timeline.peer}, without blocks: {memory}."
    spent: defaultdict[str, float] = defaultdict(float)
    for bar in timeline.bars:
        spent[bar.work] += bar.end - bar.begin
    said = [f"computing {(spent['forward'] + spent['backward']) / whole:.0%}"]
    for work, what in (
        ("wait-forward", f"waiting for stage {timeline.stage}"),
        ("wait-backward", f"waiting for stage {timeline.stage + 2}"),
        ("all-reduce", "summing gradients"),
    ):
        if spent[work]:
            said.append(f"{what} {spent[work] / whole:.0%}")
    idle = whole - sum(spent.values())
    return f"Peer {timeline.peer}, stage {timeline.stage + 1}: {', '.join(said)}, idle {idle / whole:.0%}; {memory}."
