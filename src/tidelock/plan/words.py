"""A plan in words and as JSON.

May import `plan` and units.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from tidelock.units import format_bytes, format_short_seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidelock.plan.plan import Alternative, Plan, StagePlan


def plan_values(plan: Plan) -> dict[str, object]:
    """Return a plan as values for JSON: its fields, with the unit in a name where it has one."""
    return {"event": "plan", **asdict(plan), "rows_per_second": plan.rows_per_second}


def plan_text(plan: Plan) -> str:
    """Return a plan for people: who holds what, time, memory, bytes, what holds it up, and what else there is."""
    rows = plan.batch_rows // plan.micro_batches
    count, sort = len(plan.stages), "no layout is quicker" if plan.is_proved else "the quickest that was found"
    parts = "1 stage" if count == 1 else f"{count} stages"
    first = (
        f"{plan.title}: {parts}, {format_short_seconds(plan.seconds)} a step of {plan.batch_rows} rows in "
        f"{plan.micro_batches} micro-batches of {rows}, {plan.rows_per_second:.3g} rows/s ({sort})."
    )
    lines = [
        first,
        "",
        *(line for number, stage in enumerate(plan.stages, 1) for line in _stage_lines(number, stage, plan)),
        "",
        f"Bottleneck: {plan.bottleneck}.",
    ]
    if plan.left_out:
        lines.append(f"Left out, since it would not help: {', '.join(plan.left_out)}.")
    lines += [_alternative_line(other, plan) for other in plan.alternatives]
    return "\n".join(lines)


def _stage_lines(number: int, stage: StagePlan, plan: Plan) -> list[str]:
    held = f"blocks {stage.first_block} to {stage.last_block}"
    if stage.first_block == stage.last_block:
        held = f"block {stage.first_block}"
    busy = 1 - stage.idle_seconds / plan.seconds
    forward, backward = format_short_seconds(stage.forward_seconds), format_short_seconds(stage.backward_seconds)
    lines = [
        f"Stage {number}: {held}, {stage.in_flight} in flight, forward {forward}, backward {backward}, busy {busy:.0%}"
    ]
    width = max(len(device.name) for device in stage.devices)
    for device in stage.devices:
        needs = f"{format_bytes(device.memory_bytes)} of {format_bytes(device.memory_limit)}"
        share = "1 row" if device.rows == 1 else f"{device.rows} rows"
        lines.append(f"  {device.name:<{width}}  {share} of each micro-batch, {needs}")
    sent = [
        f"{format_bytes(size)} {where}"
        for size, where in (
            (stage.forward_bytes, "to the next stage"),
            (stage.backward_bytes, "back to the one before"),
            (
                stage.all_reduce_bytes,
                f"from each device to sum gradients ({format_short_seconds(stage.all_reduce_seconds)})",
            ),
        )
        if size
    ]
    return [*lines, f"  sends {', '.join(sent)}"] if sent else lines


def _alternative_line(other: Alternative, plan: Plan) -> str:
    name = other.name[0].upper() + other.name[1:]
    if other.seconds is None:
        return f"{name}: does not fit: {other.reason}."
    more = other.seconds / plan.seconds - 1
    return (
        f"{name}: {_groups(other.groups)} with {other.micro_batches} micro-batches, "
        f"{format_short_seconds(other.seconds)}, {more:.1%} more: {other.reason}."
    )


def _groups(groups: Sequence[Sequence[str]]) -> str:
    return " | ".join(" + ".join(group) for group in groups)
