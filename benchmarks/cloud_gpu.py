"""One GPU that serves many devices, against `peft` alone on the same GPU.

    (a) `peft` and `transformers` in one process, LoRA on query, key and value
    (b) `tidelock cloud` on the GPU, and 1 to 64 device processes on the CPUs of the same machine, over TLS on loopback

The model has the geometry of a 7B LLaMA and random weights, in bf16 on both sides. Each device trains on batches of its
own, of the same shape as those of (a); what counts is the tokens that all devices together have trained on in a second.

    python benchmarks/cloud_gpu.py
    python benchmarks/cloud_gpu.py --devices 1 8 32 --variants "core, int8"
    python benchmarks/cloud_gpu.py --geometry tiny --torch-device cpu --devices 1 2 --seconds 2   # to try it
    python benchmarks/cloud_gpu.py --show        # the table of the last results, measuring nothing
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, cast

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

RESULTS = Path(__file__).parent / "results" / "cloud_gpu.json"
TARGETS = ["q_proj", "k_proj", "v_proj"]
# LLaMA-7B's (Touvron et al., arXiv 2302.13971); `tiny` is for the test of this file.
GEOMETRIES: dict[str, dict[str, int]] = {
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "vocab_size": 128,
    },
}
# What devices train, their codec, and in how many blocks (None is all of them).
VARIANTS: dict[str, tuple[str, str, int | None]] = {
    "core, int8": ("core", "int8", None),
    "core in 8 blocks, int8": ("core", "int8", 8),
    "lora in 4 blocks, int8": ("lora", "int8", 4),
    "lora, bf16": ("lora", "bf16", None),
}


def main() -> None:
    """Measure, write the JSON, print the table."""
    options = _options()
    if options.worker is not None:
        _work(options)
        return
    if not options.show:
        if options.torch_device is None:
            print("cloud_gpu: no GPU here, so nothing is measured. Name another place with --torch-device.")
            return
        with tempfile.TemporaryDirectory() as scratch:
            _measure(options, Path(scratch))
    print(table(json.loads(options.out.read_text())))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Many devices on one GPU, against peft on the same GPU.")
    parser.add_argument("--geometry", choices=list(GEOMETRIES), default="7b", help="of the model with random weights")
    gpu = "cuda" if torch.cuda.is_available() else None
    parser.add_argument("--torch-device", default=gpu, help="where peft and the cloud compute; the GPU by default")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="what they compute in")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="processes at once")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["core, int8"])
    parser.add_argument("--rows", type=int, default=8, help="examples in a batch")
    parser.add_argument("--length", type=int, default=256, help="tokens in an example")
    parser.add_argument("--labelled", type=int, default=4, help="of them with a label, at the end")
    parser.add_argument("--micro-batches", type=int, default=1, help="a device's batch is split into")
    parser.add_argument("--at-once", type=int, default=1, help="passes that the cloud computes at once")
    parser.add_argument("--seconds", type=float, default=10.0, help="to measure each number of devices for")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write the JSON")
    parser.add_argument("--show", action="store_true", help="print the table of --out, and measure nothing")
    parser.add_argument("--worker", choices=["peft", "device"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--cloud", help=argparse.SUPPRESS)
    parser.add_argument("--token-file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ca", help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(options: argparse.Namespace, scratch: Path) -> None:
    # Here and not above: the workers must not load what they do not need.
    from tidelock.run.cloud_process import loopback_cloud  # noqa: PLC0415

    folder = _random_model(options, scratch / "model")
    result = _setting(options)
    memory = Memory(options.torch_device)
    with _Worker("peft", options, ["--folder", str(folder)]) as peft:
        memory.watch(peft.pid)
        peft.run(options.seconds / 4)
        rate = peft.run(options.seconds)["tokens_per_second"]
        result["peft"] = {"tokens_per_second": rate, "memory_bytes": memory.take()}
    print(f"peft: {rate:.0f} tokens/s", flush=True)
    # Devices take the ends that the cloud gives, and keep them here.
    os.environ["TIDELOCK_CACHE"] = str(scratch / "cache")
    most = max(options.devices) * options.micro_batches
    cloud_options = ["--torch-device", options.torch_device, "--dtype", options.dtype]
    cloud_options += ["--max-sessions", str(most), "--at-once", str(options.at_once)]
    with loopback_cloud(str(folder), *cloud_options) as cloud:
        memory.watch(cloud.pid)
        access = ["--cloud", cloud.address, "--token-file", str(cloud.token_file), "--ca", str(cloud.certificate)]
        for variant in options.variants:
            for row in _with_devices(options, [*access, "--variant", variant], memory):
                result["runs"].append({"variant": variant, **row})
                share = row["tokens_per_second"] / rate
                print(f"{variant}: {row['devices']} devices, {row['tokens_per_second']:.0f} tokens/s, {share:.2f}")
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(result, indent=1) + "\n")


def _with_devices(options: argparse.Namespace, access: list[str], memory: Memory) -> Iterator[dict[str, Any]]:
    """Yield what more and more devices together come to."""
    with ExitStack() as stack:
        devices: list[_Worker] = []
        for count in sorted(options.devices):
            while len(devices) < count:
                devices.append(stack.enter_context(_Worker("device", options, [*access, "--seed", str(len(devices))])))
                if len(devices) == 1:
                    devices[0].run(0)  # has the ends fetched, which the others then find
            _all_run(devices, options.seconds / 4)
            memory.take()
            cpu = psutil.cpu_times()
            began = time.perf_counter()
            outcomes = _all_run(devices, options.seconds)
            taken = time.perf_counter() - began
            busy = sum(psutil.cpu_times()[:3]) - sum(cpu[:3])
            rates = [outcome["tokens_per_second"] for outcome in outcomes]
            yield {
                "devices": count,
                "tokens_per_second": sum(rates),
                "slowest": min(rates),
                "fastest": max(rates),
                "memory_bytes": memory.take(),
                "cores_busy": busy / taken,
            }


def _all_run(devices: list[_Worker], seconds: float) -> list[dict[str, float]]:
    for device in devices:
        device.order(seconds)
    return [device.answer() for device in devices]


class Memory:
    """The most memory in use: on a GPU all that is taken of it, else the resident set of the watched process."""

    def __init__(self, torch_device: str) -> None:
        self._gpu = torch_device if torch_device != "cpu" else None
        self._process: psutil.Process | None = None
        self._lock = threading.Lock()
        # What this process takes of the GPU to ask about it, and whoever else is there, is not counted.
        self._before = self._size()
        self._peak = 0
        threading.Thread(target=self._sample, daemon=True).start()

    def watch(self, pid: int) -> None:
        """Look at another process from here on."""
        self._process = psutil.Process(pid)
        self.take()

    def take(self) -> int:
        """Return the largest size since the last call, in bytes."""
        with self._lock:
            peak, self._peak = max(self._peak, self._size()), 0
        return peak - self._before

    def _sample(self) -> None:
        while True:
            with self._lock:
                self._peak = max(self._peak, self._size())
            time.sleep(0.05)

    def _size(self) -> int:
        if self._gpu is not None:
            free, total = torch.cuda.mem_get_info(self._gpu)
            return total - free
        try:
            return 0 if self._process is None else int(self._process.memory_info().rss)
        except psutil.NoSuchProcess:
            return 0


class _Worker:
    """`peft`, or a device, in a process of its own that is told for how long to train."""

    def __init__(self, kind: str, options: argparse.Namespace, extra: list[str]) -> None:
        names = ("geometry", "torch_device", "dtype", "rows", "length", "labelled", "micro_batches")
        shared = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", kind, *shared, *extra],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.pid = self._process.pid

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_error: object) -> None:
        self._process.kill()
        self._process.wait()

    def run(self, seconds: float) -> dict[str, float]:
        """Train so long; return what came of it."""
        self.order(seconds)
        return self.answer()

    def order(self, seconds: float) -> None:
        """Have it train so long."""
        stdin = cast("IO[str]", self._process.stdin)
        stdin.write(f"{seconds}\n")
        stdin.flush()

    def answer(self) -> dict[str, float]:
        """Return what came of the last order; a worker that ended early has told why on stderr."""
        outcome: dict[str, float] = json.loads(cast("IO[str]", self._process.stdout).readline())
        return outcome


def _work(options: argparse.Namespace) -> None:
    """Be `peft` or a device: take orders on stdin, answer on stdout."""
    torch.manual_seed(options.seed)
    model = _peft_model(options) if options.worker == "peft" else _device_model(options)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    ids = torch.randint(3, GEOMETRIES[options.geometry]["vocab_size"], (options.rows, options.length))
    labels = ids.clone()
    labels[:, : options.length - options.labelled] = -100
    where = options.torch_device if options.worker == "peft" else "cpu"
    ids, labels = ids.to(where), labels.to(where)
    for line in sys.stdin:
        steps, began = 0, time.perf_counter()
        while time.perf_counter() - began < float(line):
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            if where == "cuda":
                torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        rate = steps * ids.numel() / seconds if steps else 0.0
        print(json.dumps({"steps": steps, "tokens_per_second": rate}), flush=True)


def _peft_model(options: argparse.Namespace) -> nn.Module:
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415

    plain = AutoModelForCausalLM.from_pretrained(options.folder, dtype=_dtype(options)).to(options.torch_device)
    adapted: nn.Module = get_peft_model(plain, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    return adapted


def _device_model(options: argparse.Namespace) -> nn.Module:
    import tidelock  # noqa: PLC0415

    method, codec, blocks = VARIANTS[options.variant]
    count = GEOMETRIES[options.geometry]["num_hidden_layers"]
    # Spread evenly, the lowest one of them not at the bottom: where a schedule would leave them.
    layers = [count * (2 * index + 1) // (2 * blocks) for index in range(blocks)] if blocks else list(range(count))
    config: Any
    if method == "core":
        config = tidelock.CoreConfig(layers=tuple(layers))
    else:
        from peft import LoraConfig  # noqa: PLC0415

        config = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, layers_to_transform=layers)
    return tidelock.connect(
        options.cloud,
        peft_config=config,
        token=options.token_file.read_text().strip(),
        ca=options.ca,
        codec=codec,
        micro_batches=options.micro_batches,
    )


def _random_model(options: argparse.Namespace, folder: Path) -> Path:
    settings: dict[str, Any] = {**GEOMETRIES[options.geometry], "max_position_embeddings": 2048}
    config = LlamaConfig(**settings)
    with torch.device(options.torch_device):
        model = AutoModelForCausalLM.from_config(config, dtype=_dtype(options))
    model.save_pretrained(folder)
    del model
    if options.torch_device == "cuda":
        torch.cuda.empty_cache()
    return folder


def _dtype(options: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if options.dtype == "bf16" else torch.float32


def _setting(options: argparse.Namespace) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if options.torch_device == "cuda" else None
    return {
        "benchmark": "cloud_gpu",
        "geometry": options.geometry,
        "parameters": GEOMETRIES[options.geometry],
        "dtype": options.dtype,
        "rows": options.rows,
        "length": options.length,
        "labelled": options.labelled,
        "micro_batches": options.micro_batches,
        "at_once": options.at_once,
        "seconds": options.seconds,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "grpcio")},
        "machine": f"{gpu or 'no GPU'}, {platform.machine()}, {os.cpu_count()} cores",
        "runs": [],
    }


def table(result: dict[str, Any]) -> str:
    """Return the results as the table of docs/cloud.md."""
    peft = result["peft"]
    head = ["", "devices", "tokens/s", "of peft's", "slowest of fastest", "GPU memory", "of peft's", "CPU cores busy"]
    body = [["`peft` alone", "", f"{peft['tokens_per_second']:,.0f}", "1.00", "", _gb(peft), "1.00", ""]]
    for run in result["runs"]:
        share = run["tokens_per_second"] / peft["tokens_per_second"]
        memory = run["memory_bytes"] / peft["memory_bytes"]
        evenness = run["slowest"] / run["fastest"]
        numbers = [f"{run['tokens_per_second']:,.0f}", f"{share:.2f}", f"{evenness:.2f}"]
        numbers += [_gb(run), f"{memory:.2f}", f"{run['cores_busy']:.1f}"]
        body.append([run["variant"], str(run["devices"]), *numbers])
    rows = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |").replace("|  |", "| |") for row in rows)


def _gb(run: dict[str, Any]) -> str:
    return f"{run['memory_bytes'] / 1e9:.1f} GB"


if __name__ == "__main__":
    main()
