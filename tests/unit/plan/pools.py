"""Random pools, and a planner and a simulator for them that are slow and share no code with tidelock's."""

from __future__ import annotations

import functools
import itertools
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from tidelock.plan.inputs import Profile, parse_profile
from tidelock.plan.simulate import StageTimes

Event = tuple[Any, ...]


def random_pool(draw: random.Random, blocks: int, devices: int, memory: tuple[float, float] = (0.5, 8.0)) -> Profile:
    """Return a pool of unlike devices, whose memory is so many times what blocks would take if shared evenly."""
    names = [f"device-{number}" for number in range(devices)]
    made_blocks = [random_block(draw, number) for number in range(blocks)]
    size = sum(sum(block[name] for name in ("parameter_bytes", "gradient_bytes")) for block in made_blocks)
    pairs = [pair for pair in itertools.combinations(names, 2) if draw.random() < 0.3]
    profile = {
        "format": "tidelock-pool-profile",
        "version": 1,
        "title": "random",
        "blocks": made_blocks,
        "devices": [random_device(draw, name, blocks, size / devices * draw.uniform(*memory)) for name in names],
        "links": {
            "default": random_link(draw),
            "between": [random_link(draw) | {"devices": pair} for pair in pairs],
        },
    }
    return parse_profile(json.dumps(profile), "random")


def random_block(draw: random.Random, number: int) -> dict[str, Any]:
    return {
        "name": f"block-{number}",
        "parameter_bytes": draw.randint(500, 1500),
        "gradient_bytes": draw.randint(0, 200),
        "optimizer_bytes": draw.randint(0, 200),
        "kept_bytes_per_row": draw.randint(0, 100),
        "working_bytes_per_row": draw.randint(0, 100),
        "forward_bytes_per_row": draw.randint(0, 200),
        "backward_bytes_per_row": draw.randint(0, 200),
    }


def random_device(draw: random.Random, name: str, blocks: int, memory: float) -> dict[str, object]:
    slowness = draw.uniform(0.3, 3)
    rows = sorted(draw.sample([1, 2, 3, 4, 6], draw.randint(1, 3)))

    def table(factor: float) -> list[list[float]]:
        fixed = draw.uniform(0, 1)
        return [[slowness * factor * draw.uniform(0.5, 1.5) * (fixed + count) for _ in range(blocks)] for count in rows]

    return {
        "name": name,
        "memory_bytes": int(memory),
        "rows": rows,
        "forward_seconds": table(1.0),
        "backward_seconds": table(draw.uniform(0.2, 3)),
    }


def random_link(draw: random.Random) -> dict[str, object]:
    return {"bytes_per_second": draw.uniform(50, 5000), "latency_seconds": draw.choice([0.0, draw.uniform(0, 0.5)])}


def slow_simulation(stages: list[StageTimes], micro_batches: int) -> float:
    """Return a step's seconds as the longest way through a graph of everything that waits for something else."""
    waits: dict[Event, list[Event]] = defaultdict(list)
    takes: dict[Event, float] = {}
    for index, stage in enumerate(stages):
        window = min(stage.in_flight, micro_batches)
        order = [("F", index, number) for number in range(window)]
        for number in range(micro_batches):
            order.append(("B", index, number))
            if number + window < micro_batches:
                order.append(("F", index, number + window))
        for one, following in itertools.pairwise(order):
            waits[following].append(one)
        for number in range(micro_batches):
            takes["F", index, number] = stage.forward
            takes["B", index, number] = stage.backward
            if index + 1 < len(stages):
                hop(waits, takes, ("F", index, number), ("F", index + 1, number), stage.send_forward, stage.latency)
                hop(waits, takes, ("B", index + 1, number), ("B", index, number), stage.send_backward, stage.latency)
        takes["R", index] = stage.all_reduce
        waits["R", index] = [("B", index, micro_batches - 1)]

    @functools.cache
    def end(event: Event) -> float:
        return takes[event] + max((end(before) for before in waits[event]), default=0.0)

    return max(end(("R", index)) for index in range(len(stages)))


def hop(waits, takes, sender: Event, receiver: Event, sends: float, latency: float) -> None:
    kind, index, number = sender
    link, travel = ("link", kind, index, number), ("travel", kind, index, number)
    takes[link], takes[travel] = sends, latency
    waits[link] = [sender] + ([("link", kind, index, number - 1)] if number else [])
    waits[travel] = [link]
    waits[receiver].append(travel)


def seconds(profile: Profile, device: int, blocks: range, rows: int) -> tuple[float, float]:
    """Return a device's forward and backward of blocks, by the profile's measured sizes."""
    return (
        sum(seconds_of(profile.devices[device].rows, profile.devices[device].forward_seconds, b, rows) for b in blocks),
        sum(
            seconds_of(profile.devices[device].rows, profile.devices[device].backward_seconds, b, rows) for b in blocks
        ),
    )


def seconds_of(measured: tuple[int, ...], table: tuple[tuple[float, ...], ...], block: int, rows: int) -> float:
    """Return a block's seconds: measured, between two, or beyond; and never less than for fewer rows."""

    def at(count: int) -> float:
        if count <= measured[0]:
            return table[0][block]
        if count >= measured[-1]:
            return table[-1][block] * count / measured[-1]
        high = next(i for i, size in enumerate(measured) if size >= count)
        share = (count - measured[high - 1]) / (measured[high] - measured[high - 1])
        return table[high - 1][block] + share * (table[high][block] - table[high - 1][block])

    return max(at(count) for count in range(1, rows + 1))


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Yield all ways to share rows, at least one each."""
    if parts == 1:
        yield (total,)
        return
    for first in range(1, total - parts + 2):
        for rest in compositions(total - first, parts - 1):
            yield (first, *rest)


class BruteForce:
    """Looks at every layout of a pool: all cuts, all groups in all orders, all shares, both kinds of in flight."""

    def __init__(self, profile: Profile, rows: int, micro_batches: int) -> None:
        self.profile, self.rows, self.micro_batches = profile, rows, micro_batches
        self.times = functools.cache(lambda device, first, end, rows: seconds(profile, device, range(first, end), rows))
        self.shares = functools.cache(self._shares)

    def best(self) -> float:
        """Return the least seconds of a step; infinite when nothing fits."""
        every = range(len(self.profile.devices))
        return min((self._best_of(groups) for groups in ordered_groups(frozenset(every))), default=float("inf"))

    def _best_of(self, groups: tuple[tuple[int, ...], ...]) -> float:
        best, blocks = float("inf"), len(self.profile.blocks)
        for inner in itertools.combinations(range(1, blocks), len(groups) - 1):
            cuts = (0, *inner, blocks)
            for ahead in (1, 2):
                options = [
                    self.shares(first, end, group, len(groups) - 1 - index, ahead)
                    for index, (first, end, group) in enumerate(zip(cuts, cuts[1:], groups, strict=False))
                ]
                for chosen in itertools.product(*options):
                    best = min(best, self._seconds(cuts, groups, chosen, ahead))
        return best

    def _seconds(self, cuts, groups, chosen, ahead: int) -> float:
        stages = []
        for index, ((forward, backward), group) in enumerate(zip(chosen, groups, strict=True)):
            in_flight = min(self.micro_batches, 1 + ahead * (len(groups) - 1 - index))
            size = sum(self.profile.blocks[block].gradient_bytes for block in range(cuts[index], cuts[index + 1]))
            reduce = 0.0
            if len(group) > 1 and size:
                speed, latency = self.slowest(itertools.combinations(group, 2))
                reduce = 2 * (len(group) - 1) * (size / len(group) / speed + latency)
            send = (0.0, 0.0, 0.0)
            if index + 1 < len(groups):
                speed, latency = self.slowest(itertools.product(group, groups[index + 1]))
                block = self.profile.blocks[cuts[index + 1] - 1]
                send = (
                    self.rows * block.forward_bytes_per_row / speed,
                    self.rows * block.backward_bytes_per_row / speed,
                    latency,
                )
            stages.append(StageTimes(forward, backward, in_flight, reduce, *send))
        if max(self.micro_batches * (stage.forward + stage.backward) for stage in stages) > self.known:
            return float("inf")
        return slow_simulation(stages, self.micro_batches)

    known = float("inf")  # a time that is reached: slower stages need no simulation

    def slowest(self, pairs) -> tuple[float, float]:
        links = [self.profile.link(one, other) for one, other in pairs]
        return min(link.bytes_per_second for link in links), max(link.latency_seconds for link in links)

    def _shares(
        self, first: int, end: int, group: tuple[int, ...], behind: int, ahead: int
    ) -> list[tuple[float, float]]:
        """Return seconds forward and backward of all shares that fit, without those that another one beats in both."""
        here, before = (min(self.micro_batches, 1 + ahead * count) for count in (behind, behind + 1))
        held = self.profile.blocks[first:end]
        fixed = sum(b.parameter_bytes + b.gradient_bytes + b.optimizer_bytes for b in held)
        per_row = here * sum(b.kept_bytes_per_row for b in held) + max(b.working_bytes_per_row for b in held)
        for at, count in ((first, before), (end, here)):
            if 0 < at < len(self.profile.blocks):
                block = self.profile.blocks[at - 1]
                per_row += count * (block.forward_bytes_per_row + block.backward_bytes_per_row)
        found = set()
        for shares in compositions(self.rows, len(group)):
            fits = all(
                fixed + per_row * rows <= self.profile.devices[device].memory_bytes
                for device, rows in zip(group, shares, strict=True)
            )
            if fits:
                times = [self.times(device, first, end, rows) for device, rows in zip(group, shares, strict=True)]
                found.add((max(forward for forward, _ in times), max(backward for _, backward in times)))
        return [one for one in found if not any(o != one and o[0] <= one[0] and o[1] <= one[1] for o in found)]


def ordered_groups(devices: frozenset[int]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Yield all sequences of disjoint groups of some of the devices, at least one group."""
    for size in range(1, len(devices) + 1):
        for group in itertools.combinations(sorted(devices), size):
            yield (group,)
            for rest in ordered_groups(devices - set(group)):
                yield (group, *rest)
