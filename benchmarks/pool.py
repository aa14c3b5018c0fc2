"""Pools of one and two peers on this machine, each process pinned to a core of its own: time, and the plan against it.

A side network beside SmolLM2, LoRA in it, or all of its weights learn MRPC's pairs as texts: PAC's way next to what its
Table 2 compares it with (arXiv 2408.10746), Standalone on one device, Eco-FL as a straight pipeline and EDDL as data
parallelism. Variants take turns, so that what else the machine does hits all of them; the figures are medians over all
steps of all rounds. The first step of a run, which loads the blocks, and the first one of the later epochs count
nowhere. Memory is that of a peer's process after a step of the first epoch, less what a process takes that has the
libraries only.

    python benchmarks/pool.py --data ../shared/data
    python benchmarks/pool.py --show        # the tables of the last results, measuring nothing
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import psutil

from tidelock.data.example import LabelledText
from tidelock.data.source import read_examples
from tidelock.model.smollm2 import fetch_smollm2
from tidelock.run.folder import read_rows

RESULTS = Path(__file__).parent / "results" / "pool.json"
_DATA_PARALLEL = ("--stage", "0-29@0,1")
_STRAIGHT = ("--stage", "0-14@0", "--stage", "15-29@1", "--micro-batches", "4")
_LORA = ("--method", "lora")
_FULL = ("--method", "full")
# What is compared, by the options that say what is trained and who computes what.
VARIANTS: dict[str, tuple[str, ...]] = {
    "one peer": (),
    "two peers, data parallel": _DATA_PARALLEL,
    "two peers, straight pipeline": _STRAIGHT,
    "two peers, as planned": (),
    "LoRA, one peer (Standalone)": _LORA,
    "LoRA, two peers, straight pipeline (Eco-FL)": (*_LORA, *_STRAIGHT),
    "LoRA, two peers, data parallel (EDDL)": (*_LORA, *_DATA_PARALLEL),
    "LoRA, two peers, as planned": _LORA,
    "all weights, one peer (Standalone)": _FULL,
    "all weights, two peers, straight pipeline (Eco-FL)": (*_FULL, *_STRAIGHT),
    "all weights, two peers, data parallel (EDDL)": (*_FULL, *_DATA_PARALLEL),
}
# But for the side network nothing is cached: later epochs run the blocks as the first one does.
PHASES = ("first_epoch", "cached")


def main() -> None:
    """Run all variants in turn, and write the JSON after each round; print the tables."""
    options = _options()
    if options.show:
        print(tables(json.loads(options.out.read_text())))
        return
    model = str(fetch_smollm2(on_progress=print))
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        data = _write_data(options, Path(scratch))
        for round_ in range(options.rounds):
            for name in VARIANTS:
                run = _run(name, model, data, Path(scratch) / f"{round_}-{name}", options)
                runs.append({"variant": name, "round": round_, **run})
                print(f"round {round_}: {name}: {_medians(run)}", flush=True)
            result = {**_setting(options), "runs": runs, "summary": summarise(runs)}
            options.out.write_text(json.dumps(result) + "\n")
    print(tables(json.loads(options.out.read_text())))


def _write_data(options: argparse.Namespace, folder: Path) -> Path:
    """Write the task's pairs as prompts and completions."""
    examples = read_examples(str(options.data / "mrpc" / "train.jsonl.gz"))
    texts = [cast("LabelledText", example.content) for example in examples]
    random.Random(0).shuffle(texts)
    rows = [
        {
            "prompt": f"First: {text.text_a}\nSecond: {text.text_b}\nSame meaning:",
            "completion": " yes" if text.label else " no",
        }
        for text in texts[: options.examples]
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _run(name: str, model: str, data: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train once; return the seconds of steps by phase, and of a step as it was planned."""
    folder.mkdir(parents=True)
    count = 1 if "one peer" in name else 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    shared = ["--model", model, "--threads", "1", "--json"]
    if _method(name) == "side":
        shared += ["--cache-key", str(folder / "key")]
    size = ["--batch-size", str(options.batch_size), "--epochs", str(options.epochs)]
    lead = ["pool", "train", str(data), "--listen", where, "--peers", str(count), *VARIANTS[name], *size]
    commands = [[*lead, *shared, "--out", str(folder / "run")]]
    if count > 1:
        commands.append(["pool", "join", where, *shared, "--out", str(folder / "peer")])
    # What is measured of a device is measured here, not remembered from another run.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TIDELOCK_CACHE": str(folder / "cache")}
    processes = []
    for number, command in enumerate(commands):
        arguments = [sys.executable, "-m", "tidelock", *command]
        process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        psutil.Process(process.pid).cpu_affinity([number])
        processes.append(process)
    said = [process.communicate()[1].decode() for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("\n".join(said))
    timelines = json.loads((folder / "run" / "timelines.json").read_text())
    rows = [row for row in read_rows(folder / "run" / "metrics.jsonl") if "step_seconds" in row]
    first = [row["step_seconds"] for row in rows if row["epoch"] <= 1][1:]
    cached = [row["step_seconds"] for row in rows if row["epoch"] > 1][1:]
    seconds, memory = _planned(folder / "run" / "profile.json", options)
    measured = [timeline["memory_bytes"] for timeline in timelines]
    return {"first_epoch": first, "cached": cached, "planned": seconds, "memory": measured, "planned_memory": memory}


def _bytes_of_libraries() -> int:
    """Return what a peer's process takes before it has anything of a model."""
    program = "import psutil, tidelock.run.pool; print(psutil.Process().memory_info().rss)"
    return int(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)


def _planned(profile: Path, options: argparse.Namespace) -> tuple[float | None, list[int]]:
    """Return the seconds of a step and the bytes on each peer, as planned; none where nothing was."""
    if not profile.is_file():
        return None, []
    command = [
        sys.executable,
        "-m",
        "tidelock",
        "plan",
        "pool",
        str(profile),
        "--batch-rows",
        str(options.batch_size),
        "--json",
    ]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    plan = json.loads(printed)
    shares = [device for stage in plan["stages"] for device in stage["devices"]]
    # A device's name begins with its peer's number.
    by_peer = sorted(shares, key=lambda device: int(device["name"].partition(":")[0]))
    return plan["seconds"], [device["memory_bytes"] for device in by_peer]


def _medians(run: dict[str, Any]) -> str:
    return ", ".join(f"{phase} {statistics.median(run[phase]):.2f} s a step" for phase in PHASES)


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return for each variant the median seconds of a step by phase, and how many times quicker than one peer it is.

    That one peer trains the same.
    """
    found: dict[str, Any] = {}
    for name in (name for name in VARIANTS if any(run["variant"] == name for run in runs)):
        mine = [run for run in runs if run["variant"] == name]
        seconds = {phase: statistics.median(s for run in mine for s in run[phase]) for phase in PHASES}
        planned = [run["planned"] for run in mine if run["planned"] is not None]
        found[name] = {**seconds, "planned": statistics.median(planned) if planned else None}
        found[name]["memory"] = [statistics.median(each) for each in zip(*(run["memory"] for run in mine), strict=True)]
        memory = [run["planned_memory"] for run in mine if run["planned_memory"]]
        found[name]["planned_memory"] = [statistics.median(each) for each in zip(*memory, strict=True)]
        alone = next(found[other] for other in found if _method(other) == _method(name))
        for phase in PHASES:
            found[name][f"{phase}_speed_up"] = alone[phase] / seconds[phase]
    return found


def _method(name: str) -> str:
    options = VARIANTS[name]
    return options[options.index("--method") + 1] if "--method" in options else "side"


def _run_seconds(result: dict[str, Any], row: dict[str, Any]) -> float:
    """Return what all steps of a run take by the medians."""
    steps = math.ceil(result["examples"]["count"] / result["batch_size"])
    seconds: float = steps * (row["first_epoch"] + (result["epochs"] - 1) * row["cached"])
    return seconds


def tables(result: dict[str, Any]) -> str:
    """Return the results as the table of docs/pool.md."""
    examples, summary = result["examples"], result["summary"]
    setting = (
        f"{result['model']}, {examples['count']} texts of {examples['mean_tokens']:.0f} tokens in the mean, batches of "
        f"{result['batch_size']}, {result['rounds']} rounds, one core a peer. Seconds of a step; those "
        f"planned are of the first epoch. A run has {result['epochs']} epochs."
    )
    lines = [
        setting,
        "",
        "| | first epoch | against one peer | later epochs | against one peer | run | planned | MB a peer | planned |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in summary.items():
        planned = (
            "" if row["planned"] is None else f"{row['planned']:.2f} ({row['planned'] / row['first_epoch'] - 1:+.0%})"
        )
        cells = [f"{row['first_epoch']:.2f}", f"{row['first_epoch_speed_up']:.2f}x"]
        cells += [f"{row['cached']:.2f}", f"{row['cached_speed_up']:.2f}x"]
        cells += [f"{_run_seconds(result, row):.0f}"]
        less = [size - result["bytes_of_libraries"] for size in row["memory"]]
        off = [
            f"{size / 1e6:.0f} ({size / found - 1:+.0%})"
            for size, found in zip(row["planned_memory"], less, strict=bool(row["planned_memory"]))
        ]
        cells += [planned, ", ".join(f"{size / 1e6:.0f}" for size in less), ", ".join(off)]
        lines.append(f"| {name} | {' | '.join(cells)} |".replace("|  |", "| |"))
    return "\n".join(lines)


def _setting(options: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoTokenizer  # noqa: PLC0415  (only to count)

    tokenizer = AutoTokenizer.from_pretrained(str(fetch_smollm2(on_progress=print)))
    with tempfile.TemporaryDirectory() as folder:
        rows = [json.loads(line) for line in _write_data(options, Path(folder)).read_text().splitlines()]
    lengths = [len(tokenizer(row["prompt"] + row["completion"]).input_ids) + 1 for row in rows]
    return {
        "benchmark": "pool",
        "model": "SmolLM2-135M-Instruct",
        "examples": {"task": "mrpc", "count": len(rows), "mean_tokens": statistics.fmean(lengths)},
        "batch_size": options.batch_size,
        "epochs": options.epochs,
        "rounds": options.rounds,
        "versions": {name: version(name) for name in ("torch", "transformers", "tidelock")},
        "bytes_of_libraries": _bytes_of_libraries(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pools of one and two peers, and the plan against what is measured.")
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("TIDELOCK_DATA"), help="folder with mrpc/train.jsonl.gz"
    )
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write the JSON")
    parser.add_argument("--show", action="store_true", help="print the table of --out, and measure nothing")
    options = parser.parse_args()
    if options.data is None and not options.show:
        parser.error("expected --data or TIDELOCK_DATA with the folder of the tasks, got neither")
    options.data = None if options.data is None else Path(options.data)
    return options


if __name__ == "__main__":
    main()
