"""What a training run over a link will take: bytes, seconds and memory, as numbers, in words and as JSON.

May import `plan` and units.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, final

from tidelock.units import format_bytes, format_seconds, format_short_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tidelock.plan.link import CloudLink

# A gain that is smaller than what a prediction may be off by is none.
_WORTH_SAYING = 0.85


@final
@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes by kind, as a run's ledger names them; means need not be whole.

    Attributes:
        sent: From the device to the cloud.
        received: From the cloud to the device.
    """

    sent: Mapping[str, float] = field(default_factory=dict)
    received: Mapping[str, float] = field(default_factory=dict)

    @property
    def up(self) -> float:
        """All bytes from the device to the cloud."""
        return sum(self.sent.values())

    @property
    def down(self) -> float:
        """All bytes from the cloud to the device."""
        return sum(self.received.values())

    @property
    def total(self) -> float:
        """All bytes, both ways together."""
        return self.up + self.down

    def times(self, factor: float) -> Traffic:
        """Return so many times these bytes."""
        return Traffic(*({kind: size * factor for kind, size in way.items()} for way in (self.sent, self.received)))


@final
@dataclass(frozen=True, slots=True)
class PhaseForecast:
    """Steps of a run that are alike.

    Attributes:
        name: What people call them.
        steps: How many there are in the run.
        active: Active modules; None where there are none, beside the blocks.
        in_flight: Micro-batches on their way at once in the last batch.
        round_trips: Of one pass, one after another.
        step: Bytes of a step, in the mean.
        epoch: Bytes of a whole epoch of such steps.
        seconds: Of a step, in the mean.
        split: Where they go: device, cloud, wire, waiting.
        others: What a step would take with other options, in seconds.
    """

    name: str
    steps: int
    active: int | None
    in_flight: int
    round_trips: int
    step: Traffic
    epoch: Traffic
    seconds: float
    split: Mapping[str, float]
    others: Mapping[str, float] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True)
class Forecast:
    """A run before it begins.

    Attributes:
        title: Model and method.
        link: Between device and cloud; None is what is there.
        examples: How many are learned from.
        tokens: Theirs.
        labelled: Those of them whose final state crosses.
        steps_per_epoch: Optimizer steps.
        phases: In their order.
        evaluation: Bytes of one evaluation.
        device_memory_bytes: The most that the device's process has.
        cloud_memory_bytes: The most that the cloud's process has; None where only the cloud knows.
        cloud_kept_bytes: What the passes of the largest batch keep of it, as `--max-memory` counts; None likewise.
    """

    title: str
    link: CloudLink | None
    examples: int
    tokens: int
    labelled: int
    steps_per_epoch: int
    phases: tuple[PhaseForecast, ...]
    evaluation: Traffic
    device_memory_bytes: int
    cloud_memory_bytes: int | None
    cloud_kept_bytes: int | None

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return sum(phase.steps * phase.seconds for phase in self.phases)


def forecast_values(forecast: Forecast) -> dict[str, object]:
    """Return a forecast as values for JSON: its fields, with the unit in a name where it has one."""
    return {"event": "forecast", **asdict(forecast), "seconds": forecast.seconds}


def forecast_text(forecast: Forecast) -> str:
    """Return a forecast for people: bytes, time, memory, what dominates and what to change."""
    size = (
        f"{forecast.examples:,} examples, {forecast.tokens:,} tokens, {forecast.labelled:,} with a label; "
        f"{forecast.steps_per_epoch:,} steps an epoch"
    )
    lines = [f"{forecast.title}: {size}.", f"Link: {_link(forecast.link)}."]
    for phase in forecast.phases:
        lines += ["", *_phase_lines(phase, forecast.link)]
    if forecast.evaluation.total:
        lines += ["", f"One evaluation: {_ways(forecast.evaluation)}."]
    cloud = "the cloud says its own when it starts"
    if forecast.cloud_memory_bytes is not None and forecast.cloud_kept_bytes is not None:
        kept = f"of which the passes of the largest batch keep {format_bytes(forecast.cloud_kept_bytes)}"
        cloud = f"cloud {format_bytes(forecast.cloud_memory_bytes)}, {kept}"
    crossed = format_bytes(round(sum(phase.steps * phase.step.total for phase in forecast.phases)))
    memory = f"Memory of the process, at most: device {format_bytes(forecast.device_memory_bytes)}, {cloud}."
    on_top = "Evaluations and checkpoints come on top."
    return "\n".join([*lines, "", memory, f"All steps: {format_seconds(forecast.seconds)}, {crossed}. {on_top}"])


def _phase_lines(phase: PhaseForecast, link: CloudLink | None) -> list[str]:
    active = "" if phase.active is None else f", {phase.active} active modules"
    split = ", ".join(f"{name} {format_short_seconds(seconds)}" for name, seconds in phase.split.items() if seconds)
    lines = [
        f"{phase.name[0].upper()}{phase.name[1:]}: {phase.steps:,} steps{active}",
        f"  a step    {format_short_seconds(phase.seconds)} ({split}), {_ways(phase.step)}",
        f"  an epoch  {_ways(phase.epoch)}",
    ]
    for way, traffic in (("sent", phase.epoch.sent), ("received", phase.epoch.received)):
        if traffic:
            kinds = ", ".join(f"{kind} {format_bytes(round(size))}" for kind, size in traffic.items())
            lines.append(f"    {way}: {kinds}")
    return [*lines, f"  {bottleneck(phase, link)}"]


def bottleneck(phase: PhaseForecast, link: CloudLink | None) -> str:
    """Return what takes most of a step, and what to change."""
    where = max(phase.split, key=lambda name: phase.split[name])
    said = {
        "device": "The device is the bottleneck: fewer labelled tokens or a smaller --method make its part less",
        "cloud": "The cloud's computing is the bottleneck: shorter examples make it less",
        "waiting": "The turns in the cloud are the bottleneck: fewer --micro-batches wait less",
        "wire": "Messages are the bottleneck: fewer active modules (--layer, --schedule) or --method core send less",
    }[where]
    if where == "wire" and link is not None:
        parts = {
            "its delay": phase.round_trips * link.round_trip_seconds,
            "its rate up": 8 * phase.step.up / link.up_bits_per_second,
            "its rate down": 8 * phase.step.down / link.down_bits_per_second,
        }
        part = max(parts, key=lambda name: parts[name])
        said = (
            f"The link is the bottleneck, most of all {part}: {format_short_seconds(parts[part])} of a step at least. "
            f"Fewer active modules (--layer, --schedule) make it less"
        )
        said += "" if part == "its delay" else ", and so does --method core"
    gains = [
        f"with {name} it would be {format_short_seconds(seconds)}"
        for name, seconds in phase.others.items()
        if seconds < _WORTH_SAYING * phase.seconds
    ]
    return "; ".join([said, *gains]) + "."


def _ways(traffic: Traffic) -> str:
    return f"{format_bytes(round(traffic.up))} up, {format_bytes(round(traffic.down))} down"


def _link(link: CloudLink | None) -> str:
    if link is None:
        return "the one that is there"
    up, down = (f"{rate / 1e6:g} Mbit/s" for rate in (link.up_bits_per_second, link.down_bits_per_second))
    rates = f"{up} each way" if up == down else f"{up} up, {down} down"
    return f"{format_short_seconds(link.round_trip_seconds)} there and back, {rates}"
