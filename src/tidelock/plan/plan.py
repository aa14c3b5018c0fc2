"""The plan: who holds what, what a step takes, what holds it up, and why not otherwise.

May import `plan`, units and errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from tidelock.errors import ConfigError
from tidelock.plan.cost import Costs
from tidelock.plan.partition import Shape
from tidelock.plan.search import search
from tidelock.plan.shortage import closest
from tidelock.plan.simulate import Interval, gantt
from tidelock.units import format_short_seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidelock.plan.cost import Layout, Stage
    from tidelock.plan.inputs import Profile


@final
@dataclass(frozen=True, slots=True)
class DeviceShare:
    """What one device has to do.

    Attributes:
        name: Of the device.
        rows: Of each micro-batch that it computes.
        memory_bytes: What it needs.
        memory_limit: What it has.
    """

    name: str
    rows: int
    memory_bytes: int
    memory_limit: int


@final
@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage; seconds and bytes are of one step.

    Attributes:
        first_block: Number of its first block.
        last_block: Number of its last block.
        devices: Who holds these blocks.
        in_flight: Most micro-batches between their forward and their backward here.
        forward_seconds: Of all forwards.
        backward_seconds: Of all backwards.
        all_reduce_seconds: Of summing the gradients over the devices.
        idle_seconds: The rest of the step.
        forward_bytes: Sent to the next stage.
        backward_bytes: Sent to the stage before.
        all_reduce_bytes: Sent by each device to sum the gradients, at most.
    """

    first_block: int
    last_block: int
    devices: tuple[DeviceShare, ...]
    in_flight: int
    forward_seconds: float
    backward_seconds: float
    all_reduce_seconds: float
    idle_seconds: float
    forward_bytes: int
    backward_bytes: int
    all_reduce_bytes: int


@final
@dataclass(frozen=True, slots=True)
class Alternative:
    """Another layout, or a whole kind of layouts, and why it was not taken.

    Attributes:
        name: What it is.
        seconds: Of a step; None when it does not fit.
        groups: Names of the devices of each stage; empty when it does not fit.
        micro_batches: In a step; None when it does not fit.
        reason: Why it was not taken.
    """

    name: str
    seconds: float | None
    groups: tuple[tuple[str, ...], ...]
    micro_batches: int | None
    reason: str


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """What to do with a pool.

    Attributes:
        title: Of the profile.
        batch_rows: In a step.
        micro_batches: In a step.
        ahead: Micro-batches in flight for each stage behind one.
        stages: First to last.
        left_out: Devices that would not help.
        seconds: Of a step, by the simulator.
        bottleneck: What holds the step up most, in words.
        is_proved: Whether no layout is quicker, by the cost model; else it is the best that was found.
        alternatives: What else there is.
        timeline: When what happens in a step.
    """

    title: str
    batch_rows: int
    micro_batches: int
    ahead: int
    stages: tuple[StagePlan, ...]
    left_out: tuple[str, ...]
    seconds: float
    bottleneck: str
    is_proved: bool
    alternatives: tuple[Alternative, ...]
    timeline: tuple[Interval, ...]

    @property
    def rows_per_second(self) -> float:
        """How many rows a second the pool trains."""
        return self.batch_rows / self.seconds


@final
@dataclass(frozen=True, slots=True)
class _Choice:
    """The best layouts of one shape over all numbers of micro-batches that were asked for, the quickest first."""

    layouts: list[tuple[Layout, Costs]]
    complete: bool


def make_plan(profile: Profile, batch_rows: int, micro_batches: int | None = None) -> Plan:
    """Return the plan for a pool: the quickest layout that fits its memory (what is guaranteed: `search.py`).

    Args:
        profile: The pool and the model.
        batch_rows: Rows of a batch, which is a step.
        micro_batches: Equal parts of a batch that go through the stages; None tries all numbers that divide it.

    Raises:
        ConfigError: A number is out of its range, or no layout fits.
    """
    all_costs = [Costs(profile, batch_rows // count, count) for count in _counts(batch_rows, micro_batches)]
    devices = len(profile.devices)
    choice = _choose(all_costs, Shape("any", devices, devices))
    if not choice.layouts:
        raise ConfigError(_refusal(all_costs, choice, micro_batches))
    best, costs = choice.layouts[0]
    times = costs.times(best.stages, best.ahead)
    return Plan(
        title=profile.title,
        batch_rows=batch_rows,
        micro_batches=costs.micro_batches,
        ahead=best.ahead,
        stages=tuple(_stage_plan(costs, best, index) for index in range(len(best.stages))),
        left_out=_left_out(profile, best),
        seconds=best.seconds,
        bottleneck=_holds_up(costs, best)[1],
        is_proved=choice.complete,
        alternatives=_alternatives(choice, all_costs),
        timeline=tuple(gantt(times, costs.micro_batches)),
    )


def _counts(batch_rows: int, micro_batches: int | None) -> list[int]:
    if batch_rows < 1:
        msg = f"Plan: expected at least 1 row in a batch, got {batch_rows}. Give --batch-rows a larger number."
        raise ConfigError(msg)
    divisors = [count for count in range(1, batch_rows + 1) if batch_rows % count == 0]
    if micro_batches is None:
        return divisors
    if micro_batches not in divisors:
        listed = ", ".join(str(count) for count in divisors)
        msg = (
            f"Plan: expected a number of micro-batches that divides the {batch_rows} rows of a batch, got "
            f"{micro_batches}. Give --micro-batches one of {listed}."
        )
        raise ConfigError(msg)
    return [micro_batches]


def _choose(all_costs: Sequence[Costs], shape: Shape) -> _Choice:
    found: list[tuple[Layout, Costs]] = []
    complete = True
    for costs in all_costs:
        result = search(costs, shape)
        found += [(layout, costs) for layout in result.layouts]
        complete = complete and result.complete
    return _Choice(sorted(found, key=lambda one: (one[0].seconds, len(one[0].stages), one[1].micro_batches)), complete)


def _stage_plan(costs: Costs, layout: Layout, index: int) -> StagePlan:
    stage, count = layout.stages[index], costs.micro_batches
    behind = len(layout.stages) - 1 - index
    needs = costs.memory_bytes(stage, behind, layout.ahead)
    reduce_seconds, members = costs.all_reduce_seconds(stage), len(stage.group)
    busy = count * (stage.forward + stage.backward) + reduce_seconds
    return StagePlan(
        first_block=stage.first,
        last_block=stage.end - 1,
        devices=tuple(
            DeviceShare(costs.profile.devices[device].name, rows, need, costs.memory[device])
            for device, rows, need in zip(stage.group, stage.shares, needs, strict=True)
        ),
        in_flight=costs.in_flight(behind, layout.ahead),
        forward_seconds=count * stage.forward,
        backward_seconds=count * stage.backward,
        all_reduce_seconds=reduce_seconds,
        idle_seconds=max(layout.seconds - busy, 0.0),
        forward_bytes=count * costs.boundary_bytes(stage.end)[0],
        backward_bytes=count * costs.boundary_bytes(stage.first)[1],
        all_reduce_bytes=2 * (members - 1) * costs.gradient_bytes(stage) // members,
    )


def _left_out(profile: Profile, layout: Layout) -> tuple[str, ...]:
    used = {device for stage in layout.stages for device in stage.group}
    return tuple(device.name for number, device in enumerate(profile.devices) if number not in used)


def _holds_up(costs: Costs, layout: Layout) -> tuple[float, str]:
    """Return what takes longest in a step, in seconds and in words: a stage's computing, or a link."""
    found, count = [], costs.micro_batches
    for number, times in enumerate(costs.times(layout.stages, layout.ahead), 1):
        found += [
            (count * (times.forward + times.backward), f"stage {number} computes"),
            (count * times.send_forward, f"the link from stage {number} to {number + 1} is taken"),
            (count * times.send_backward, f"the link from stage {number + 1} back to {number} is taken"),
            (times.all_reduce, f"stage {number} sums its gradients"),
        ]
    seconds, words = max(found, key=lambda one: one[0])
    return seconds, f"{words} for {format_short_seconds(seconds)} of {format_short_seconds(layout.seconds)}"


def _alternatives(choice: _Choice, all_costs: Sequence[Costs]) -> tuple[Alternative, ...]:
    """Return the next-best grouping, and the kinds of layouts that are commonly used: all data, all pipeline."""
    best, costs = choice.layouts[0]
    devices = costs.devices
    found: list[Alternative] = []
    groups = _names(costs, best.stages)
    others = (one for one in choice.layouts if _names(one[1], one[0].stages) != groups)
    following = next(others, None)
    if following is not None:
        found.append(_alternative("next best", *following, choice))
    shapes = []
    if len(best.stages) > 1:
        shapes.append(Shape("data parallel", 1, devices))
    if any(len(stage.group) > 1 for stage in best.stages):
        shapes.append(Shape("pipeline of single devices", devices, 1))
    for shape in shapes:
        layouts = _choose(all_costs, shape).layouts
        if layouts:
            other = _alternative(shape.name, *layouts[0], choice)
            # Where the next best is of this kind, it is said once, as what it is.
            found = [one for one in found if one.groups != other.groups] + [other]
        else:
            found.append(Alternative(shape.name, None, (), None, _shortage(all_costs, shape)))
    return tuple(found)


def _alternative(name: str, layout: Layout, costs: Costs, choice: _Choice) -> Alternative:
    best, its = choice.layouts[0]
    more = layout.seconds - best.seconds
    held, words = _holds_up(costs, layout)
    held_before, _ = _holds_up(its, best)
    if held - held_before > more / 2:
        reason = words
    else:
        waits = f"more waiting: {_waiting(layout, held)} of a step against {_waiting(best, held_before)}"
        reason = waits if more > 0 else "as quick, with more stages or devices"
    return Alternative(name, layout.seconds, _names(costs, layout.stages), costs.micro_batches, reason)


def _waiting(layout: Layout, held: float) -> str:
    """Return how much of a step its slowest part waits: while the pipeline fills and drains, or for the network."""
    return f"{1 - held / layout.seconds:.0%}"


def _names(costs: Costs, stages: Sequence[Stage]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(costs.profile.devices[device].name for device in stage.group) for stage in stages)


def _shortage(all_costs: Sequence[Costs], shape: Shape) -> str:
    """Return in words where memory is missing in the layout of a shape that is closest to fitting."""
    near = [found for found in (closest(costs, shape) for costs in all_costs) if found is not None]
    if not near:
        return "needs more rows in a micro-batch than there are devices in a stage"
    return min(near, key=lambda one: one.factor).words


def _refusal(all_costs: Sequence[Costs], choice: _Choice, micro_batches: int | None) -> str:
    costs = all_costs[0]
    shape = Shape("any", costs.devices, costs.devices)
    seen = "no layout has it" if choice.complete else "none was found that has it"
    fewer = "" if micro_batches is None else ", give a larger --micro-batches, so that each has fewer rows,"
    return (
        f"Plan: expected memory in the pool for {costs.blocks} blocks, got too little: {seen}; closest: "
        f"{_shortage(all_costs, shape)} ({costs.profile.title}). Free memory there{fewer} or add a device."
    )
