"""What memory is missing, and where, when nothing fits.

May import `plan` and units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from tidelock.plan.cost import AHEAD, Costs
from tidelock.plan.partition import Shape, orders, outlines, place
from tidelock.units import format_bytes

if TYPE_CHECKING:
    from tidelock.plan.cost import Stage

# Sizes of memory that are tried, as powers of two of what there is, and halvings between two of them.
_MOST_DOUBLINGS = 40
_HALVINGS = 8
# Shortages that are told of.
_MOST_NAMED = 3


@final
@dataclass(frozen=True, slots=True)
class Shortage:
    """A layout that would fit if every device had more memory.

    Attributes:
        factor: By which memory would have to grow, about.
        words: Which devices need how much more for which blocks.
    """

    factor: float
    words: str


def closest(costs: Costs, shape: Shape) -> Shortage | None:
    """Return the layout that needs the least growth of memory, the same for all devices; about, and of those looked at.

    None when no memory would do, because a group would have more devices than a micro-batch has rows.
    """
    low, high = 1.0, 1.0
    stages = _fits(costs, shape, high)
    for _ in range(_MOST_DOUBLINGS):
        if stages is not None:
            break
        low, high = high, 2 * high
        stages = _fits(costs, shape, high)
    if stages is None:
        return None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        less = _fits(costs, shape, middle)
        if less is None:
            low = middle
        else:
            high, stages = middle, less
    return Shortage(high, _words(costs, stages))


def _fits(costs: Costs, shape: Shape, factor: float) -> list[Stage] | None:
    """Return the stages of a layout that fits when every device has so many times its memory."""
    larger = Costs(costs.profile, costs.rows, costs.micro_batches)
    larger.memory = [int(memory * factor) + (factor > 1) for memory in costs.memory]
    for order in orders(larger):
        for _, outline in outlines(larger, order, shape, unlimited=True):
            stages = place(larger, outline, AHEAD[0])
            if stages is not None:
                return stages
    return None


def _words(costs: Costs, stages: list[Stage]) -> str:
    """Return which devices need how much more, the most first; devices that need the same in one breath."""
    alike: dict[tuple[int, int, int, Stage], list[str]] = {}
    for index, stage in enumerate(stages):
        needs = costs.memory_bytes(stage, len(stages) - 1 - index, AHEAD[0])
        for device, need in zip(stage.group, needs, strict=True):
            has = costs.memory[device]
            if need > has:
                alike.setdefault((need - has, need, has, stage), []).append(costs.profile.devices[device].name)
    ranked = sorted(alike.items(), key=lambda item: -item[0][0])
    words = []
    for (missing, need, has, stage), names in ranked[:_MOST_NAMED]:
        verbs = ("needs", "has") if len(names) == 1 else ("each need", "have")
        sizes = f"{verbs[0]} {format_bytes(need)} and {verbs[1]} {format_bytes(has)}"
        held = f"blocks {stage.first} to {stage.end - 1}"
        words.append(f"{', '.join(names)} with {held} {sizes}, {format_bytes(missing)} too little")
    more = sum(len(names) for _, names in ranked[_MOST_NAMED:])
    return "; ".join(words) + (f"; and {more} more" if more else "")
