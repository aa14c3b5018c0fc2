"""What encoding and decoding cost as a share of a training step, for every codec; the aim is less than 10 %.

Device and cloud are this one process, over TLS on loopback, so that the work of both is counted: every tensor is
encoded on one side and decoded on the other. Counted are `Codec.encode`, `Codec.decode` with the widening of bf16 to
fp32, and the check of what was sent (`Distortion.measure`); not what is the same for every codec, such as cutting into
messages.

Times are of the processor, not of the clock: the codecs' threads (`time.thread_time`) against the whole process
(`time.process_time`), with one thread for each computation. So it changes little when the machine is busy with other
things, or the two sides wait for each other. The codecs take turns, round by round.

    python benchmarks/codecs.py
    python benchmarks/codecs.py --model HuggingFaceTB/SmolLM2-360M-Instruct --rounds 9
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from peft import LoraConfig

import tidelock
from tidelock.cloud.server import CloudServer, Listener
from tidelock.cloud.tenants import Tenants
from tidelock.model.load import ModelChoice
from tidelock.model.smollm2 import fetch_smollm2
from tidelock.run.certificates import make_loopback_certificate
from tidelock.wire.address import parse_listen
from tidelock.wire.codec import Codec
from tidelock.wire.distortion import Distortion
from tidelock.wire.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = Path(__file__).parent / "results"
AIM = 0.10
TOKEN = "loopback-for-the-benchmark"  # noqa: S105  (of a cloud that ends with this process)
# Arguments of `tidelock.connect` by the name in the table.
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {"codec": "fp32"},
    "bf16": {"codec": "bf16"},
    "int8": {"codec": "int8"},
    "int8, stochastic gradients": {"codec": "int8", "stochastic_rounding": True},
    "int4": {"codec": "int4"},
}
# What is timed, by the name in the results.
TIMED: dict[str, tuple[type, str]] = {
    "encode": (Codec, "encode"),
    "decode": (Codec, "decode"),
    "check": (Distortion, "measure"),
}


def main() -> None:
    """Run the benchmark, print a table, write the JSON."""
    options = _options()
    torch.set_num_threads(1)
    model = options.model or str(fetch_smollm2(on_progress=print))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        certificate, key = make_loopback_certificate(folder)
        listener = Listener(parse_listen("127.0.0.1:0", tls=True), certificate, key)
        server = CloudServer(ModelChoice(model), Tenants({"loopback": TOKEN}), listener)
        address = server.start().url
        stack.callback(server.stop, 0)
        sides = {name: _Side(address, model, certificate, options, codecs) for name, codecs in VARIANTS.items()}
        stopwatch = Stopwatch()
        for name, (owner, method) in TIMED.items():
            timed = stopwatch.timed(name, getattr(owner, method))
            stack.enter_context(mock.patch.object(owner, method, timed))
        for number in range(options.rounds + 1):
            for name, side in sides.items():
                side.run(options.steps, stopwatch, keep=number > 0)  # the first round warms up
                if number:
                    print(f"round {number}: {name}: {side.shares()[-1]:.2%} of {side.step_seconds[-1]:.2f} CPU s")
        _report(options, model, sides)
        for side in sides.values():
            side.model.close()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Encoding and decoding as a share of a training step.")
    parser.add_argument("--model", help="model folder or hub name; SmolLM2-135M-Instruct by default")
    parser.add_argument("--batch", type=int, default=8, help="examples in a step")
    parser.add_argument("--length", type=int, default=64, help="tokens in an example")
    parser.add_argument("--labelled", type=int, default=32, help="of them with a label, at the end")
    parser.add_argument("--steps", type=int, default=2, help="steps in a round")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds")
    parser.add_argument("--out", type=Path, default=RESULTS / "codecs.json", help="where to write the JSON")
    return parser.parse_args()


class Stopwatch:
    """Adds up the processor's seconds that this process's threads spend in some functions."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = threading.local()
        self._seconds = dict.fromkeys(TIMED, 0.0)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that is timed, unless another one that is timed calls it."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  (as the function has it)
            if getattr(self._inside, "timed", False):
                return function(*args, **kwargs)
            self._inside.timed = True
            began = time.thread_time()
            try:
                result = function(*args, **kwargs)
                if isinstance(result, torch.Tensor) and result.dtype is torch.bfloat16:
                    result.to(torch.float32)  # as whoever asked for it does next
            finally:
                self._inside.timed = False
                with self._lock:
                    self._seconds[name] += time.thread_time() - began
            return result

        return wrapper

    def take(self) -> dict[str, float]:
        """Return the seconds since the last call."""
        with self._lock:
            seconds, self._seconds = self._seconds, dict.fromkeys(TIMED, 0.0)
        return seconds


class _Side:
    """A device with its codecs, and what was measured of it.

    Attributes:
        model: Trained by `run`.
        ledger: Of its connection.
        step_seconds: The processor's seconds of a mean step, one entry a round.
        codec_seconds: Likewise, by what they went to.
    """

    def __init__(
        self, address: str, model: str, certificate: Path, options: argparse.Namespace, codecs: dict[str, Any]
    ) -> None:
        self.ledger = Ledger()
        self.step_seconds: list[float] = []
        self.codec_seconds: list[dict[str, float]] = []
        torch.manual_seed(0)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj"])
        self.model = tidelock.connect(
            address, model=model, peft_config=lora, token=TOKEN, ca=certificate, ledger=self.ledger, **codecs
        )
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(1000, 40000, (options.batch, options.length), generator=generator)
        self._labels = self._ids.clone()
        self._labels[:, : options.length - options.labelled] = -100

    def run(self, steps: int, stopwatch: Stopwatch, *, keep: bool) -> None:
        """Train so many steps; keep what they took."""
        stopwatch.take()
        began = time.process_time()
        for _ in range(steps):
            self.model(input_ids=self._ids, labels=self._labels).loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
        seconds = time.process_time() - began
        taken = stopwatch.take()
        if keep:
            self.step_seconds.append(seconds / steps)
            self.codec_seconds.append({name: value / steps for name, value in taken.items()})

    def shares(self) -> list[float]:
        """Return the codecs' share of a step's processor time, one a round."""
        return [sum(c.values()) / step for c, step in zip(self.codec_seconds, self.step_seconds, strict=True)]

    def tensor_bytes(self) -> int:
        """Return the bytes of all tensors that have crossed, with their framing."""
        kinds = [item for sizes in self.ledger.totals().values() for item in sizes.items()]
        return sum(size for kind, size in kinds if kind not in {"control", "model"})


def _stated_ratio(side: _Side, codec: Codec) -> float:
    """Return how many times smaller than fp32 a token is, as a run says before it begins: every width, each way."""
    sites = [(side.model.ends.geometry.sites[block], names) for block, names in sorted(side.model.bank.targets.items())]
    up = [width for site, names in sites for width in (site.width, site.output_width(names))]
    return codec.ratio([side.model.ends.geometry.embedding_width, *up, *up[1:]])


def _report(options: argparse.Namespace, model: str, sides: dict[str, _Side]) -> None:
    result: dict[str, Any] = {
        "benchmark": "codecs",
        "model": Path(model).name,
        "tokens_per_step": options.batch * options.length,
        "labelled_per_step": options.batch * options.labelled,
        "threads": 1,
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy", "grpcio", "tidelock")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "aim": AIM,
        "codecs": {},
    }
    print(f"\n{'codec':<28}{'share of a step (min-max)':<28}{'smaller, stated':>16}{'counted':>9}  error: mean, max")
    for name, side in sides.items():
        shares = side.shares()
        errors = side.ledger.distortion.totals()
        stated = _stated_ratio(side, Codec(VARIANTS[name]["codec"]))
        counted = sides["fp32"].tensor_bytes() / side.tensor_bytes()
        result["codecs"][name] = {
            "share": {"median": statistics.median(shares), "min": min(shares), "max": max(shares)},
            "cpu_seconds_per_step": statistics.median(side.step_seconds),
            "codec_cpu_seconds": {
                each: statistics.median(seconds[each] for seconds in side.codec_seconds) for each in TIMED
            },
            "times_smaller": {"stated": stated, "counted": counted},
            "error": errors,
        }
        spread = f"{statistics.median(shares):.2%} ({min(shares):.2%}-{max(shares):.2%})"
        shown = "; ".join(f"{role} {error['mean']:.2%}, {error['max']:.2%}" for role, error in sorted(errors.items()))
        print(f"{name:<28}{spread:<28}{stated:>16.2f}{counted:>9.2f}  {shown or 'exact'}")
    missed = [name for name, values in result["codecs"].items() if values["share"]["median"] >= AIM]
    print(f"aim: less than {AIM:.0%} of a step: {'missed by ' + ', '.join(missed) if missed else 'met by all'}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
