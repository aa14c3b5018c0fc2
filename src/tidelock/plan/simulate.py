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
from typing import Literal, final

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


def simulate(stages: list[StageTimes], micro_batches: int) -> Ends:
    """Return when everything in a step ends.

    Args:
        stages: First to last.
        micro_batches: M, at least 1.
    """
    count, last = len(stages), len(stages) - 1
    in_flight = [min(stage.in_flight, micro_batches) for stage in stages]
    free = [0.0] * count
    ends = Ends(*([[] for _ in stages] for _ in range(4)), all_reduce=[])
    arrived_backward: list[list[float]] = [[] for _ in stages]

    def run_forward() -> None:
        arrival = 0.0
        for index, stage in enumerate(stages):
            free[index] = max(free[index], arrival) + stage.forward
            ends.forward[index].append(free[index])
            if index < last:
                sent = ends.sent_forward[index]
                link = max(free[index], sent[-1] if sent else 0.0) + stage.send_forward
                sent.append(link)
                arrival = link + stage.latency

    def run_backward(index: int, number: int) -> None:
        arrival = arrived_backward[index][number] if index < last else 0.0
        free[index] = max(free[index], arrival) + stages[index].backward
        ends.backward[index].append(free[index])
        if index:
            before, sent = stages[index - 1], ends.sent_backward[index]
            link = max(free[index], sent[-1] if sent else 0.0) + before.send_backward
            sent.append(link)
            arrived_backward[index - 1].append(link + before.latency)

    # A stage has at least as many micro-batches in flight as the next one. So when forward `number` is due at a stage,
    # the backward that has to precede it there waits only for events of lower numbers, or of later stages.
    for number in range(micro_batches):
        for index in range(last, -1, -1):
            if number >= in_flight[index]:
                run_backward(index, number - in_flight[index])
        run_forward()
    for number in range(micro_batches):
        for index in range(last, -1, -1):
            if number >= micro_batches - in_flight[index]:
                run_backward(index, number)
    ends.all_reduce.extend(end + stage.all_reduce for end, stage in zip(free, stages, strict=True))
    return ends


def gantt(stages: list[StageTimes], micro_batches: int) -> list[Interval]:
    """Return all intervals of a step, for a chart: by stage, and in each by their beginning."""
    ends, found = simulate(stages, micro_batches), []
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
