"""Finds the layout that the simulator finds quickest.

What is guaranteed. A layout is: consecutive blocks in stages, each on devices of its own (some may be left out), whole
rows of a micro-batch for each device, and how many micro-batches are in flight. `search` returns one whose memory
fits, by the cost model of `cost.py`. When it says that the search was complete, no layout of the same shape takes less
time in the simulator, whatever the order of the devices, and when it then found none, there is none. Otherwise it is
the best of those that were looked at; the pool was too large or too mixed to look at all.

How. First candidates: the dynamic programme of `partition.py` in a few orders of the devices, and from the best of them
small changes as long as they help. Then, from the last stage to the first, every layout whose lower bound is less than
the best so far (branch and bound). The bound holds because no event in a schedule gets later when a time gets shorter:

- The stages that are placed take what the simulator says when their inputs are there at once; later inputs delay it.
- Before and after, blocks that are not placed need at least a forward and a backward on all devices that are left. For
  shares l_d >= 0 of the devices that sum to 1, max_d c_d >= sum_d l_d c_d. So r rows of some blocks take, on any group,
  at least r times the sum over the blocks of the least l_d c_d, where c_d is a device's least time of a row.
- Likewise all devices that are left need at least that for all micro-batches.

Devices that are alike in all their numbers are tried in one order only.

May import `plan`.
"""

from __future__ import annotations

import random
from itertools import accumulate, product
from typing import TYPE_CHECKING, NamedTuple, final

from tidelock.plan.cost import AHEAD, Layout
from tidelock.plan.partition import Outline, Shape, alike, balanced, orders, outlines, place
from tidelock.plan.simulate import simulate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tidelock.plan.cost import Costs, Stage

# How many layouts are changed for the better, how often the best one is changed at random first, and how much may be
# done for all that: micro-batches followed through a stage, and blocks given to one.
_CLIMBS = 3
_JUMPS = 100
_CLIMB_WORK = 30_000
# A change that takes so much longer may still become better when cuts are moved.
_NEAR = 1.1
# Of branch and bound: groups of devices that can be told apart, and devices in all stages
# that are put in front of others.
_MOST_GROUPS = 64
_MOST_LOOKS = 40_000


@final
class Found:
    """The best layouts so far: one for each way to group the devices.

    Args:
        costs: What stages take.
    """

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.kinds = alike(costs)
        self._layouts: dict[tuple[tuple[int, ...], ...], Layout] = {}
        self.seconds = float("inf")

    def add(self, stages: Sequence[Stage], ahead: int, seconds: float) -> Layout:
        """Take a whole layout in, and return it."""
        layout = Layout(tuple(stages), ahead, seconds)
        groups = tuple(tuple(sorted(self.kinds[device] for device in stage.group)) for stage in stages)
        before = self._layouts.get(groups)
        if before is None or seconds < before.seconds:
            self._layouts[groups] = layout
            self.seconds = min(self.seconds, seconds)
        return layout

    def ranked(self) -> list[Layout]:
        """Return the layouts, the quickest first; of equal ones that with fewer stages, then fewer devices."""
        return sorted(self._layouts.values(), key=_rank)

    def best(self) -> Layout | None:
        """Return the first of `ranked`."""
        return min(self._layouts.values(), key=_rank, default=None)


def _rank(layout: Layout) -> tuple[float, int, int, int]:
    devices = sum(len(stage.group) for stage in layout.stages)
    return layout.seconds, len(layout.stages), devices, layout.ahead


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
    _Climber(found, shape).run()
    complete = _BranchAndBound(found, shape).run()
    return Result(found.ranked(), complete)


def _first_candidates(found: Found, shape: Shape) -> None:
    costs = found.costs
    for order in orders(costs):
        for least, outline in outlines(costs, order, shape):
            if least * costs.micro_batches > found.seconds:
                break
            for ahead in _aheads(costs, len(outline.cuts)):
                look(found, outline, ahead)


def _aheads(costs: Costs, stages: int) -> tuple[int, ...]:
    return AHEAD[:1] if stages == 1 or costs.micro_batches == 1 else AHEAD


def look(found: Found, outline: Outline, ahead: int) -> Layout | None:
    """Return an outline's layout, which is taken in; None when it does not fit."""
    stages = place(found.costs, outline, ahead)
    return None if stages is None else found.add(stages, ahead, found.costs.step_seconds(stages, ahead))


@final
class _Climber:
    """Changes a layout a little as long as the step gets shorter: first who is with whom, then the cuts."""

    def __init__(self, found: Found, shape: Shape) -> None:
        self._found = found
        self._costs = found.costs
        self._shape = shape
        self._seen: set[tuple[tuple[int, ...], ...]] = set()
        self._work = 0

    def run(self) -> None:
        """Climb from the best layouts; then, again and again, from the best one with some devices elsewhere."""
        for layout in self._found.ranked()[:_CLIMBS]:
            self._climb(layout)
        draw = random.Random(0)  # noqa: S311  (no secret; the same plan every time)
        for _ in range(_JUMPS):
            groups = self._jump(draw)
            limit = self._found.seconds * _NEAR / self._costs.micro_batches
            start = self._look(groups, limit, float("inf"))
            if start is not None:
                self._climb(start)

    def _jump(self, draw: random.Random) -> tuple[tuple[int, ...], ...]:
        """Return the groups of the best layout with some devices elsewhere; while there is none, any groups."""
        best = self._found.best()
        if best is None:
            order = draw.sample(range(self._costs.devices), self._costs.devices)
            ends = sorted(draw.sample(range(1, len(order)), draw.randint(0, len(order) - 1)))
            return tuple(tuple(sorted(order[i:j])) for i, j in zip([0, *ends], [*ends, len(order)], strict=True))
        at = {device: float(index) for index, stage in enumerate(best.stages) for device in stage.group}
        for _ in range(draw.randint(2, 4)):
            one, other = (draw.randrange(self._costs.devices) for _ in range(2))
            there = draw.choice([at.get(other), draw.randrange(2 * len(best.stages) + 1) / 2 - 0.5])
            at = {device: to for device, to in {**at, one: there}.items() if to is not None}
        return _placed(at, {})

    def _climb(self, layout: Layout) -> None:
        layout, moved = self._shift_cuts(layout), True
        while moved:
            groups, moved = tuple(stage.group for stage in layout.stages), False
            limit = layout.seconds / self._costs.micro_batches
            for changed in _regrouped(groups, self._costs.devices):
                better = self._look(changed, limit, layout.seconds)
                if better is not None:
                    layout, moved = better, True
                    break

    def _look(self, groups: tuple[tuple[int, ...], ...], limit: float, best: float) -> Layout | None:
        """Return the layout with these groups and balanced stages when it takes less than `best`."""
        if (
            not groups
            or groups in self._seen
            or self._work > _CLIMB_WORK
            or len(groups) > min(self._shape.max_stages, self._costs.blocks)
            or max(len(group) for group in groups) > self._shape.max_group
        ):
            return None
        self._seen.add(groups)
        self._work += len(groups) * self._costs.micro_batches + self._costs.blocks
        way = balanced(self._costs, groups, limit)
        if way is None:
            return None
        looks = (look(self._found, way[1], ahead) for ahead in _aheads(self._costs, len(groups)))
        near = min((one for one in looks if one), key=lambda one: one.seconds, default=None)
        if near is None or near.seconds > best * _NEAR:
            return None
        layout = self._shift_cuts(near)
        return layout if layout.seconds < best else None

    def _shift_cuts(self, layout: Layout) -> Layout:
        moved = True
        while moved:
            outline, moved = _outline_of(layout), False
            for changed in _moved_cuts(outline, self._costs.blocks):
                self._work += len(outline.cuts) * self._costs.micro_batches
                other = look(self._found, changed, layout.ahead)
                if other is not None and other.seconds < layout.seconds:
                    layout, moved = other, True
                    break
        return layout


def _outline_of(layout: Layout) -> Outline:
    return Outline(tuple(stage.first for stage in layout.stages), tuple(stage.group for stage in layout.stages))


def _moved_cuts(outline: Outline, blocks: int) -> Iterator[Outline]:
    """Yield outlines with one block on the other side of a cut."""
    bounds = (*outline.cuts, blocks)
    for index in range(1, len(outline.cuts)):
        for cut in (bounds[index] - 1, bounds[index] + 1):
            if bounds[index - 1] < cut < bounds[index + 1]:
                yield outline._replace(cuts=(*outline.cuts[:index], cut, *outline.cuts[index + 1 :]))


def _regrouped(groups: tuple[tuple[int, ...], ...], devices: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Yield groups with one device elsewhere, alone or in none, or two exchanged, or two neighbours made one."""
    at = {device: float(index) for index, group in enumerate(groups) for device in group}
    stages = range(len(groups))
    for device in range(devices):
        here = at.get(device)
        for there in (*stages, *(index - 0.5 for index in (*stages, len(groups))), None):
            if there != here:
                yield _placed(at, {device: there})
        for other in range(device):
            if at.get(other) != here:
                yield _placed(at, {device: at.get(other), other: here})
    for index in stages[1:]:
        yield _placed(at, dict.fromkeys(groups[index], index - 1.0))
        yield _placed(at, dict.fromkeys(groups[index], index - 1.0) | dict.fromkeys(groups[index - 1], float(index)))


def _placed(at: Mapping[int, float], changes: Mapping[int, float | None]) -> tuple[tuple[int, ...], ...]:
    """Return the groups of devices with the same number, by their numbers; those with none are left out."""
    groups: dict[float, list[int]] = {}
    for device, there in sorted({**at, **changes}.items()):
        if there is not None:
            groups.setdefault(there, []).append(device)
    return tuple(tuple(group) for _, group in sorted(groups.items()))


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
        return all(self._extend((), counts, ahead) for ahead in _aheads(self._costs, 2))

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
