"""Simulated pools of 2 to 64 devices: what a plan gains over the layouts that are commonly used, and a cache over none.

Shaped as Figures 8, 9 and 11 of the PAC paper (Pluto and Charon, ICPP '24, doi 10.1145/3673038.3673043, arXiv
2408.10746); Figure 10 is in `planner.py`, whose profiles these are. Nothing runs: a step is what the simulator says.

- Texts per second of the plan, of a straight pipeline of single devices (the paper's Eco-FL) and of data parallelism
  (its EDDL), on equal Nanos and on unlike ones: speed, memory and links each 0.3 to 3 times, or a tenth to twice, a
  Nano's, the median of some pools. A batch has 4 texts a device, in 4 or 16 micro-batches, whichever is quicker.
- Seconds of a step on what is cached, on 8 Nanos: the side blocks alone, forward and backward, and a ring over all
  devices for their gradients. Reading the cache is not counted, nor is the head, here as in the profiles.
- How much less n epochs take with a cache than without: the first one runs the blocks, the others do not.

    python benchmarks/pool_sizes.py
    python benchmarks/pool_sizes.py --pools 1 --small
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script has its own folder there

from benchmarks.planner import FLOPS, MODELS, SEQUENCE, nano_profile, random_profile
from tidelock.plan.cost import Costs
from tidelock.plan.inputs import Profile, parse_profile
from tidelock.plan.partition import Shape
from tidelock.plan.search import search

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "pool_sizes.json"
PLOT = HERE.parent / "docs" / "pool-sizes.png"
SMALL, LARGE = (2, 4, 8), (16, 32, 64)
# Searching takes too long for more pools, or models, of the large sizes.
LARGE_MODEL, LARGE_POOLS = "BART-Large", 1
TEXTS_A_DEVICE = 4
# Plans are searched with the first alone, and with the others taken from where they are pipelines or data parallel.
MICRO_BATCHES = (4, 16)
KINDS = ("plan", "pipeline", "data parallel")
CACHED_DEVICES = 8
EPOCHS = (2, 4, 6, 8, 10)
# Of the paper: percent less time at `EPOCHS` with a cache (Figure 11), and percent more texts a second than a straight
# pipeline with the same adapters, smallest and largest (section 6).
FIGURE_11 = {"T5-Base": (28, 42, 47, 49, 51), "BART-Large": (26, 39, 44, 46, 47), "T5-Large": (39, 59, 66, 69, 71)}
OVER_PIPELINE = (39.50, 84.79)


def main() -> None:
    """Run the benchmark, print tables, write the JSON and the plot."""
    parser = argparse.ArgumentParser(description="Simulated pools of 2 to 64 devices.")
    parser.add_argument("--pools", type=int, default=3, help="unlike pools of each small size")
    parser.add_argument("--small", action="store_true", help="only pools of up to 8 devices")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write the JSON")
    parser.add_argument("--plot", type=Path, default=PLOT, help="where to write the plot")
    options = parser.parse_args()
    asked = [
        (model, devices, kind, 1 if kind == "equal" else LARGE_POOLS if devices in LARGE else options.pools)
        for devices in (*SMALL, *(() if options.small else LARGE))
        for model in (MODELS if devices in SMALL else (LARGE_MODEL,))
        for kind in ("equal", "unlike")
    ]
    with multiprocessing.Pool() as workers:
        sizes = workers.starmap(throughput, asked, chunksize=1)
    result: dict[str, Any] = {
        "benchmark": "pool_sizes",
        "versions": {"tidelock": version("tidelock"), "python": platform.python_version()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "sizes": sizes,
        "cache": [cached(model) for model in MODELS],
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    draw(result, options.plot)
    print(sizes_table(result), cache_table(result), f"written to {options.out} and {options.plot}", sep="\n\n")


def throughput(model: str, devices: int, kind: str, pools: int) -> dict[str, Any]:
    """Return the texts a second of the plan and of the other layouts; None where none fits in one of the pools."""
    found: dict[str, list[float]] = {name: [] for name in KINDS}
    shape = MODELS[model]
    for number in range(pools):
        # Drawn device by device: a larger pool has the devices of a smaller one.
        profile = random_profile(
            random.Random(number), shape.encoder + shape.decoder, devices, equal=kind == "equal", model=model
        )
        texts = TEXTS_A_DEVICE * devices
        seconds = [
            best_seconds(profile, Shape("any", devices, devices), texts, MICRO_BATCHES[:1]),
            best_seconds(profile, Shape("pipeline of single devices", devices, 1), texts),
            best_seconds(profile, Shape("data parallel", 1, devices), texts),
        ]
        seconds[0] = min((each for each in seconds if each is not None), default=None)
        for name, took in zip(KINDS, seconds, strict=True):
            found[name] += [] if took is None else [texts / took]
    row: dict[str, Any] = {"model": model, "pool": kind, "devices": devices, "pools": pools}
    row |= {name: statistics.median(each) if len(each) == pools else None for name, each in found.items()}
    print(row, flush=True)
    return row


def best_seconds(
    profile: Profile, shape: Shape, texts: int, micro_batches: tuple[int, ...] = MICRO_BATCHES
) -> float | None:
    """Return the seconds of the quickest layout of a shape that is found; None when none fits."""
    counts = [count for count in micro_batches if count <= texts]
    layouts = [search(Costs(profile, texts // count, count), shape).layouts for count in counts]
    return min((each[0].seconds for each in layouts if each), default=None)


def cached(model: str) -> dict[str, Any]:
    """Return the seconds of a step of the plan on equal Nanos, of one on what is cached, and what a cache saves."""
    texts = TEXTS_A_DEVICE * CACHED_DEVICES
    profile = parse_profile(json.dumps(nano_profile(model, CACHED_DEVICES)), model)
    step = best_seconds(profile, Shape("any", CACHED_DEVICES, CACHED_DEVICES), texts)
    if step is None:
        message = f"{model} does not fit on {CACHED_DEVICES} Nanos."
        raise ValueError(message)
    trained_bytes = sum(block.gradient_bytes for block in profile.blocks)
    # Three times the forward's operations: forward, and gradients of weights and of inputs.
    computing = 3 * 2 * SEQUENCE * (trained_bytes / 4) * TEXTS_A_DEVICE / FLOPS
    link, others = profile.links.default, CACHED_DEVICES - 1
    summing = 2 * others * (trained_bytes / CACHED_DEVICES / link.bytes_per_second + link.latency_seconds)
    later = computing + summing
    saved = [100 * (1 - (step + (count - 1) * later) / (count * step)) for count in EPOCHS]
    return {"model": model, "step_seconds": step, "cached_step_seconds": later, "saved_percent": saved}


def gains(result: dict[str, Any], kind: str, sizes: tuple[int, ...]) -> str:
    """Return by how many percent plans do more texts a second than a straight pipeline, where both fit."""
    rows = [row for row in result["sizes"] if row["pool"] == kind and row["devices"] in sizes and row["pipeline"]]
    found = sorted(100 * (row["plan"] / row["pipeline"] - 1) for row in rows)
    return f"{found[0]:.0f} to {found[-1]:.0f} %"


def sizes_table(result: dict[str, Any]) -> str:
    """Return texts a second as a table for docs/pool.md."""
    sizes = sorted({row["devices"] for row in result["sizes"]})
    lines = [
        "| model | devices | layout | " + " | ".join(map(str, sizes)) + " |",
        "| --- | --- | --- |" + " --- |" * len(sizes),
    ]
    for model in MODELS:
        for kind in ("equal", "unlike"):
            rows = {row["devices"]: row for row in result["sizes"] if (row["model"], row["pool"]) == (model, kind)}
            for name in KINDS:
                cells = [_cell(rows.get(size), name) for size in sizes]
                lines.append(f"| {model} | {kind} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None, name: str) -> str:
    if row is None:
        return ""
    return "no memory" if row[name] is None else f"{row[name]:.1f}"


def cache_table(result: dict[str, Any]) -> str:
    """Return what a cache saves as a table for docs/pool.md."""
    lines = [
        "| model | s a step | from the cache | " + " | ".join(f"{count} epochs" for count in EPOCHS) + " |",
        "| --- | --- | --- |" + " --- |" * len(EPOCHS),
    ]
    for row in result["cache"]:
        pairs = zip(row["saved_percent"], FIGURE_11[row["model"]], strict=True)
        saved = " | ".join(f"{own:.0f} % ({paper} %)" for own, paper in pairs)
        lines.append(f"| {row['model']} | {row['step_seconds']:.2f} | {row['cached_step_seconds']:.2f} | {saved} |")
    return "\n".join(lines)


def gains_sentence(result: dict[str, Any]) -> str:
    """Return the gains over a straight pipeline, beside the paper's, as a sentence for docs/pool.md."""
    small = gains(result, "equal", SMALL)
    return (
        f"On 2 to 8 equal devices plans do {small} more texts a second than a straight pipeline (the paper: "
        f"{OVER_PIPELINE[0]:.0f} to {OVER_PIPELINE[1]:.0f} %), on 16 to 64 "
        f"{gains(result, 'equal', LARGE)}; on unlike ones {gains(result, 'unlike', SMALL)} and "
        f"{gains(result, 'unlike', LARGE)}."
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw texts a second by number of devices, and what a cache saves by number of epochs."""
    import matplotlib  # noqa: PLC0415  (needs an extra)

    matplotlib.use("agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, grid = pyplot.subplots(2, 3, figsize=(12, 7), constrained_layout=True)
    styles = dict(zip(KINDS, (("-", "#2a78d6"), ("--", "#d1495b"), (":", "#6b6b6b")), strict=True))
    for axes, model in zip(grid[0], MODELS, strict=True):
        for kind, marker in (("equal", "o"), ("unlike", "^")):
            for name, (line, colour) in styles.items():
                points = [
                    (row["devices"], row[name])
                    for row in result["sizes"]
                    if (row["model"], row["pool"]) == (model, kind) and row[name] is not None
                ]
                if points:
                    axes.plot(*zip(*points, strict=True), line, color=colour, marker=marker, label=f"{name}, {kind}")
        axes.set(xscale="log", yscale="log", title=model, xlabel="devices", ylabel="texts a second")
        sizes = sorted({row["devices"] for row in result["sizes"]})
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    for axes, row in zip(grid[1], result["cache"], strict=True):
        axes.plot(EPOCHS, row["saved_percent"], "-", color="#2a78d6", marker="o", label="simulated")
        axes.plot(EPOCHS, FIGURE_11[row["model"]], "--", color="#d1495b", marker="s", label="the paper's Figure 11")
        axes.set(title=row["model"], xlabel="epochs", ylabel="% less time with a cache", ylim=(0, 100))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
