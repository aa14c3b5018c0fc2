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

from itertools import accumulate, chain, product
from typing import TYPE_CHECKING, NamedTuple, final

from tidelock.plan.cost import AHEAD, Layout
from tidelock.plan.partition import Outline, Shape, alike, orders, outlines, place
from tidelock.plan.simulate import simulate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tidelock.plan.cost import Costs, Stage

# How many layouts are changed for the better, and simulated for that, together.
_CLIMBS = 3
_CLIMB_LOOKS = 500
# Of branch and bound: groups of devices that can be told apart, and simulated layouts.
_MOST_GROUPS = 64
_MOST_NODES = 5_000


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

    def add(self, stages: Sequence[Stage], ahead: int, seconds: float) -> None:
        """Take a whole layout in."""
        groups = tuple(tuple(sorted(self.kinds[device] for device in stage.group)) for stage in stages)
        before = self._layouts.get(groups)
        if before is None or seconds < before.seconds:
            self._layouts[groups] = Layout(tuple(stages), ahead, seconds)
            self.seconds = min(self.seconds, seconds)

    def ranked(self) -> list[Layout]:
        """Return the layouts, the quickest first; of equal ones that with fewer stages, then fewer devices."""
        return sorted(
            self._layouts.values(),
            key=lambda one: (one.seconds, len(one.stages), sum(len(stage.group) for stage in one.stages), one.ahead),
        )


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
    starts = found.ranked()[:_CLIMBS]
    climber = _Climber(found, shape)
    for layout in starts:
        cuts, groups = zip(*((stage.first, stage.group) for stage in layout.stages), strict=True)
        climber.climb(Outline(cuts, groups), layout.ahead)
    complete = _BranchAndBound(found, shape).run()
    return Result(found.ranked(), complete)


def _first_candidates(found: Found, shape: Shape) -> None:
    costs = found.costs
    for order in orders(costs):
        for limit, outline in outlines(costs, order, shape):
            # A stage with this time alone takes longer; without a limit, any layout that fits is welcome.
            if limit < float("inf") and limit / 1.2 * costs.micro_batches > found.seconds:
                break
            for ahead in _aheads(costs, len(outline.cuts)):
                look(found, outline, ahead)


def _aheads(costs: Costs, stages: int) -> tuple[int, ...]:
    return AHEAD[:1] if stages == 1 or costs.micro_batches == 1 else AHEAD


def look(found: Found, outline: Outline, ahead: int) -> float:
    """Return the seconds of an outline's layout, which is taken in; infinite when it does not fit."""
    costs, stages = found.costs, place(found.costs, outline, ahead)
    if stages is None:
        return float("inf")
    seconds = costs.step_seconds(stages, ahead)
    found.add(stages, ahead, seconds)
    return seconds


@final
class _Climber:
    """Changes an outline a little as long as the step gets shorter."""

    def __init__(self, found: Found, shape: Shape) -> None:
        self._found = found
        self._shape = shape
        self._seen: dict[tuple[Outline, int], float] = {}

    def climb(self, outline: Outline, ahead: int) -> None:
        best, looks = self._look(outline, ahead), 0
        moved = True
        while moved and looks < _CLIMB_LOOKS:
            moved = False
            for other, others_ahead in self._changes(outline, ahead):
                looks += 1
                seconds = self._look(other, others_ahead)
                if seconds < best:
                    outline, ahead, best, moved = other, others_ahead, seconds, True
                    break
                if looks >= _CLIMB_LOOKS:
                    break

    def _look(self, outline: Outline, ahead: int) -> float:
        key = (outline, ahead)
        if key not in self._seen:
            self._seen[key] = look(self._found, outline, ahead)
        return self._seen[key]

    def _changes(self, outline: Outline, ahead: int) -> Iterator[tuple[Outline, int]]:
        costs = self._found.costs
        for other in _aheads(costs, len(outline.cuts)):
            if other != ahead:
                yield outline, other
        changes = (_moved_cuts(outline, costs.blocks), _moved_devices(outline, costs.devices), _merged(outline))
        for changed in chain(*changes):
            if all(0 < len(group) <= self._shape.max_group for group in changed.groups):
                yield changed, ahead if len(changed.cuts) > 1 else AHEAD[0]


def _moved_cuts(outline: Outline, blocks: int) -> Iterator[Outline]:
    """Yield outlines with one block on the other side of a cut."""
    bounds = (*outline.cuts, blocks)
    for index in range(1, len(outline.cuts)):
        for cut in (bounds[index] - 1, bounds[index] + 1):
            if bounds[index - 1] < cut < bounds[index + 1]:
                yield outline._replace(cuts=(*outline.cuts[:index], cut, *outline.cuts[index + 1 :]))


def _moved_devices(outline: Outline, devices: int) -> Iterator[Outline]:
    """Yield outlines with one device in another group, or in none, or exchanged for one of another group."""
    at: dict[int, int | None] = {device: index for index, group in enumerate(outline.groups) for device in group}
    for device in range(devices):
        here = at.get(device)
        for there in (*range(len(outline.groups)), None):
            if there != here:
                yield _placed(outline, at | {device: there})
        for other in range(device):
            if at.get(other) != here:
                yield _placed(outline, at | {device: at.get(other), other: here})


def _placed(outline: Outline, at: dict[int, int | None]) -> Outline:
    groups = (tuple(sorted(d for d, there in at.items() if there == index)) for index in range(len(outline.groups)))
    return outline._replace(groups=tuple(groups))


def _merged(outline: Outline) -> Iterator[Outline]:
    """Yield outlines with two neighbouring stages made one."""
    for index in range(1, len(outline.cuts)):
        both = tuple(sorted(outline.groups[index - 1] + outline.groups[index]))
        cuts = (*outline.cuts[:index], *outline.cuts[index + 1 :])
        yield Outline(cuts, (*outline.groups[: index - 1], both, *outline.groups[index + 1 :]))


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
        self._nodes = 0

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
            if self._nodes > _MOST_NODES:
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
        self._nodes += 1
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
