"""Time per step and peak memory of split training, against `peft` in one process.

    (a) `peft` and `transformers` in one process
    (b) a tidelock device and a tidelock cloud, two processes, over TLS on loopback

Same model, batch, threads and steps; the sides take turns, round by round, so that a change of the machine's mood hits
both. Figures are ratios (b)/(a) of the same round: the median, with the smallest and the largest.

    python benchmarks/split_overhead.py
    python benchmarks/split_overhead.py --model HuggingFaceTB/SmolLM2-360M-Instruct --torch-device cuda
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch

RESULTS = Path(__file__).parent / "results"
SHARED_CORES = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000"}
TARGETS = ["q_proj", "k_proj", "v_proj"]


def main() -> None:
    """Run the benchmark, print a table, write the JSON."""
    options = _options()
    if options.worker is not None:
        _work(options)
        return
    # Here and not above: the workers must not load what they do not need.
    from tidelock.model.smollm2 import fetch_smollm2  # noqa: PLC0415
    from tidelock.run.cloud_process import loopback_cloud  # noqa: PLC0415

    model = options.model or str(fetch_smollm2(on_progress=print))
    cloud_options = ["--threads", str(options.threads), "--torch-device", options.torch_device]
    with ExitStack() as stack:
        cloud = stack.enter_context(loopback_cloud(model, *cloud_options))
        where = ["--cloud", cloud.address, "--token-file", str(cloud.token_file), "--ca", str(cloud.certificate)]
        sides = {"peft": stack.enter_context(_Side("peft", model, options, []))}
        for codec in ("fp32", "bf16", "int8"):
            sides[codec] = stack.enter_context(_Side("tidelock", model, options, [*where, "--codec", codec]))
        times: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(options.rounds + 1):
            for name, side in sides.items():
                seconds = side.run(options.steps)
                if number:  # the first round warms up
                    times[name].append(seconds / options.steps)
            print(f"round {number}: " + ", ".join(f"{name} {times[name][-1]:.3f} s" for name in sides if times[name]))
        memory = {name: side.peak_bytes() for name, side in sides.items()}
        memory["cloud"] = _peak_of(cloud.pid)
    _report(options, model, times, memory)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and memory of split training against peft in one process.")
    parser.add_argument("--model", help="model folder or hub name; SmolLM2-135M-Instruct by default")
    parser.add_argument("--torch-device", default="cpu", help="where (a) and the cloud compute: cpu or cuda")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of each process")
    parser.add_argument("--batch", type=int, default=8, help="examples in a step")
    parser.add_argument("--length", type=int, default=64, help="tokens in an example")
    parser.add_argument("--labelled", type=int, default=32, help="of them with a label, at the end")
    parser.add_argument("--in-flight", type=int, default=2, help="micro-batches of a batch, all on their way at once")
    parser.add_argument("--steps", type=int, default=3, help="steps in a round")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds")
    parser.add_argument("--out", type=Path, default=RESULTS / "split_overhead.json", help="where to write the JSON")
    parser.add_argument("--worker", choices=("peft", "tidelock"), help=argparse.SUPPRESS)
    parser.add_argument("--cloud", help=argparse.SUPPRESS)
    parser.add_argument("--token-file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ca", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--codec", help=argparse.SUPPRESS)
    return parser.parse_args()


class _Side:
    """One side of the comparison, in a process of its own that is told when to run."""

    def __init__(self, worker: str, model: str, options: argparse.Namespace, extra: list[str]) -> None:
        names = ("torch_device", "threads", "batch", "length", "labelled", "in_flight")
        shared = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", worker, "--model", model, *shared, *extra],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # As the command line has it where two processes share the cores; peft, alone, is best left as it is.
            env={**os.environ, **({} if worker == "peft" else SHARED_CORES)},
        )

    def __enter__(self) -> _Side:
        return self

    def __exit__(self, *_error: object) -> None:
        self._process.kill()
        self._process.wait()

    def run(self, steps: int) -> float:
        """Return the seconds that so many steps took."""
        return float(self._ask({"steps": steps})["seconds"])

    def peak_bytes(self) -> int:
        """Return the process's largest resident set so far."""
        return int(self._ask({"steps": 0})["peak_bytes"])

    def _ask(self, order: dict[str, int]) -> dict[str, Any]:
        stdin, stdout = cast("IO[str]", self._process.stdin), cast("IO[str]", self._process.stdout)
        stdin.write(json.dumps(order) + "\n")
        stdin.flush()
        # A worker that ended early has told why on stderr; its empty line is no JSON.
        answer: dict[str, Any] = json.loads(stdout.readline())
        return answer


def _work(options: argparse.Namespace) -> None:
    """Be one side: take orders on stdin, answer on stdout."""
    import torch  # noqa: PLC0415  (the parent process does not need it)

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = _peft_model(options) if options.worker == "peft" else _device_model(options)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    ids = torch.randint(1000, 40000, (options.batch, options.length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : options.length - options.labelled] = -100
    if options.worker == "peft":
        ids, labels = ids.to(options.torch_device), labels.to(options.torch_device)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(json.loads(line)["steps"]):
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if options.torch_device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "peak_bytes": peak}), flush=True)


def _peft_model(options: argparse.Namespace) -> torch.nn.Module:
    import torch  # noqa: PLC0415
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(options.torch_device)
    adapted: torch.nn.Module = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    return adapted


def _device_model(options: argparse.Namespace) -> torch.nn.Module:
    from peft import LoraConfig  # noqa: PLC0415

    import tidelock  # noqa: PLC0415

    return tidelock.connect(
        options.cloud,
        model=options.model,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS),
        token=options.token_file.read_text().strip(),
        ca=options.ca,
        codec=options.codec,
        in_flight=options.in_flight,
        micro_batches=options.in_flight,
    )


def _peak_of(pid: int) -> int:
    """Return the largest resident set of another process so far, or 0 where the system does not tell."""
    status = Path(f"/proc/{pid}/status")
    if not status.is_file():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _report(options: argparse.Namespace, model: str, times: dict[str, list[float]], memory: dict[str, int]) -> None:
    result: dict[str, Any] = {
        "benchmark": "split_overhead",
        "model": Path(model).name,
        "tokens_per_step": options.batch * options.length,
        "labelled_per_step": options.batch * options.labelled,
        "threads": options.threads,
        "in_flight": options.in_flight,
        "torch_device": options.torch_device,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "grpcio", "tidelock")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seconds_per_step": {name: statistics.median(values) for name, values in times.items()},
        "peak_memory_bytes": memory,
        "ratios": {},
    }
    print(f"\n{'side':<22}{'s/step':>8}  {'ratio to peft (min-max)':<28}{'peak memory':>12}  ratio")
    for name, values in times.items():
        ratios = [ours / theirs for ours, theirs in zip(values, times["peft"], strict=True)]
        share = memory[name] / memory["peft"]
        result["ratios"][name] = {
            "time": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
            "device_memory": share,
        }
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        title = "peft, one process" if name == "peft" else f"device + cloud, {name}"
        peak = f"{memory[name] / 1e6:.0f} MB"
        print(f"{title:<22}{statistics.median(values):>8.3f}  {spread:<28}{peak:>12}  {share:.2f}")
    print(f"{'the cloud process':<22}{'':>8}  {'':<28}{memory['cloud'] / 1e6:>9.0f} MB")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
