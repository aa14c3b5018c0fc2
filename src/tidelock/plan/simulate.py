"""What a pipeline does when: a step under the 1F1B schedule, exactly, event by event.

A step is M micro-batches through all stages and back. Each stage computes one thing at a time, in an order that is
fixed: with K micro-batches in flight, K forwards first, then a backward and a forward in turn, then the backwards that
are left (1F1B: Narayanan et al., PipeDream, SOSP '19; in PAC, arXiv 2408.10746, Figure 6). What one stage sends to the
next takes the link for a time, then travels; links carry both ways at once, each in order, and computing goes on
meanwhile. After its last backward a stage sums its gradients over its devices.

All orders are fixed, so each event begins when the last one that it waits for has ended: no time gets later when
another one gets shorter. `search.py` builds its bounds on that.

May import nothing of tidelock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

if TYPE_CHECKING:
    from collections.abc import Sequence

Work = Literal["forward", "backward", "all-reduce", "send-forward", "send-backward"]


@final
@dataclass(frozen=True, slots=True)
class StageTimes:
    """What one stage takes, in seconds.

    Attributes:
        forward: One micro-batch's forward.
        backward: Its backward.
        in_flight: Most micro-batches whose forward has begun and whose backward has not ended; at least 1, and not
            less than that of the next stage.
        all_reduce: Summing the gradients, once a step.
        send_forward: How long one micro-batch takes the link to the next stage; 0 for the last stage.
        send_backward: Likewise the link from the next stage back to this one.
        latency: From the end of a sending to its arrival, either way.
    """

    forward: float
    backward: float
    in_flight: int
    all_reduce: float = 0.0
    send_forward: float = 0.0
    send_backward: float = 0.0
    latency: float = 0.0


@final
@dataclass(frozen=True, slots=True)
class Interval:
    """One bar of a Gantt chart.

    Attributes:
        stage: Which stage computes, or sends.
        work: What it does.
        micro_batch: Which one; None for an AllReduce.
        begin: Seconds since the step began.
        end: Likewise.
    """

    stage: int
    work: Work
    micro_batch: int | None
    begin: float
    end: float


@final
@dataclass(frozen=True, slots=True)
class Ends:
    """When what ends, in seconds since the step began; `[stage][micro-batch]`, or `[stage]`.

    Attributes:
        forward: Computing forward.
        backward: Computing backward.
        sent_forward: The stage's link to the next one is free again; empty for the last stage.
        sent_backward: The stage's link to the one before is free again; empty for the first stage.
        all_reduce: The stage has summed its gradients.
    """

    forward: list[list[float]]
    backward: list[list[float]]
    sent_forward: list[list[float]]
    sent_backward: list[list[float]]
    all_reduce: list[float]

    @property
    def seconds(self) -> float:
        """How long the step takes."""
        return max(self.all_reduce)


def simulate(stages: Sequence[StageTimes], micro_batches: int) -> Ends:
    """Return when everything in a step ends.

    Args:
        stages: First to last.
        micro_batches: M, at least 1.
    """
    step = _Step(stages)
    in_flight = [min(stage.in_flight, micro_batches) for stage in stages]
    backwards = range(len(stages) - 1, -1, -1)
    # A stage has at least as many micro-batches in flight as the next one. So when forward `number` is due at a stage,
    # the backward that has to precede it there waits only for events of lower numbers, or of later stages.
    for number in range(micro_batches):
        for index in backwards:
            if number >= in_flight[index]:
                step.backward(index, number - in_flight[index])
        step.forward()
    for number in range(micro_batches):
        for index in backwards:
            if number >= micro_batches - in_flight[index]:
                step.backward(index, number)
    return step.end()


@final
class _Step:
    """Takes events in, in an order in which each comes after those that it waits for."""

    def __init__(self, stages: Sequence[StageTimes]) -> None:
        self._stages = stages
        self._free = [0.0] * len(stages)
        self._arrived = _empty(len(stages))
        count = len(stages)
        self._ends = Ends(_empty(count), _empty(count), _empty(count), _empty(count), [])

    def forward(self) -> None:
        """Take in the next micro-batch's forward in all stages."""
        ends, last, arrival = self._ends, len(self._stages) - 1, 0.0
        for index, stage in enumerate(self._stages):
            end = self._free[index] = max(self._free[index], arrival) + stage.forward
            ends.forward[index].append(end)
            if index < last:
                sent = _sent(ends.sent_forward[index], end, stage.send_forward)
                arrival = sent + stage.latency

    def backward(self, index: int, number: int) -> None:
        """Take in a micro-batch's backward in one stage."""
        ends = self._ends
        arrival = self._arrived[index][number] if index + 1 < len(self._stages) else 0.0
        end = self._free[index] = max(self._free[index], arrival) + self._stages[index].backward
        ends.backward[index].append(end)
        if index:
            before = self._stages[index - 1]
            sent = _sent(ends.sent_backward[index], end, before.send_backward)
            self._arrived[index - 1].append(sent + before.latency)

    def end(self) -> Ends:
        """Take in the sums of gradients."""
        self._ends.all_reduce.extend(
            end + stage.all_reduce for end, stage in zip(self._free, self._stages, strict=True)
        )
        return self._ends


def _empty(stages: int) -> list[list[float]]:
    return [[] for _ in range(stages)]


def _sent(link: list[float], ready: float, takes: float) -> float:
    """Return when a message has left a link, which sends in order; it is taken in."""
    end = (max(ready, link[-1]) if link else ready) + takes
    link.append(end)
    return end


def gantt(stages: Sequence[StageTimes], micro_batches: int) -> list[Interval]:
    """Return all intervals of a step, for a chart: by stage, and in each by their beginning."""
    ends = simulate(stages, micro_batches)
    found: list[Interval] = []
    for index, stage in enumerate(stages):
        before = stages[index - 1].send_backward if index else 0.0
        rows: list[tuple[Work, list[float], float]] = [
            ("forward", ends.forward[index], stage.forward),
            ("backward", ends.backward[index], stage.backward),
            ("send-forward", ends.sent_forward[index], stage.send_forward),
            ("send-backward", ends.sent_backward[index], before),
        ]
        bars = [
            Interval(index, work, number, end - taken, end)
            for work, row, taken in rows
            for number, end in enumerate(row)
        ]
        if stage.all_reduce:
            end = ends.all_reduce[index]
            bars.append(Interval(index, "all-reduce", None, end - stage.all_reduce, end))
        found += sorted(bars, key=lambda bar: (bar.begin, bar.end))
    return found
