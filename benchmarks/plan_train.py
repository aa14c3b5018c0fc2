"""What `tidelock plan train` says of a run, against what `tidelock train` with the same options then takes.

SmolLM2 learns to go on with real texts of PIQA over shaped links: device and cloud are two processes on this machine,
with a proxy between them that delays and limits bandwidth (tests/support/link.py). First the command plans, from its
own timed steps; then a fresh cloud serves one run. Time is that of a step by `metrics.jsonl`, phase by phase, a real
token, as batches differ in length. A run's first step is left out: the windows of HTTP/2 open in it, and memory is
taken. Bytes are those of the ledger's epochs; memory is the most that each process has had.

    python benchmarks/plan_train.py --data ../shared/data
    python benchmarks/plan_train.py --data ../shared/data --links 40/50 --variants "core, int8, 8 of 30 modules"
    python benchmarks/plan_train.py --show        # the table of the last results, measuring nothing
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests.support: the same links as in the tests

from tests.support.link import Link
from tests.support.proxy import LinkProxy

RESULTS = Path(__file__).parent / "results" / "plan_train.json"
SHARED_CORES = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000"}
LINKS = ("loopback", "40/50")
AIM = 0.15
_EPOCH_STEPS = 6
_LAST_STEPS = 3
# Of each the options, but for how many steps there are.
VARIANTS = {
    "lora, bf16": ["--codec", "bf16", "--max-steps", str(_EPOCH_STEPS)],
    "core, int8, 8 of 30 modules": [
        *("--method", "core", "--codec", "int8", "--schedule", "kill-revive", "--budget", "8"),
        *("--period", str(_LAST_STEPS), "--max-steps", str(2 * _LAST_STEPS)),
    ],
    "side, bf16": ["--method", "side", "--codec", "bf16", "--max-steps", str(_EPOCH_STEPS + _LAST_STEPS)],
}


def main() -> None:
    """Plan and run every variant on every link, and write the JSON; print the table."""
    options = _options()
    if not options.show:
        os.environ.update(SHARED_CORES)
        _measure(options)
    print(table(json.loads(options.out.read_text())))


def _measure(options: argparse.Namespace) -> None:
    from tidelock.model.smollm2 import fetch_smollm2  # noqa: PLC0415  (--show needs none of it)

    options.model = options.model or str(fetch_smollm2(on_progress=print))
    result: dict[str, Any] = {"setting": _setting(options), "runs": []}
    with tempfile.TemporaryDirectory() as scratch:
        data = _write_examples(options, Path(scratch))
        for name in options.links:
            for title in options.variants:
                shared = [str(data), "--model", options.model, "--batch-size", str(options.batch)]
                shared += ["--threads", str(options.threads), *VARIANTS[title]]
                planned = _plan(shared, name)
                measured = _run(options, shared, name, Path(scratch) / "run" / name / title.replace(" ", "-"))
                result["runs"].append({"link": name, "variant": title, "planned": planned, "measured": measured})
                _write(options.out, result)
                print(*map(_line, _rows(result["runs"][-1])), sep="\n", flush=True)


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**result, **summarise(result)}, indent=1) + "\n")


def _plan(shared: list[str], name: str) -> dict[str, Any]:
    """Return what the command says before a run."""
    link = [] if name == "loopback" else ["--link", "{}ms,{}mbit".format(*name.split("/"))]
    command = [sys.executable, "-m", "tidelock", "plan", "train", *shared, *link, "--json"]
    planned: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return planned


def _run(options: argparse.Namespace, shared: list[str], name: str, out: Path) -> dict[str, Any]:
    """Run it over a link, and return what each step took, what crossed, and the most memory of both processes."""
    from tidelock.run.cloud_process import loopback_cloud  # noqa: PLC0415
    from tidelock.run.plan_probe import peak_bytes  # noqa: PLC0415

    link = parse_link(name)
    with loopback_cloud(options.model, "--threads", str(options.threads)) as cloud:
        port = int(cloud.address.rpartition(":")[2])
        with nullcontext() if link is None else LinkProxy(port, link=link) as proxy:
            address = f"grpcs://127.0.0.1:{port if proxy is None else proxy.port}"
            access = ["--backbone", "cloud", "--cloud", address, "--ca", str(cloud.certificate)]
            access += ["--token-file", str(cloud.token_file), "--out", str(out)]
            command = [sys.executable, "-m", "tidelock", "train", *shared, *access, "--json"]
            with subprocess.Popen(command, stdout=subprocess.DEVNULL) as device:
                memory = 0
                while device.poll() is None:
                    memory = max(memory, peak_bytes(device.pid))
                    time.sleep(0.1)
            if device.returncode:
                sys.exit(f"tidelock train ended with {device.returncode}")
        cloud_memory = peak_bytes(cloud.pid)
    return {"steps": _steps_of(out), "memory": memory, "cloud_memory": cloud_memory, "bytes": _crossed(out)}


def _steps_of(out: Path) -> list[dict[str, float]]:
    """Return the seconds and the tokens of each step; of what is cached, those of an epoch are not told again."""
    steps: list[dict[str, float]] = []
    before = 0
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row.get("timed_steps") != 1:
            continue
        tokens = sum(row["tokens"].get(kind, 0) for kind in ("trained", "evaluated"))
        steps.append({"seconds": sum(row["seconds"].values()), "tokens": tokens - before})
        before = tokens
    return steps


def _crossed(out: Path) -> int:
    """Return the bytes of all epochs; what describes the model to a device is of none, or of a side network's first."""
    ledger = json.loads((out / "ledger.json").read_text())
    return sum(sum(epoch[way].values()) for epoch in ledger["epochs"] if epoch["epoch"] for way in ("sent", "received"))


def parse_link(name: str) -> Link | None:
    """Return the link of a name such as 40/50: milliseconds there and back, Mbit/s each way; None is no proxy."""
    if name == "loopback":
        return None
    milliseconds, mbit = (float(part) for part in name.split("/"))
    return Link(delay_seconds=milliseconds / 2000, mbit_per_second=mbit)


def _rows(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each phase, planned and measured: seconds of a step; and once for the run bytes and memory."""
    planned, measured, rows, first = run["planned"], run["measured"], [], 0
    for phase in planned["phases"]:
        steps = measured["steps"][first : first + phase["steps"]]
        timed = steps if first else steps[1:]  # the first step of all is left out
        first += phase["steps"]
        seconds = sum(step["seconds"] for step in timed) / len(timed)
        # What was left out had more or fewer tokens than the others; from a cache none are counted.
        tokens, all_tokens = (sum(step["tokens"] for step in some) / len(some) for some in (timed, steps))
        a_step = seconds * (all_tokens / tokens if tokens else 1.0)
        title = run["variant"] if len(planned["phases"]) == 1 else f"{run['variant']}: {phase['name']}"
        rows.append({"link": run["link"], "title": title, **_pair("seconds", phase["seconds"], a_step)})
    size = sum(
        phase["steps"] * sum(sum(phase["step"][way].values()) for way in ("sent", "received"))
        for phase in planned["phases"]
    )
    rows[0] |= _pair("bytes", size, measured["bytes"])
    rows[0] |= _pair("memory", planned["device_memory_bytes"], measured["memory"])
    rows[0] |= _pair("cloud_memory", planned["cloud_memory_bytes"], measured["cloud_memory"])
    return rows


def _pair(name: str, planned: float, measured: float) -> dict[str, float]:
    return {name: measured, f"{name}_planned": planned, f"{name}_off": planned / measured - 1}


def summarise(result: dict[str, Any]) -> dict[str, Any]:
    """Return the rows of the table, and of each kind of prediction the furthest off with whether that meets the aim."""
    rows = [row for run in result["runs"] for row in _rows(run)]
    aims = []
    for name in ("seconds", "bytes", "memory", "cloud_memory"):
        furthest = max((row[f"{name}_off"] for row in rows if name in row), key=abs, default=0.0)
        aims.append({"aim": name, "furthest": furthest, "met": abs(furthest) <= AIM})
    return {"rows": rows, "aims": aims}


_AIMS = {"seconds": "time of a step", "bytes": "bytes", "memory": "the device's memory", "cloud_memory": "the cloud's"}


def table(result: dict[str, Any]) -> str:
    """Return the results as the tables of docs/planning.md."""
    lines = [
        "| link | run | s a step | MB in all | GB of the device; of the cloud |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        name = row["link"] if row["link"] == "loopback" else "{} ms, {} Mbit/s".format(*row["link"].split("/"))
        cells = [name, row["title"], _shown(row, "seconds", 1, "{:.2f}")]
        if "bytes" in row:
            memory = f"{_shown(row, 'memory', 1e9, '{:.2f}')}; {_shown(row, 'cloud_memory', 1e9, '{:.2f}')}"
            cells += [_shown(row, "bytes", 1e6, "{:.1f}"), memory]
        lines.append(f"| {' | '.join([*cells, '', ''][:5])} |")
    lines += ["", "| aim: within 15 % | furthest off | |", "| --- | --- | --- |"]
    for aim in result["aims"]:
        met = "met" if aim["met"] else "missed"
        lines.append(f"| {_AIMS[aim['aim']]} | {100 * aim['furthest']:+.1f} % | {met} |")
    return "\n".join(lines)


def _shown(row: dict[str, Any], name: str, unit: float, form: str) -> str:
    planned, measured = (form.format(row[key] / unit) for key in (f"{name}_planned", name))
    return f"{planned}, {measured} ({100 * row[f'{name}_off']:+.1f} %)"


def _line(row: dict[str, Any]) -> str:
    named = ", ".join(f"{_AIMS[name]} {100 * row[f'{name}_off']:+.1f} %" for name in _AIMS if name in row)
    return f"{row['link']:<9} {row['title']:<40} {row['seconds']:.2f} s/step; off: {named}"


def _write_examples(options: argparse.Namespace, folder: Path) -> Path:
    """Write the prompts of a task with their right answers, one epoch's worth, in a fixed order; return the file."""
    with gzip.open(Path(options.data) / options.task / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        read = [json.loads(line) for line in file]
    random.Random(0).shuffle(read)
    path = folder / "examples.jsonl"
    rows = (
        {"prompt": row["prompt"], "completion": " " + str(row["choices"][row["answer"]])}
        for row in read[: _EPOCH_STEPS * options.batch]
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _setting(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "task": options.task,
        "batch": options.batch,
        "threads": options.threads,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "grpcio")},
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", default="../shared/data", help="folder with one folder of *.jsonl.gz a task")
    parser.add_argument("--task", default="piqa")
    parser.add_argument("--model", help="folder or hub name; SmolLM2 by default")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--links", nargs="*", default=list(LINKS), metavar="LINK")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="print the table of the last results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
