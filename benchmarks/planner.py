"""How long planning takes, and the groupings of the PAC paper's Figure 10, from profiles derived from that paper.

Planning is timed on random unlike pools (every device, block and link has numbers of its own) and on equal devices,
which the search treats otherwise. Times are of one process on one core, each the median of some rounds.

For Figure 10 (arXiv 2408.10746: devices in each stage, for 2 to 8 Jetson Nanos) see `_nanos.py`; batches of 16 texts in
4 micro-batches. Where the plan groups otherwise, the best layout with the paper's groups is looked for, over all cuts.

    python benchmarks/planner.py
    python benchmarks/planner.py --rounds 1 --no-timing
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _nanos import MODELS, nano_profile

from tidelock.errors import ConfigError
from tidelock.plan.cost import AHEAD, Costs
from tidelock.plan.inputs import Profile, parse_profile
from tidelock.plan.partition import Outline, Shape, place
from tidelock.plan.plan import make_plan
from tidelock.plan.search import search

RESULTS = Path(__file__).parent / "results" / "planner.json"
BATCH, MICRO_BATCHES = 16, 4
# Into how many rows a text is divided, so that 4 texts can be shared evenly by 2, 3, 4, 6 or 8 devices.
PARTS = 6
# Devices in each stage; None: out of memory.
FIGURE_10: dict[str, dict[int, tuple[int, ...] | None]] = {
    "T5-Base": {2: (2,), 4: (4,), 6: (6,), 8: (8,)},
    "BART-Large": {2: (1, 1), 4: (2, 2), 6: (3, 3), 8: (4, 4)},
    "T5-Large": {2: None, 4: (2, 1, 1), 6: (2, 2, 2), 8: (3, 3, 2)},
}
SIZES = ((12, 4), (24, 6), (24, 8), (48, 8), (48, 16))


def main() -> None:
    """Run the benchmark, print tables, write the JSON."""
    parser = argparse.ArgumentParser(description="Time of planning, and the groupings of PAC's Figure 10.")
    parser.add_argument("--rounds", type=int, default=5, help="pools of each size")
    parser.add_argument("--no-timing", action="store_true", help="Figure 10 only, and write nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write the JSON")
    options = parser.parse_args()
    figure = figure_10()
    print(f"{'model':<12}{'devices':>8}  {'paper':<12}{'plan':<12}{'s a step':>9}  paper's groups")
    for row in figure:
        more = row["paper_costs_more"]
        note = "the same" if row["plan"] == row["paper"] else f"{more:+.2%}" if more is not None else "do not fit"
        seconds = f"{row['seconds']:.2f}" if row["seconds"] else ""
        print(f"{row['model']:<12}{row['devices']:>8}  {row['paper']:<12}{row['plan']:<12}{seconds:>9}  {note}")
    if options.no_timing:
        return
    result = {
        "benchmark": "planner",
        "versions": {"tidelock": version("tidelock"), "python": platform.python_version()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "batch_rows": BATCH,
        "micro_batches": MICRO_BATCHES,
        "planning": timings(options.rounds),
        "figure_10": figure,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {options.out}")


def timings(rounds: int) -> list[dict[str, Any]]:
    """Return how long the search takes for pools of some sizes."""
    found = []
    for blocks, devices in SIZES:
        for kind, count in (("unlike", rounds), ("equal", 1)):
            seconds, complete = [], 0
            for number in range(count):
                profile = random_profile(random.Random(number), blocks, devices, equal=kind == "equal")
                began = time.perf_counter()
                outcome = search(Costs(profile, BATCH, MICRO_BATCHES), Shape("any", devices, devices))
                seconds.append(time.perf_counter() - began)
                complete += outcome.complete
            row = {"blocks": blocks, "devices": devices, "pool": kind, "pools": count, "proved": complete}
            row |= {"median_seconds": statistics.median(seconds), "max_seconds": max(seconds)}
            found.append(row)
            print(
                f"{blocks} blocks, {devices} {kind} devices: {row['median_seconds']:.2f} s, {complete}/{count} proved"
            )
    return found


def random_profile(draw: random.Random, blocks: int, devices: int, *, equal: bool) -> Profile:
    """Return T5-Large's first blocks on devices of unlike speed, memory and links, or on equal ones."""
    values = nano_profile("T5-Large", devices)
    values["blocks"] = values["blocks"][:blocks]
    for device in values["devices"]:
        speed = 1.0 if equal else draw.uniform(0.3, 3)
        device["memory_bytes"] = int(device["memory_bytes"] * (1.0 if equal else draw.uniform(0.3, 3)))
        for name in ("forward_seconds", "backward_seconds"):
            device[name] = [
                [seconds / speed * (1.0 if equal else draw.uniform(0.8, 1.2)) for seconds in line[:blocks]]
                for line in device[name]
            ]
    if not equal:
        names = [device["name"] for device in values["devices"]]
        speeds = (draw.uniform(0.1, 2) for _ in itertools.count())
        default = values["links"]["default"]
        values["links"]["between"] = [
            {**default, "bytes_per_second": next(speeds) * default["bytes_per_second"], "devices": pair}
            for pair in itertools.combinations(names, 2)
        ]
    return parse_profile(json.dumps(values), "benchmark")


def figure_10() -> list[dict[str, Any]]:
    """Return the groupings of the paper and of the planner."""
    return [_compared(model, devices, paper) for model in MODELS for devices, paper in FIGURE_10[model].items()]


def _compared(model: str, devices: int, paper: tuple[int, ...] | None) -> dict[str, Any]:
    profile = parse_profile(json.dumps(nano_profile(model, devices, PARTS)), model)
    row: dict[str, Any] = {"model": model, "devices": devices, "paper": _shown(paper)}
    try:
        plan = make_plan(profile, BATCH * PARTS, MICRO_BATCHES)
    except ConfigError:
        return row | {"plan": _shown(None), "seconds": None, "is_proved": True, "paper_costs_more": None}
    groups = tuple(len(stage.devices) for stage in plan.stages)
    best = _best_of(profile, paper) if paper is not None else None
    more = None if best is None else best / plan.seconds - 1
    return row | {
        "plan": _shown(groups),
        "seconds": plan.seconds,
        "is_proved": plan.is_proved,
        "paper_costs_more": more,
    }


def _best_of(profile: Profile, sizes: tuple[int, ...]) -> float | None:
    """Return the seconds of the best layout of equal devices in groups of these sizes, over all cuts."""
    costs = Costs(profile, BATCH * PARTS // MICRO_BATCHES, MICRO_BATCHES)
    ends = list(itertools.accumulate(sizes))
    groups = tuple(tuple(range(end - size, end)) for size, end in zip(sizes, ends, strict=True))
    best = None
    for inner in itertools.combinations(range(1, costs.blocks), len(sizes) - 1):
        for ahead in AHEAD:
            stages = place(costs, Outline((0, *inner), groups), ahead)
            if stages is not None:
                seconds = costs.step_seconds(stages, ahead)
                best = seconds if best is None else min(best, seconds)
    return best


def _shown(groups: tuple[int, ...] | None) -> str:
    return "no memory" if groups is None else "-".join(str(size) for size in groups)


if __name__ == "__main__":
    main()
