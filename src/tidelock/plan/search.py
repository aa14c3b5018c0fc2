"""Finds the layout that the simulator finds quickest.

What is guaranteed. A layout is: consecutive blocks in stages, each on devices of its own (some may be left out), whole
rows of a micro-batch for each device, and how many micro-batches are in flight. `search` returns one whose memory
fits, by the cost model of `cost.py`. When it says that the search was complete, no layout of the same shape takes less
time in the simulator, whatever the order of the devices, and when it then found none, there is none. Otherwise it is
the best of those that were looked at; the pool was too large or too mixed to look at all.

How. First candidates: the dynamic programme of `partition.py` in a few orders of the devices, and from the best of them
small changes as long as they help (`climb.py`). Then, from the last stage to the first, every layout whose lower bound
is less than the best so far (branch and bound). The bound holds because no event in a schedule gets later when a time
gets shorter:

- The stages that are placed take what the simulator says when their inputs are there at once; later inputs delay it.
- Before and after, blocks that are not placed need at least a forward and a backward on all devices that are left. For
  shares l_d >= 0 of the devices that sum to 1, max_d c_d >= sum_d l_d c_d. So r rows of some blocks take, on any group,
  at least r times the sum over the blocks of the least l_d c_d, where c_d is a device's least time of a row.
- Likewise all devices that are left need at least that for all micro-batches.

Devices that are alike in all their numbers are tried in one order only.

May import `plan`.
"""

from __future__ import annotations

from itertools import accumulate, product
from typing import TYPE_CHECKING, NamedTuple, final

from tidelock.plan.climb import Climber, Found, aheads, look
from tidelock.plan.cost import AHEAD
from tidelock.plan.partition import Shape, orders, outlines
from tidelock.plan.simulate import simulate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tidelock.plan.cost import Costs, Layout, Stage

# Of branch and bound: groups of devices that can be told apart, and devices in all stages that are tried.
_MOST_GROUPS = 64
_MOST_LOOKS = 40_000


class Result(NamedTuple):
    """What a search found.

    Attributes:
        layouts: The quickest first, each with another grouping of devices; empty when nothing was found that fits.
        complete: Whether no layout of the shape is quicker than the first.
    """

    layouts: list[Layout]
    complete: bool


def search(costs: Costs, shape: Shape) -> Result:
    """Return the best layouts of a shape; see above for what is guaranteed."""
    found = Found(costs)
    _first_candidates(found, shape)
    Climber(found, shape).run()
    complete = _BranchAndBound(found, shape).run()
    return Result(found.ranked(), complete)


def _first_candidates(found: Found, shape: Shape) -> None:
    costs = found.costs
    for order in orders(costs):
        for least, outline in outlines(costs, order, shape):
            if least * costs.micro_batches > found.seconds:
                break
            for ahead in aheads(costs, len(outline.cuts)):
                look(found, outline, ahead)


@final
class _BranchAndBound:
    """Looks at every layout that could be better than the best one found."""

    def __init__(self, found: Found, shape: Shape) -> None:
        self._found = found
        self._costs = found.costs
        self._shape = shape
        members: dict[int, list[int]] = {}
        for device, kind in enumerate(found.kinds):
            members.setdefault(kind, []).append(device)
        self._members = list(members.values())
        self._bounds: dict[tuple[int, ...], _Bounds] = {}
        self._looks = 0

    def run(self) -> bool:
        """Return whether everything was looked at."""
        counts = tuple(len(members) for members in self._members)
        groups = 1
        for count in counts:
            groups *= count + 1
        if groups > _MOST_GROUPS:
            return False
        return all(self._extend((), counts, ahead) for ahead in aheads(self._costs, 2))

    def _extend(self, behind: tuple[Stage, ...], left: tuple[int, ...], ahead: int) -> bool:
        """Put a stage before these, in all ways that could be better; return whether all of them were looked at."""
        end = behind[0].first if behind else self._costs.blocks
        ways: list[tuple[float, tuple[Stage, ...], tuple[int, ...]]] = []
        for taken in product(*(range(count + 1) for count in left)):
            if not 0 < sum(taken) <= self._shape.max_group:
                continue
            still = tuple(count - some for count, some in zip(left, taken, strict=True))
            for stages in self._stages(behind, self._group(left, taken), end, ahead):
                bound = self._bound(stages, still, ahead)
                if bound < self._found.seconds and stages[0].first:
                    ways.append((bound, stages, still))
            if self._looks > _MOST_LOOKS:
                return False
        ways.sort(key=lambda way: way[0])
        return all(bound >= self._found.seconds or self._extend(stages, still, ahead) for bound, stages, still in ways)

    def _group(self, left: tuple[int, ...], taken: tuple[int, ...]) -> tuple[int, ...]:
        """Return the devices that are taken: of each kind the first that are left."""
        return tuple(
            sorted(
                device
                for members, count, some in zip(self._members, left, taken, strict=True)
                for device in members[len(members) - count :][:some]
            )
        )

    def _stages(
        self, behind: tuple[Stage, ...], group: tuple[int, ...], end: int, ahead: int
    ) -> Iterator[tuple[Stage, ...]]:
        """Yield the stages with one more in front, for each of its first blocks and shares."""
        lowest = 0 if len(behind) + 1 < self._shape.max_stages else 1
        for first in range(end - 1, -1, -1) if not lowest else (0,):
            if not behind and not first and ahead != AHEAD[0]:
                continue  # one stage has one in flight, whatever `ahead`
            self._looks += len(group)
            options = self._costs.stages((first, end), group, len(behind), ahead)
            if not options and self._costs.fixed_bytes(first, end) > max(self._costs.memory[d] for d in group):
                return  # more blocks need more
            for option in options:
                yield (option, *behind)

    def _bound(self, stages: tuple[Stage, ...], left: tuple[int, ...], ahead: int) -> float:
        """Return a time that no layout with these last stages undercuts; of a whole one its time, which is taken in."""
        costs, here = self._costs, stages[0]
        bounds = self._bounds_of(left) if here.first else _NOTHING
        if here.first and (not any(left) or costs.fixed_bytes(0, here.first) > bounds.memory):
            return float("inf")
        before, after = bounds.forward[here.first], bounds.backward[here.first]
        busy = before + costs.micro_batches * (here.forward + here.backward) + after
        work = costs.micro_batches * bounds.both[here.first]
        if max(busy, work) >= self._found.seconds:
            return float("inf")
        ends = simulate(costs.times(stages, ahead), costs.micro_batches)
        if not here.first:
            self._found.add(stages, ahead, ends.seconds)
        return max(before + ends.seconds, before + ends.backward[0][-1] + after, work)

    def _bounds_of(self, left: tuple[int, ...]) -> _Bounds:
        if left not in self._bounds:
            devices = self._group(left, left)
            self._bounds[left] = _bounds(self._costs, devices) if devices else _NOTHING
        return self._bounds[left]


class _Bounds(NamedTuple):
    """What the blocks before block i take at least, for one micro-batch on some devices; `[i]`, in seconds.

    Attributes:
        forward: On any group of the devices.
        backward: Likewise.
        both: Of all devices together, forward and backward.
        memory: Of all devices together, in bytes.
    """

    forward: Sequence[float]
    backward: Sequence[float]
    both: Sequence[float]
    memory: int


_NOTHING = _Bounds((0.0,), (0.0,), (0.0,), 0)


def _bounds(costs: Costs, devices: tuple[int, ...]) -> _Bounds:
    forward = [_least_per_row(costs.forward[device], costs) for device in devices]
    backward = [_least_per_row(costs.backward[device], costs) for device in devices]
    both = [[f + b for f, b in zip(*lines, strict=True)] for lines in zip(forward, backward, strict=True)]
    memory = sum(costs.memory[device] for device in devices)
    return _Bounds(_shared(forward, costs.rows), _shared(backward, costs.rows), _shared(both, costs.rows), memory)


def _least_per_row(sums: Sequence[Sequence[float]], costs: Costs) -> list[float]:
    """Return each block's least time of a row, over all sizes of a micro-batch."""
    return [
        min((sums[rows][block + 1] - sums[rows][block]) / rows for rows in range(1, costs.rows + 1))
        for block in range(costs.blocks)
    ]


def _shared(times: Sequence[Sequence[float]], rows: int) -> list[float]:
    """Return `bound[i]`: rows times the sum over blocks before block i of the least of share times time.

    Shares are in proportion to speed, which makes the bound exact for devices that differ by a factor only.
    """
    speeds = [1 / max(sum(line), 1e-12) for line in times]
    shares = [speed / sum(speeds) for speed in speeds]
    least = (
        rows * min(share * line[block] for share, line in zip(shares, times, strict=True))
        for block in range(len(times[0]))
    )
    return list(accumulate(least, initial=0.0))
