"""How long planning takes, and the groupings of the PAC paper's Figure 10, from profiles derived from that paper.

Planning is timed on random unlike pools (every device, block and link has numbers of its own) and on equal devices,
which the search treats otherwise. Times are of the processor: planning computes in one thread and waits for nothing.

Figure 10 shows the devices in each stage for 2 to 8 Jetson Nanos; here with batches of 16 texts in 4 micro-batches.
Where the plan groups otherwise, the best layout with the paper's groups is looked for, over all cuts.

The profiles. From the paper (Pluto and Charon, ICPP '24, doi 10.1145/3673038.3673043, arXiv 2408.10746): a Nano has
0.47 TFLOPS and its LAN 1000 Mb/s; the memory that a process can use is read off the line in its figure of memory, about
1.5 GB. Models are T5-Base, BART-Large and T5-Large in fp32, texts of 128 tokens; beside each block stands one of an
eighth of its width with as many heads, which is trained by Adam.

Derived, for a row of s tokens, width d, MLP width m, h heads; w = d / 8:

- weights: 4 d d in an encoder block's attention, 8 d d in a decoder block's two, 2 d m in its MLP; embedding with the
  first block, the head with the last one
- trained beside it: an eighth of the width is a 64th of these weights, and d w for the projection of the tap
- floating-point operations forward: 2 s for each of these weights; backward: 4 s for each trained one, none for others
- seconds: operations by a quarter of 0.47 TFLOPS. The quarter is an assumption
- kept for the backward: the tap (s d), what the side block needs (6 s w, 2 s m / 8, h s s; in a decoder 5 s w and h s s
  more). For T5-Large and 16 rows that is 2.4 GB. The paper's Table 1 has 5.33 GB of activations and optimizer for full
  fine-tuning, and the text up to 58.87 % less: 2.2 GB
- working memory: the frozen block's own activations while it runs, s (8 d + m) and 2 h s s
- what crosses: s (d + w) forward and s w back; between decoder blocks the encoder's output and its gradient too

It is assumed that the decoder reads texts of s tokens too.

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
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tidelock.errors import ConfigError
from tidelock.plan.cost import AHEAD, Costs
from tidelock.plan.inputs import Profile, parse_profile
from tidelock.plan.partition import Outline, Shape, place
from tidelock.plan.plan import make_plan
from tidelock.plan.search import search

RESULTS = Path(__file__).parent / "results" / "planner.json"
BATCH, MICRO_BATCHES = 16, 4
ROWS = 16  # of a micro-batch, where planning is timed
# Into how many rows a text is divided, so that 4 texts can be shared evenly by 2, 3, 4, 6 or 8 devices.
PARTS = 6
# Devices in each stage; None: out of memory.
FIGURE_10: dict[str, dict[int, tuple[int, ...] | None]] = {
    "T5-Base": {2: (2,), 4: (4,), 6: (6,), 8: (8,)},
    "BART-Large": {2: (1, 1), 4: (2, 2), 6: (3, 3), 8: (4, 4)},
    "T5-Large": {2: None, 4: (2, 1, 1), 6: (2, 2, 2), 8: (3, 3, 2)},
}
SIZES = ((12, 4), (24, 4), (24, 6), (24, 8), (48, 8), (48, 16))

SEQUENCE = 128
FLOPS = 0.47e12 * 0.25
MEMORY_BYTES = 1_500_000_000
BYTES_PER_SECOND = 125_000_000
LATENCY_SECONDS = 0.0005
_FLOAT = 4


@dataclass(frozen=True)
class Model:
    """A model's blocks in encoder and decoder, width, MLP width, heads, words."""

    encoder: int
    decoder: int
    width: int
    mlp: int
    heads: int
    words: int


MODELS = {
    "T5-Base": Model(12, 12, 768, 3072, 12, 32128),
    "BART-Large": Model(12, 12, 1024, 4096, 16, 50265),
    "T5-Large": Model(24, 24, 1024, 4096, 16, 32128),
}


def main() -> None:
    """Run the benchmark, print tables, write the JSON."""
    parser = argparse.ArgumentParser(description="Time of planning, and the groupings of PAC's Figure 10.")
    parser.add_argument("--rounds", type=int, default=5, help="pools of each size")
    parser.add_argument("--no-timing", action="store_true", help="Figure 10 only, and write nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write the JSON")
    options = parser.parse_args()
    figure = figure_10()
    print(figure_table(figure))
    if options.no_timing:
        return
    result: dict[str, Any] = {
        "benchmark": "planner",
        "versions": {"tidelock": version("tidelock"), "python": platform.python_version()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "planning": timings(options.rounds),
        "figure_10": figure,
    }
    print(planning_table(result["planning"]))
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {options.out}")


def figure_table(figure: list[dict[str, Any]]) -> str:
    """Return the groupings as a table for docs/pool.md."""
    lines = [
        "| model | Nanos | the paper | the plan | s a step | the paper's groups |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in figure:
        more = row["paper_costs_more"]
        note = "the same" if row["plan"] == row["paper"] else "do not fit" if more is None else f"{more:+.1%}"
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.2f}"
        lines.append(f"| {row['model']} | {row['devices']} | {row['paper']} | {row['plan']} | {seconds} | {note} |")
    return "\n".join(lines)


def planning_table(planning: list[dict[str, Any]]) -> str:
    """Return the times as a table for docs/pool.md."""
    lines = ["| blocks | devices | pools | median (longest) | proved |", "| --- | --- | --- | --- | --- |"]
    for row in planning:
        devices, pools = f"{row['devices']} {row['pool']}", row["pools"]
        seconds = f"{row['median_seconds']:.2f} s ({row['max_seconds']:.2f} s)"
        lines.append(f"| {row['blocks']} | {devices} | {pools} | {seconds} | {row['proved']} of {pools} |")
    return "\n".join(lines)


def timings(rounds: int) -> list[dict[str, Any]]:
    """Return how long the search takes for pools of some sizes."""
    found = []
    for blocks, devices in SIZES:
        for kind, count in (("unlike", rounds), ("equal", 1)):
            seconds, complete = [], 0
            for number in range(count):
                profile = random_profile(random.Random(number), blocks, devices, equal=kind == "equal")
                began = time.process_time()
                outcome = search(Costs(profile, ROWS, MICRO_BATCHES), Shape("any", devices, devices))
                seconds.append(time.process_time() - began)
                complete += outcome.complete
            row = {"blocks": blocks, "devices": devices, "pool": kind, "pools": count, "proved": complete}
            row |= {"median_seconds": statistics.median(seconds), "max_seconds": max(seconds)}
            found.append(row)
            print(
                f"{blocks} blocks, {devices} {kind} devices: {row['median_seconds']:.2f} s, {complete}/{count} proved"
            )
    return found


def random_profile(draw: random.Random, blocks: int, devices: int, *, equal: bool, model: str = "T5-Large") -> Profile:
    """Return a model's first blocks on devices of unlike speed, memory and links, or on equal ones."""
    values = nano_profile(model, devices)
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


def nano_profile(model: str, nanos: int, parts: int = 1) -> dict[str, Any]:
    """Return the profile of a model on so many Nanos, as JSON values.

    Args:
        model: One of `MODELS`.
        nanos: Devices.
        parts: Into how many rows a text is divided; 1 for real ones. PAC divides a micro-batch evenly, fractions of a
            text included; more parts let the planner do so too.
    """
    shape = MODELS[model]
    blocks = [_block(shape, number, parts) for number in range(shape.encoder + shape.decoder)]
    forward = [[_round(block.pop("forward_seconds")) for block in blocks]]
    backward = [[_round(block.pop("backward_seconds")) for block in blocks]]
    times = {"rows": [1], "forward_seconds": forward, "backward_seconds": backward}
    return {
        "format": "tidelock-pool-profile",
        "version": 1,
        "title": f"{model} with a side network on {nanos} Jetson Nanos",
        "blocks": blocks,
        "devices": [{"name": f"nano-{number}", "memory_bytes": MEMORY_BYTES, **times} for number in range(nanos)],
        "links": {"default": {"bytes_per_second": BYTES_PER_SECOND, "latency_seconds": LATENCY_SECONDS}},
    }


def _block(shape: Model, number: int, parts: int) -> dict[str, Any]:
    s, d, m, h = SEQUENCE, shape.width, shape.mlp, shape.heads
    w, last = d // 8, shape.encoder + shape.decoder - 1
    in_decoder = number >= shape.encoder
    weights = (8 if in_decoder else 4) * d * d + 2 * d * m
    trained = weights // 64 + d * w
    ends = shape.words * d if number in {0, last} else 0
    kept = s * d + 6 * s * w + 2 * s * m // 8 + h * s * s + (5 * s * w + h * s * s if in_decoder else 0)
    streams = 2 if in_decoder else 1
    return {
        "name": f"decoder.{number - shape.encoder}" if in_decoder else f"encoder.{number}",
        "parameter_bytes": _FLOAT * (weights + trained + ends),
        "gradient_bytes": _FLOAT * trained,
        "optimizer_bytes": 2 * _FLOAT * trained,
        "kept_bytes_per_row": _FLOAT * kept // parts,
        "working_bytes_per_row": _FLOAT * (s * (8 * d + m) + 2 * h * s * s) // parts,
        "forward_bytes_per_row": _FLOAT * streams * s * (d + w) // parts,
        "backward_bytes_per_row": _FLOAT * streams * s * w // parts,
        "forward_seconds": 2 * s * (weights + trained) / FLOPS / parts,
        "backward_seconds": 4 * s * trained / FLOPS / parts,
    }


def _round(seconds: float) -> float:
    return round(seconds, 7)


if __name__ == "__main__":
    main()
