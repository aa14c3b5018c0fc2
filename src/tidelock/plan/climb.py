"""The layouts that were found so far, and how to make one a little better.

A layout is changed as long as its step gets shorter: who is with whom first, then the cuts. From the best one some
devices are then moved at random, and so on, until the work that is allowed is done. The same pool always gives the
same layouts.

May import `plan`.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, final

from tidelock.plan.cost import AHEAD, Layout
from tidelock.plan.partition import Outline, Shape, alike, balanced, place

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


def aheads(costs: Costs, stages: int) -> tuple[int, ...]:
    """Return the values of `ahead` that make a difference for so many stages."""
    return AHEAD[:1] if stages == 1 or costs.micro_batches == 1 else AHEAD


def look(found: Found, outline: Outline, ahead: int) -> Layout | None:
    """Return an outline's layout, which is taken in; None when it does not fit."""
    stages = place(found.costs, outline, ahead)
    return None if stages is None else found.add(stages, ahead, found.costs.step_seconds(stages, ahead))


@final
class Climber:
    """Changes the best layouts a little.

    Args:
        found: Where they are, and where better ones go.
        shape: What is allowed.
    """

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
        looks = (look(self._found, way[1], ahead) for ahead in aheads(self._costs, len(groups)))
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
