"""The dynamic programme: good layouts of blocks on devices in a given order, quickly.

PAC's programme (arXiv 2408.10746, section 4.3) minimises the time of the slowest stage for each number of stages, over
contiguous groups of an ordered list of devices, and then chooses the number of stages. Here the question is turned
round, which costs less: for a time that no stage may exceed, how many blocks can the last stages hold on the first
devices of the list? One pass answers it for every number of stages, and a few times are tried, from the least that
could do. The layouts that come out are judged by the simulator, in `search.py`.

May import `plan`.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, NamedTuple

from tidelock.plan.cost import AHEAD

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tidelock.plan.cost import Costs, Stage

# Each limit that is tried is so much longer than the one before.
_STEP = 1.5
# Of the time between too little and enough, to balance stages.
_HALVINGS = 6


class Shape(NamedTuple):
    """What layouts are allowed.

    Attributes:
        name: For people.
        max_stages: Most stages.
        max_group: Most devices in a stage.
    """

    name: str
    max_stages: int
    max_group: int


class Outline(NamedTuple):
    """Which blocks and which devices make a stage; first to last.

    Attributes:
        cuts: The first block of each stage.
        groups: The devices of each stage, ascending.
    """

    cuts: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]


class _Reached(NamedTuple):
    """The last stages on the first devices of an order: their first block, and the way there."""

    first: int
    group: tuple[int, ...]
    rest: _Reached | None


def place(costs: Costs, outline: Outline, ahead: int) -> list[Stage] | None:
    """Return an outline's stages, with the shares that are quickest forward and backward together; None: no room."""
    stages, bounds = [], (*outline.cuts, costs.blocks)
    for index, group in enumerate(outline.groups):
        behind = len(outline.groups) - 1 - index
        options = costs.stages((bounds[index], bounds[index + 1]), group, behind, ahead)
        if not options:
            return None
        stages.append(min(options, key=lambda stage: stage.forward + stage.backward))
    return stages


def orders(costs: Costs) -> list[tuple[int, ...]]:
    """Return orders of the devices, the one for the last stage first, that are worth a try for unlike devices.

    Early stages have more micro-batches in flight and so need more memory; a device at the end of an order can be left
    out. So: little memory last in the pipeline, then the quick first and the slow first, and memory for its speed.
    """
    speed = [1 / max(both[-1][-1], 1e-12) for both in costs.both]
    devices = range(costs.devices)
    ranked = [
        sorted(devices, key=lambda d: (costs.memory[d], -speed[d])),
        sorted(devices, key=lambda d: (-costs.memory[d], -speed[d])),
        sorted(devices, key=lambda d: (-speed[d], costs.memory[d])),
        sorted(devices, key=lambda d: (costs.memory[d] / speed[d], d)),
    ]
    kinds = alike(costs)
    return [tuple(order) for order in {tuple(kinds[d] for d in order): order for order in ranked}.values()]


def outlines(
    costs: Costs, order: Sequence[int], shape: Shape, *, unlimited: bool = False
) -> Iterator[tuple[float, Outline]]:
    """Yield outlines on devices in this order, for each number of stages the balanced one, the quickest first.

    Each with what its slowest stage takes at least, about, in seconds of a forward and a backward of one micro-batch;
    at the end come those that need only fit, with 0.

    Args:
        costs: What stages take.
        order: The devices, the one for the last stage first.
        shape: What is allowed.
        unlimited: Yield the last ones only.
    """
    done: set[int] = set()
    limit = float("inf") if unlimited else _least_limit(costs)
    longest = sum(both[-1][-1] for both in costs.both)
    while limit < longest:
        yield from _new_outlines(costs, order, shape, limit, done)
        limit *= _STEP
    yield from _new_outlines(costs, order, shape, float("inf"), done)


def balanced(costs: Costs, groups: Sequence[tuple[int, ...]], limit: float) -> tuple[float, Outline] | None:
    """Return the outline of groups in this order whose slowest stage is quickest, about, and its time.

    Args:
        costs: What stages take.
        groups: The devices of each stage, first to last.
        limit: What the slowest stage may take, in seconds forward and backward; None is returned when it takes more.
    """
    cuts = _filled(costs, groups, limit)
    if cuts is None:
        return None
    low, best = limit / _STEP if limit < float("inf") else 0.0, cuts
    if limit == float("inf"):
        limit = sum(both[-1][-1] for both in costs.both)
    for _ in range(_HALVINGS):
        middle = (low + limit) / 2
        cuts = _filled(costs, groups, middle)
        if cuts is None:
            low = middle
        else:
            limit, best = middle, cuts
    return limit, Outline(best, tuple(groups))


def _filled(costs: Costs, groups: Sequence[tuple[int, ...]], limit: float) -> tuple[int, ...] | None:
    """Return the first block of each stage when each, from the last on, has as many as it can within a time."""
    end, cuts = costs.blocks, []
    for behind, group in enumerate(reversed(groups)):
        first = _lowest(costs, group, (len(groups) - 1 - behind, end - 1, end), behind, limit)
        if first is None:
            return None
        cuts.append(first)
        end = first
    return tuple(reversed(cuts)) if end == 0 else None


def _new_outlines(
    costs: Costs, order: Sequence[int], shape: Shape, limit: float, done: set[int]
) -> Iterator[tuple[float, Outline]]:
    for outline in _within(costs, order, shape, limit):
        if len(outline.cuts) not in done:
            done.add(len(outline.cuts))
            yield (limit / _STEP if limit < float("inf") else 0.0), outline


def _within(costs: Costs, order: Sequence[int], shape: Shape, limit: float) -> Iterator[Outline]:
    """Yield, for each number of stages that can do within a limit, an outline."""
    reached = {0: _Reached(costs.blocks, (), None)}
    for behind in range(min(shape.max_stages, len(order), costs.blocks)):
        after: dict[int, _Reached] = {}
        for used, state in reached.items():
            for more, first in _farthest(costs, order[used : used + shape.max_group], state.first, behind, limit):
                if used + more not in after or first < after[used + more].first:
                    after[used + more] = _Reached(first, tuple(sorted(order[used : used + more])), state)
        whole = next((state for state in after.values() if state.first == 0), None)
        if whole is not None:
            yield _outline(whole)
        reached = _worth_going_on(after)


def _worth_going_on(reached: dict[int, _Reached]) -> dict[int, _Reached]:
    """Leave out what is whole, and what took more devices for no more blocks."""
    kept: dict[int, _Reached] = {}
    lowest = float("inf")
    for used, state in sorted(reached.items()):
        if 0 < state.first < lowest:
            kept[used] = state
        lowest = min(lowest, state.first)
    return kept


def _farthest(costs: Costs, devices: Sequence[int], end: int, behind: int, limit: float) -> Iterator[tuple[int, int]]:
    """Yield, for groups of the first 1, 2, … devices, the first block that a stage up to block `end` can begin with."""
    best = end
    for count in range(1, len(devices) + 1):
        first = _lowest(costs, devices[:count], (0, best - 1, end), behind, limit)
        if first is not None:
            yield count, first
            best = first
        if not best:
            return


def _lowest(costs: Costs, group: Sequence[int], between: tuple[int, int, int], behind: int, limit: float) -> int | None:
    """Return the lowest first block of a stage that a group can do within a time and its memory; None: there is none.

    Args:
        costs: What stages take.
        group: Devices; each has to do at least one row.
        between: The lowest and the highest first block to try, and the block after the stage's last one.
        behind: Stages behind this one.
        limit: Seconds of a device's forward and backward.
    """
    lowest, highest, end = between
    if len(group) > costs.rows:
        return None
    memory = min(costs.memory[device] for device in group)

    def can_do(first: int) -> int:
        if costs.fixed_bytes(first, end) > memory:
            return 0
        rows = [_rows_within(costs.both[device], first, end, limit) for device in group]
        return min(1, *rows, sum(rows) // costs.rows)

    # Fewer blocks take less time and fewer fixed bytes, but what crosses a boundary may be more at another one.
    for first in range(bisect_left(range(highest + 1), 1, lowest, key=can_do), highest + 1):
        fixed, per_row = costs.fixed_bytes(first, end), costs.bytes_per_row(first, end, behind, AHEAD[0])
        room = [costs.room(device, fixed, per_row) for device in group]
        if min(room) and sum(room) >= costs.rows:
            rows = [_rows_within(costs.both[device], first, end, limit) for device in group]
            if sum(map(min, rows, room)) >= costs.rows:
                return first
    return None


def _rows_within(both: Sequence[Sequence[float]], first: int, end: int, limit: float) -> int:
    """Return how many rows of these blocks a device does, forward and backward, within a time."""
    rows = len(both) - 1
    while rows and both[rows][end] - both[rows][first] > limit:
        rows -= 1
    return rows


def _least_limit(costs: Costs) -> float:
    """Return about the least time of the slowest stage that could do: all devices busy all the time."""
    alone = [both[-1][-1] for both in costs.both]
    return 1 / sum(1 / max(seconds, 1e-12) for seconds in alone) * 0.9


def _outline(last: _Reached) -> Outline:
    cuts, groups, state = [], [], last
    while state.rest is not None:
        cuts.append(state.first)
        groups.append(state.group)
        state = state.rest
    return Outline(tuple(cuts), tuple(groups))


def alike(costs: Costs) -> list[int]:
    """Return for each device the number of the first one that it could change places with."""
    found: list[int] = []
    for device in range(costs.devices):
        found.append(next((other for other in found if other != device and _same(costs, device, other)), device))
    return found


def _same(costs: Costs, one: int, other: int) -> bool:
    """Return whether two devices have the same times, memory and links."""
    own = [(costs.memory[device], costs.forward[device], costs.backward[device]) for device in (one, other)]
    third = (device for device in range(costs.devices) if device not in {one, other})
    return own[0] == own[1] and all(_speeds(costs, one, at) == _speeds(costs, other, at) for at in third)


def _speeds(costs: Costs, one: int, other: int) -> tuple[float, float]:
    link = costs.links[one][other]
    return link.bytes_per_second, link.latency_seconds
