"""How quick device and cloud are: a few steps of a run, timed on some of its own batches before it begins.

Each batch is taken twice: with one micro-batch on its way, where every second belongs to one end, and with as many as
the run would have, from which follows what computing at once costs. No weight moves.

May import everything below `run`.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast, final

import psutil
import torch

from tidelock.backbone.remote import RemoteBackbone
from tidelock.device.model import DeviceModel
from tidelock.run.plan_passes import Pace, PlannedBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from tidelock.backbone.pass_times import PassSeconds, PassTimes
    from tidelock.device.side_model import SideModel
    from tidelock.run.config import RunConfig

# What else a machine does makes steps slower, never quicker: the least of so many counts.
_REPEATS = 3
_BISECTIONS = 30
_MOST_CROWDED = 4.0


# A batch as the model takes it, and its passes.
Probe: TypeAlias = "tuple[dict[str, Tensor], PlannedBatch]"


@final
class StepTimer:
    """Takes steps as a run would, but for the weights, which stay as they are.

    Args:
        model: The device's.
        config: The run.
    """

    def __init__(self, model: DeviceModel | SideModel, config: RunConfig) -> None:
        self.model = model
        self._clip = config.clip
        # What is not active now may be in another phase.
        self._trained = list(model.parameters())
        # A learning rate of 0 costs what any other does.
        self._optimizer = torch.optim.AdamW(self._trained, lr=0.0, weight_decay=0.0)

    def forward_and_backward(self, batch: dict[str, Tensor]) -> float:
        """Return the seconds from a batch to its gradients."""
        began = time.perf_counter()
        self.model.train()
        loss = cast("Tensor", self.model(**batch).loss)
        loss.backward()
        return time.perf_counter() - began

    def update(self) -> float:
        """Return the seconds from gradients to moved weights."""
        began = time.perf_counter()
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self._trained, self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return time.perf_counter() - began


@final
class _Sums:
    """Seconds and sizes of what was timed."""

    def __init__(self) -> None:
        self.device = self.cloud = self.wire = self.own = self.update = 0.0
        self._tokens = self._positions = self._own_tokens = self._steps = 0

    def count(self, batch: PlannedBatch) -> None:
        self._steps += 1
        self._tokens += sum(one.tokens for one in batch.passes)
        self._positions += sum(one.positions for one in batch.passes)
        self._own_tokens += batch.own_tokens

    def pace(self) -> Pace:
        return Pace(
            device=self.device / self._tokens,
            cloud=self.cloud / self._positions,
            wire=self.wire / self._tokens,
            own=max(0.0, self.own) / self._own_tokens,
            update=self.update / self._steps,
        )


# Returns the seconds of a batch's passes and of what the device does beside them.
Simulate: TypeAlias = "Callable[[PlannedBatch, Pace, float, int], float]"


def time_at_sites(
    timer: StepTimer, model: DeviceModel, probes: Sequence[Probe], in_flight: int | None, simulate: Simulate
) -> tuple[Pace, float]:
    """Return the pace of a model whose modules are at sites, and what computing at once costs.

    Args:
        timer: Takes the steps.
        model: Its model.
        probes: Batches with their passes.
        in_flight: Micro-batches on their way at once; None as the backbone judges.
        simulate: Given the pace, the crowding (`plan.flight.Processors`), and how many are on their way at once.
    """
    backbone = cast("RemoteBackbone", model.backbone)
    times, sums, together, overlapped = backbone.connection.times, _Sums(), 0.0, []
    for batch, planned in probes:
        model.settings = replace(model.settings, in_flight=1)
        seconds, update, took = min((_timed(timer, times, batch) for _ in range(_REPEATS)), key=lambda step: step[0])
        sums.device, sums.cloud = sums.device + took.device, sums.cloud + took.cloud
        # One pass at a time waits for no turn but for moments.
        wire = took.wire + took.waiting
        sums.wire, sums.own = sums.wire + wire, sums.own + seconds - took.device - took.cloud - wire
        sums.update += update
        sums.count(planned)
        at_once = min(in_flight or backbone.passes_at_once(), len(planned.passes))
        model.settings = replace(model.settings, in_flight=at_once)
        together += min(_timed(timer, times, batch)[0] for _ in range(_REPEATS))
        overlapped.append((planned, at_once))
    model.settings = replace(model.settings, in_flight=in_flight)
    pace = sums.pace()
    return pace, fit_crowding(lambda crowding: sum(simulate(b, pace, crowding, n) for b, n in overlapped), together)


def _timed(timer: StepTimer, times: PassTimes, batch: dict[str, Tensor]) -> tuple[float, float, PassSeconds]:
    """Return the seconds of a step until its gradients, and after them, and where those of its passes went."""
    times.take_ended()
    seconds = timer.forward_and_backward(batch)
    took = times.take_ended()
    return seconds, timer.update(), took


def time_taps(
    timer: StepTimer, model: SideModel, probes: Sequence[Probe], at_once: int, simulate: Simulate
) -> tuple[Pace, float]:
    """Return the pace of a model with a side network, and what computing at once costs.

    The cloud does not say what a pass took that only reads: all of it counts as the cloud's.

    Args:
        timer: Takes the steps.
        model: Its model, with an empty cache.
        probes: Batches with the passes of all their examples.
        at_once: Examples on their way at once.
        simulate: As for `time_at_sites`.
    """
    source, sums, together = model.source, _Sums(), 0.0
    for batch, _ in probes:
        began = time.perf_counter()
        for number in range(len(batch["input_ids"])):
            model.read_taps({name: value[number : number + 1] for name, value in batch.items()})
        sums.cloud += time.perf_counter() - began
    # With all that the blocks give at hand, and read from the cache while the batch before is learned from.
    model.announce(probes[0][0])
    timer.forward_and_backward(probes[-1][0])
    for number, (batch, planned) in enumerate(probes):
        model.announce(probes[(number + 1) % len(probes)][0])
        sums.own += timer.forward_and_backward(batch)
        sums.update += timer.update()
        sums.count(planned)
    cache, source.cache = source.cache, None
    for batch, _ in probes:
        together += timer.forward_and_backward(batch)
        timer.update()
    source.cache = cache
    # Positions are tokens here: an example goes by itself, without padding.
    pace = sums.pace()
    return pace, fit_crowding(lambda crowding: sum(simulate(b, pace, crowding, at_once) for _, b in probes), together)


def fit_crowding(predicted: Callable[[float], float], measured: float) -> float:
    """Return the crowding with which a prediction, which grows with it, is what was measured; 0 where none is below."""
    low, high = 0.0, _MOST_CROWDED
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if predicted(middle) < measured else (low, middle)
    return low if low > _MOST_CROWDED / 2**_BISECTIONS else 0.0


def peak_bytes(pid: int | None = None) -> int:
    """Return the most that a process has had in memory; what it has now where the system does not say.

    Args:
        pid: Which process; None is this one.
    """
    status = Path(f"/proc/{pid or 'self'}/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process(pid).memory_info().rss)
