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
    missing = []
    for index, stage in enumerate(stages):
        needs = costs.memory_bytes(stage, len(stages) - 1 - index, AHEAD[0])
        for device, need in zip(stage.group, needs, strict=True):
            has = costs.memory[device]
            if need > has:
                where = f"{costs.profile.devices[device].name} with blocks {stage.first} to {stage.end - 1}"
                words = f"{where} needs {format_bytes(need)} and has {format_bytes(has)}"
                missing.append((need - has, f"{words}, {format_bytes(need - has)} too little"))
    missing.sort(reverse=True)
    more = f", and {len(missing) - 3} more devices likewise" if len(missing) > 3 else ""
    return "; ".join(words for _, words in missing[:3]) + more
