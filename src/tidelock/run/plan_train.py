"""Says what a training run will take over a link, before it begins: bytes from shapes, seconds from a few timed steps.

Without a cloud's address this machine plays the cloud, in a second process.
May import everything below `run`.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast, final

import torch
from transformers import set_seed

from tidelock.backbone.crossings import PassSizes
from tidelock.backbone.pass_times import passes_at_once
from tidelock.cloud.memory import bytes_at_sites, bytes_of_taps
from tidelock.cloud.turns import AT_ONCE_ON_CPU
from tidelock.data.batch import Collator
from tidelock.device.model import DeviceModel
from tidelock.device.side_model import SideModel
from tidelock.errors import ConfigError
from tidelock.plan.flight import Flight, Processors
from tidelock.plan.forecast import Forecast, PhaseForecast, Traffic
from tidelock.run.cloud_process import loopback_cloud
from tidelock.run.connect_side import EXAMPLES_AT_ONCE
from tidelock.run.examples import encode_examples, read_run_examples, with_classes_counted
from tidelock.run.open_model import load_tokenizer, open_model
from tidelock.run.plan_passes import PlannedBatch, epoch_batches, fly_batch, plan_micro_batches, plan_taps, traffic_of
from tidelock.run.plan_phases import decision_bytes, scheduled_phases, side_phases, steps_of
from tidelock.run.plan_probe import StepTimer, peak_bytes, time_at_sites, time_taps
from tidelock.wire.address import parse_url
from tidelock.wire.codec import Codec, Codecs
from tidelock.wire.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from tidelock.backbone.remote import RemoteBackbone
    from tidelock.cloud.memory import PassCost
    from tidelock.device.tap_source import ExampleIds
    from tidelock.plan.link import CloudLink
    from tidelock.run.cloud_process import LoopbackCloud
    from tidelock.run.config import RunConfig
    from tidelock.run.examples import EncodedRows
    from tidelock.run.plan_passes import Pace
    from tidelock.run.plan_phases import Phase

_PROBES = 3
# Batches that are simulated for a step's mean, evenly from the short to the long ones.
_SIMULATED = 24
_BYTES_OF_FP32 = 4


def forecast(config: RunConfig, link: CloudLink | None, say: Callable[[str], None]) -> Forecast:
    """Return what a run will take.

    Args:
        config: The run; with the backbone `local` its cloud is a process on this machine.
        link: Between device and cloud; None is the one that is there.
        say: Takes a notice.

    Raises:
        ConfigError: A link to predict for and a cloud on another machine, which has one; or a task without a cloud.
        TidelockError: As `train`.
    """
    if config.task == "text-to-text":
        msg = (
            "Plan: expected a task of a decoder, got text-to-text: T5 and BART are trained on one machine, and nothing "
            "crosses. Choose another --task, or train without a plan."
        )
        raise ConfigError(msg)
    if link is not None and config.cloud is not None and not parse_url(config.cloud).is_loopback:
        msg = (
            f"--link: expected a cloud on this machine, or none, got {config.cloud}: the steps that are timed there "
            "have its link in them already. Leave out --link, or --cloud."
        )
        raise ConfigError(msg)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    set_seed(config.seed)
    examples, eval_examples = read_run_examples(config)
    config = with_classes_counted(config, [*examples, *eval_examples])
    with ExitStack() as stack:
        cloud = None
        if config.cloud is None:
            say("Starting a cloud on this machine.")
            threads = [] if config.threads is None else ["--threads", str(config.threads)]
            cloud = stack.enter_context(loopback_cloud(str(config.model), *threads))
            config = config.elsewhere(cloud.address, cloud.token_file, cloud.certificate)
        model = stack.enter_context(_opened(config))
        tokenizer = load_tokenizer(model.ends.folder)
        rows, eval_rows = (encode_examples(config, model, tokenizer, found) for found in (examples, eval_examples))
        return _Planner(config, model, (rows, eval_rows), link, cloud).forecast(say)


@contextmanager
def _opened(config: RunConfig) -> Iterator[DeviceModel | SideModel]:
    """Open the device's model; a side network has a cache of its own, which goes again."""
    with tempfile.TemporaryDirectory() as scratch:
        if config.method == "side":
            config = replace(config, no_cache=False, cache_key=str(Path(scratch) / "key"), side_init="random")
        model = open_model(config, Ledger(), Path(scratch) / "cache")
        try:
            yield cast("DeviceModel | SideModel", model)  # of an encoder-decoder there is no cloud
        finally:
            model.close()


@final
class _Planner:
    """Plans one run whose model is open.

    Args:
        config: The run.
        model: The device's.
        rows: The encoded examples to learn from, and those to measure on.
        link: As for `forecast`.
        cloud: The process that plays the cloud; None is another's cloud.
    """

    def __init__(
        self,
        config: RunConfig,
        model: DeviceModel | SideModel,
        rows: tuple[EncodedRows, EncodedRows],
        link: CloudLink | None,
        cloud: LoopbackCloud | None,
    ) -> None:
        self._config, self._model, self._link, self._cloud = config, model, link, cloud
        self._rows, self._eval_rows = rows
        backbone = cast("RemoteBackbone", model.source.blocks() if isinstance(model, SideModel) else model.backbone)
        self._fingerprint, self._max_active = backbone.connection.description.fingerprint, backbone.max_active
        self._codecs = Codecs.named(config.codec, config.gradient_codec, stochastic_rounding=config.stochastic_rounding)
        self._batches = epoch_batches(config, model, self._rows)
        self._per_epoch, self._steps = steps_of(config, len(self._rows))
        self._timer = StepTimer(model, config)
        self._shared = backbone.connection.address.is_loopback
        self._cached_pace: tuple[Pace, Processors] | None = None

    def forecast(self, say: Callable[[str], None]) -> Forecast:
        """Return what the run will take; see `forecast`."""
        config, model = self._config, self._model
        if isinstance(model, SideModel):
            phases = side_phases(self._per_epoch, self._steps, caches=not config.no_cache)
        else:
            blocks = model.bank.numbers
            phases = scheduled_phases(config.to_schedule(), blocks, self._max_active, self._per_epoch, self._steps)
        planned = [self._plan(phase, self._batches, self._codecs) for phase in phases]
        say("Timing a few steps.")
        self._warm_up(phases[0], planned[0])
        forecasts = [self._forecast(phases[0], planned[0])]
        # No later phase has more active modules. What the allocator keeps grows with every step, here as in a run.
        cloud_memory = None if self._cloud is None else peak_bytes(self._cloud.pid)
        forecasts += [self._forecast(phase, batches) for phase, batches in zip(phases[1:], planned[1:], strict=True)]
        tokens = sum(len(row["input_ids"]) for row in self._rows)
        return Forecast(
            title=f"{model.config.model_type}, {config.method}, {config.codec}",
            link=self._link,
            examples=len(self._rows),
            tokens=tokens,
            labelled=sum(len(model.selection(batch)[2]) for batch in self._batches),
            steps_per_epoch=self._per_epoch,
            phases=tuple(forecasts),
            evaluation=self._evaluation(phases[-1]),
            device_memory_bytes=peak_bytes(),
            cloud_memory_bytes=cloud_memory,
            cloud_kept_bytes=None if self._cloud is None else self._kept_bytes(self._cloud.cost, planned),
        )

    def _plan(self, phase: Phase, batches: Sequence[dict[str, Tensor]], codecs: Codecs) -> list[PlannedBatch]:
        """Return the batches' passes as they are in a phase."""
        sizes = PassSizes(self._model.ends.geometry, codecs, self._fingerprint)
        if isinstance(self._model, SideModel):
            seen: set[ExampleIds] | None = None if self._config.no_cache else set()
            planned = [plan_taps(self._model, sizes, batch, seen) for batch in batches]
            return [replace(batch, passes=[]) for batch in planned] if phase.cached else planned
        planned = []
        for number, batch in enumerate(batches):
            self._activate(phase, number // self._config.accumulate)
            planned.append(plan_micro_batches(self._model, sizes, batch))
        return planned

    def _activate(self, phase: Phase, step: int) -> None:
        """Have the modules active that are so in a step of a phase."""
        if isinstance(self._model, DeviceModel):
            self._model.bank.activate(phase.turns[step % len(phase.turns)], frozen=self._config.killed == "frozen")

    def _warm_up(self, phase: Phase, planned: Sequence[PlannedBatch]) -> None:
        """Take one step on the largest batch, which needs the most memory."""
        self._activate(phase, 0)
        largest = max(range(len(planned)), key=lambda number: sum(one.positions for one in planned[number].passes))
        if isinstance(self._model, SideModel):
            cache, self._model.source.cache = self._model.source.cache, None
            self._timer.forward_and_backward(self._batches[largest])
            self._model.source.cache = cache
        else:
            self._timer.forward_and_backward(self._batches[largest])
        self._timer.update()

    def _forecast(self, phase: Phase, planned: list[PlannedBatch]) -> PhaseForecast:
        """Return what a phase will take."""
        pace, processors = self._time(phase)
        steps, size = phase.sample(self._per_epoch), self._config.accumulate
        used = [number for step in steps for number in range(len(planned))[step * size : (step + 1) * size]]
        chosen = [used[number] for number in _spread([planned[number] for number in used], _SIMULATED)]
        flight, in_flight = self._fly([planned[number] for number in chosen], pace, processors)
        batches_a_step = len(used) / len(steps)
        others = {}
        if self._codecs.activation in {Codec.FP32, Codec.BF16} and any(batch.passes for batch in planned):
            other = self._plan(phase, [self._batches[number] for number in chosen], Codecs.named("int8"))
            faster, _ = self._fly(other, pace, processors)
            others["--codec int8"] = faster.seconds / len(chosen) * batches_a_step + pace.update
        seconds = flight.seconds / len(chosen) * batches_a_step + pace.update
        on_the_clock = {
            name: getattr(flight, name) * (flight.inside / flight.alone if flight.alone else 0.0) / len(chosen)
            for name in ("cloud", "wire", "waiting")
        }
        split = {name: value * batches_a_step for name, value in on_the_clock.items()}
        first = next((one for batch in planned for one in batch.passes), None)
        return PhaseForecast(
            name=phase.name,
            steps=phase.steps,
            active=len(phase.turns[0]) or None,
            in_flight=in_flight,
            round_trips=0 if first is None else first.round_trips,
            step=self._with_decisions(phase, traffic_of(planned[n] for n in used), len(steps)).times(1 / len(steps)),
            epoch=self._with_decisions(phase, traffic_of(planned), self._per_epoch),
            seconds=seconds,
            split={"device": max(0.0, seconds - sum(split.values())), **split},
            others=others,
        )

    def _time(self, phase: Phase) -> tuple[Pace, Processors]:
        """Return how quick both sides are in a phase, as a few steps show."""
        if self._cached_pace is not None and phase.cached:
            return self._cached_pace

        def simulate(batch: PlannedBatch, pace: Pace, crowding: float, at_once: int) -> float:
            return fly_batch(batch, pace, at_once, Processors(AT_ONCE_ON_CPU, crowding, self._shared), None).seconds

        self._activate(phase, 0)
        first = replace(phase, turns=phase.turns[:1], cached=False)
        batches = [self._batches[number] for number in _spread(self._plan(first, self._batches, self._codecs), _PROBES)]
        probes = list(zip(batches, self._plan(first, batches, self._codecs), strict=True))
        self._activate(phase, 0)
        if isinstance(self._model, SideModel):
            at_once = self._config.in_flight or EXAMPLES_AT_ONCE
            pace, crowding = time_taps(self._timer, self._model, probes, at_once, simulate)
        else:
            pace, crowding = time_at_sites(self._timer, self._model, probes, self._config.in_flight, simulate)
        self._cached_pace = pace, Processors(AT_ONCE_ON_CPU, crowding, self._shared)
        return self._cached_pace

    def _fly(self, batches: Sequence[PlannedBatch], pace: Pace, processors: Processors) -> tuple[Flight, int]:
        """Return what batches take one after another over the link, and how many passes were in flight at last."""
        first = EXAMPLES_AT_ONCE if isinstance(self._model, SideModel) else passes_at_once(0.0, 0.0, 0.0)
        total, at_once = Flight(), self._config.in_flight or first
        for batch in batches:
            flight = fly_batch(batch, pace, at_once, processors, self._link)
            total = total + flight
            if self._config.in_flight is None and isinstance(self._model, DeviceModel):
                at_once = min(passes_at_once(flight.device, flight.cloud, flight.wire), len(batch.passes))
        return total, at_once

    def _with_decisions(self, phase: Phase, traffic: Traffic, steps: int) -> Traffic:
        """Return the bytes of so many steps with those of their periods' decisions."""
        schedule, model = self._config.to_schedule(), self._model
        if isinstance(model, SideModel) or not schedule.changes or phase.name == "warm-up":
            return traffic
        sizes = decision_bytes(schedule, model.bank.numbers, phase.turns[0], self._max_active, self._fingerprint)
        norms, command = (size * steps / (schedule.period or self._per_epoch) for size in sizes)
        received = {**traffic.received, "control": traffic.received["control"] + command}
        return Traffic({**traffic.sent, "norms": norms}, received)

    def _evaluation(self, phase: Phase) -> Traffic:
        """Return the bytes of one evaluation."""
        model, size = self._model, self._config.batch_size
        sizes = PassSizes(model.ends.geometry, self._codecs, self._fingerprint)
        parts = [self._eval_rows[first : first + size] for first in range(0, len(self._eval_rows), size)]
        batches = [Collator(0)(part) for part in parts]
        if isinstance(model, SideModel):
            return traffic_of(plan_taps(model, sizes, batch, None) for batch in batches)
        self._activate(phase, 0)
        return traffic_of(plan_micro_batches(model, sizes, batch, training=False) for batch in batches)

    def _kept_bytes(self, cost: PassCost, phases: Sequence[list[PlannedBatch]]) -> int:
        """Return what the passes of the largest batch keep in the cloud until they go back, or are read."""
        model, geometry = self._model, self._model.ends.geometry
        if isinstance(model, SideModel):
            at_once = self._config.in_flight or EXAMPLES_AT_ONCE
            longest = max(len(row["input_ids"]) for row in self._rows)
            return at_once * bytes_of_taps(geometry, longest, len(model.tapped), model.side_config.tap_width)
        at_sites = bytes_at_sites(geometry, _BYTES_OF_FP32, model.bank.targets, model.bank.frames)
        return max(
            sum(cost.bytes_for(one.rows, one.width, at_sites) for one in batch.passes)
            for batches in phases
            for batch in batches
        )


def _spread(batches: Sequence[PlannedBatch], count: int) -> list[int]:
    """Return the numbers of some batches, evenly from the short to the long ones."""
    order = sorted(range(len(batches)), key=lambda number: sum(one.tokens for one in batches[number].passes))
    count = min(count, len(order))
    return [order[len(order) * (2 * place + 1) // (2 * count)] for place in range(count)]
