"""What a stage takes: seconds, bytes of memory, bytes on the links.

The cost model is PAC's (arXiv 2408.10746, section 4.2), with what it leaves out:

- Memory counts the micro-batches in flight: a stage with n stages behind it keeps 1 + ahead * n of them, where `ahead`
  is 1 (the classic 1F1B) or 2 (one more for each transfer, which hides it; PAC's Figure 6 shows that one).
- Memory counts messages: each boundary may hold, each way, as many as the stage before it has in flight.
- Forward and backward messages have sizes of their own. A transfer is the whole micro-batch over the slowest link
  between two groups, as if they shared one medium.
- The rows of a micro-batch are shared in proportion to what each device can do (`shares.py`).
- A ring AllReduce moves 2 (n - 1) / n of a stage's gradients over the slowest link in the group, in 2 (n - 1) turns.

A device's time for sizes between measured ones is a straight line between them; below the smallest it is that of the
smallest, above the largest it goes on in proportion. It is never taken to be less than for fewer rows.

May import `plan`.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate, combinations, product
from typing import TYPE_CHECKING, final

from tidelock.plan.shares import share_rows
from tidelock.plan.simulate import StageTimes, simulate

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tidelock.plan.inputs import Block, Device, Profile

AHEAD = (1, 2)


@final
@dataclass(frozen=True, slots=True)
class Stage:
    """Blocks `first` to `end - 1` on a group of devices.

    Attributes:
        first: Number of the first block.
        end: Number of the block after the last one.
        group: Numbers of the devices, ascending.
        shares: Rows of a micro-batch for each of them, at least 1.
        forward: Seconds of a micro-batch's forward: of the slowest device.
        backward: Likewise of its backward.
    """

    first: int
    end: int
    group: tuple[int, ...]
    shares: tuple[int, ...]
    forward: float
    backward: float


@final
class Costs:
    """What stages of a profile take, for one size of micro-batch.

    Args:
        profile: The pool and the model.
        rows: Of a micro-batch, together.
        micro_batches: In a step.

    Attributes:
        memory: Bytes of each device.
        forward: `forward[device][rows][i]`: seconds of the blocks before block i, one micro-batch.
        backward: Likewise.
        both: Their sum.
        links: Between two devices, by their numbers.
    """

    def __init__(self, profile: Profile, rows: int, micro_batches: int) -> None:
        self.profile = profile
        self.rows = rows
        self.micro_batches = micro_batches
        self.blocks = len(profile.blocks)
        self.devices = len(profile.devices)
        self.memory = [device.memory_bytes for device in profile.devices]
        self.forward = [_prefix_sums(device, rows, forward=True) for device in profile.devices]
        self.backward = [_prefix_sums(device, rows, forward=False) for device in profile.devices]
        self.both = [
            [[f + b for f, b in zip(*lines, strict=True)] for lines in zip(*sums, strict=True)]
            for sums in zip(self.forward, self.backward, strict=True)
        ]
        self._gradients = _sums(block.gradient_bytes for block in profile.blocks)
        self._fixed = _sums(b.parameter_bytes + b.gradient_bytes + b.optimizer_bytes for b in profile.blocks)
        self._kept = _sums(block.kept_bytes_per_row for block in profile.blocks)
        self._working = _range_maxima(profile.blocks)
        # At boundary i, which is before block i: what crosses each way, in bytes a row; nothing at the ends.
        self._boundary = [(0, 0)] + [(b.forward_bytes_per_row, b.backward_bytes_per_row) for b in profile.blocks]
        self._boundary[-1] = (0, 0)
        self.links = [[profile.link(one, other) for other in range(self.devices)] for one in range(self.devices)]
        self._slowest: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[float, float]] = {}
        self._stages: dict[tuple[int, int, int, tuple[int, ...]], tuple[Stage, ...]] = {}

    def in_flight(self, behind: int, ahead: int) -> int:
        """Return how many micro-batches a stage with so many stages behind it has in flight."""
        return min(self.micro_batches, 1 + ahead * behind)

    def fixed_bytes(self, first: int, end: int) -> int:
        """Return the bytes of blocks `first` to `end - 1` whatever the rows: weights, gradients, the optimizer's."""
        return self._fixed[end] - self._fixed[first]

    def bytes_per_row(self, first: int, end: int, behind: int, ahead: int) -> int:
        """Return the bytes that each row of a micro-batch takes on a device that holds these blocks."""
        here, before = self.in_flight(behind, ahead), self.in_flight(behind + 1, ahead)
        kept = here * (self._kept[end] - self._kept[first])
        messages = before * sum(self._boundary[first]) + here * sum(self._boundary[end])
        return kept + self._working[first][end - first] + messages

    def memory_bytes(self, stage: Stage, behind: int, ahead: int) -> list[int]:
        """Return what each device of a stage needs."""
        per_row = self.bytes_per_row(stage.first, stage.end, behind, ahead)
        fixed = self.fixed_bytes(stage.first, stage.end)
        return [fixed + rows * per_row for rows in stage.shares]

    def room(self, device: int, fixed: int, per_row: int) -> int:
        """Return how many rows of a micro-batch fit into a device's memory, by `fixed_bytes` and `bytes_per_row`."""
        left = self.memory[device] - fixed
        if left < 0:
            return 0
        return min(self.rows, left // per_row) if per_row else self.rows

    def stages(self, blocks: tuple[int, int], group: tuple[int, ...], behind: int, ahead: int) -> tuple[Stage, ...]:
        """Return the stages that are worth a look: of any other one, one of these is as quick both ways.

        Empty when the group has no memory for the blocks, or fewer rows than devices.

        Args:
            blocks: First, and the one after the last.
            group: Devices, ascending.
            behind: Stages behind this one.
            ahead: See above.
        """
        fixed, per_row = self.fixed_bytes(*blocks), self.bytes_per_row(*blocks, behind, ahead)
        key = (*blocks, per_row, group)
        if key not in self._stages:
            room = [self.room(device, fixed, per_row) for device in group]
            forward = [self.seconds(self.forward[device], blocks) for device in group]
            backward = [self.seconds(self.backward[device], blocks) for device in group]
            options = share_rows(forward, backward, room, self.rows)
            self._stages[key] = tuple(
                Stage(*blocks, group, option.rows, option.forward, option.backward) for option in options
            )
        return self._stages[key]

    def seconds(self, sums: Sequence[Sequence[float]], blocks: tuple[int, int]) -> list[float]:
        """Return a device's seconds for blocks (first, end) by rows, from 0 to all of them; never falling."""
        first, end = blocks
        # Differences of sums may fall by a rounding.
        return list(accumulate((line[end] - line[first] for line in sums), max))

    def slowest_link(self, group: tuple[int, ...], others: tuple[int, ...]) -> tuple[float, float]:
        """Return the lowest bytes per second and the longest latency of the links between two groups, or within one."""
        key = (group, others)
        if key not in self._slowest:
            pairs = combinations(group, 2) if group == others else product(group, others)
            links = [self.links[one][other] for one, other in pairs]
            speed = min(link.bytes_per_second for link in links)
            self._slowest[key] = speed, max(link.latency_seconds for link in links)
        return self._slowest[key]

    def all_reduce_seconds(self, stage: Stage) -> float:
        """Return how long summing a stage's gradients over its group takes."""
        size, count = self.gradient_bytes(stage), len(stage.group)
        if count == 1 or not size:
            return 0.0
        speed, latency = self.slowest_link(stage.group, stage.group)
        turns = 2 * (count - 1)
        return turns / count * size / speed + turns * latency

    def gradient_bytes(self, stage: Stage) -> int:
        """Return the bytes of the gradients of a stage's trained weights."""
        return self._gradients[stage.end] - self._gradients[stage.first]

    def boundary_bytes(self, boundary: int) -> tuple[int, int]:
        """Return what one micro-batch sends over the boundary before a block: forward, and back."""
        forward, backward = self._boundary[boundary]
        return self.rows * forward, self.rows * backward

    def times(self, stages: Sequence[Stage], ahead: int) -> list[StageTimes]:
        """Return what the simulator needs of stages, which are the last ones of a pipeline or all of it."""
        found = []
        for index, stage in enumerate(stages):
            speed, latency, sizes = 1.0, 0.0, (0, 0)
            if index + 1 < len(stages):
                speed, latency = self.slowest_link(stage.group, stages[index + 1].group)
                sizes = self.boundary_bytes(stage.end)
            found.append(
                StageTimes(
                    stage.forward,
                    stage.backward,
                    self.in_flight(len(stages) - 1 - index, ahead),
                    self.all_reduce_seconds(stage),
                    sizes[0] / speed,
                    sizes[1] / speed,
                    latency,
                )
            )
        return found

    def step_seconds(self, stages: Sequence[Stage], ahead: int) -> float:
        """Return how long a step through these stages takes, by the simulator."""
        return simulate(self.times(stages, ahead), self.micro_batches).seconds


def _sums(values: Iterable[int]) -> list[int]:
    return list(accumulate(values, initial=0))


def _prefix_sums(device: Device, rows: int, *, forward: bool) -> list[list[float]]:
    """Return `sums[r][i]`: the seconds of the blocks before block i for r rows; r from 0 to `rows`."""
    table = device.forward_seconds if forward else device.backward_seconds
    lines, best = [[0.0] * len(table[0])], [0.0] * len(table[0])
    for count in range(1, rows + 1):
        best = [max(low, seconds) for low, seconds in zip(best, _interpolated(device.rows, table, count), strict=True)]
        lines.append(best)
    return [list(accumulate(line, initial=0.0)) for line in lines]


def _interpolated(measured: tuple[int, ...], table: Sequence[Sequence[float]], rows: int) -> list[float]:
    """Return each block's seconds for a number of rows."""
    at = bisect_left(measured, rows)
    if at == len(measured):
        return [seconds * rows / measured[-1] for seconds in table[-1]]
    if at == 0:
        return list(table[0])
    share = (rows - measured[at - 1]) / (measured[at] - measured[at - 1])
    return [low + share * (high - low) for low, high in zip(table[at - 1], table[at], strict=True)]


def _range_maxima(blocks: Sequence[Block]) -> list[list[int]]:
    """Return `maxima[i][n]`: the most working bytes a row of any of the n blocks from block i on."""
    working = [block.working_bytes_per_row for block in blocks]
    return [list(accumulate(working[first:], max, initial=0)) for first in range(len(working))]


@final
@dataclass(frozen=True, slots=True)
class Layout:
    """Stages for all blocks, and how long a step through them takes.

    Attributes:
        stages: First to last.
        ahead: Micro-batches that a stage has in flight for each stage behind it, beyond the first one.
        seconds: Of a step, by the simulator.
    """

    stages: tuple[Stage, ...]
    ahead: int
    seconds: float
