"""Clouds and runs of one tiny model, as commands in processes of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.certs import Certificates
from tests.support.tidelock_process import Hook, TidelockProcess

TOKEN = "0123456789abcdef-for-tests"
STEPS = 12
STEPS_PER_EPOCH = 3


@dataclass(frozen=True)
class World:
    """What all runs share.

    Attributes:
        folder: For runs and what processes print.
        model: Folder of the model.
        other_model: The same with other weights.
        certificates: Of cloud and authority.
    """

    folder: Path
    model: Path
    other_model: Path
    certificates: Certificates

    @contextmanager
    def cloud(self, name: str, *, model: Path | None = None, port: int = 0) -> Iterator[Cloud]:
        """Run `tidelock cloud` over TLS; kill it in the end."""
        tls = ["--tls-cert", self.certificates.cert, "--tls-key", self.certificates.key]
        options = ["--listen", f"127.0.0.1:{port}", *tls, "--tokens", self.folder / "tokens", "--threads", 1, "--json"]
        process = self.start(name, "cloud", model or self.model, *options)
        with process:
            process.wait_until(process.events)
            yield Cloud(process, str(process.events()[0]["address"]))

    def start(self, name: str, *args: object, hook: Hook | None = None) -> TidelockProcess:
        env = {"TIDELOCK_CACHE": str(self.folder / "cache")}
        return TidelockProcess(*args, folder=self.folder / "printed" / name, env=env, hook=hook)

    def train(self, name: str, address: str, *options: object, hook: Hook | None = None) -> Run:
        """Start the run that every test makes, with further options."""
        lora = ["--rank", 4, "--dropout", 0.3, "--in-flight", 1]
        return self._train(name, *self.at(address), *lora, *options, hook=hook)

    def at(self, address: str) -> list[object]:
        """Return the options that name a cloud."""
        cloud = ["--backbone", "cloud", "--cloud", address, "--token-file", self.folder / "token"]
        return [*cloud, "--ca", self.certificates.ca]

    def train_side(self, name: str, *options: object, hook: Hook | None = None) -> Run:
        """Start the like with a side network, beside blocks in the same process unless the options say otherwise."""
        return self._train(name, "--method", "side", "--reduction", 2, *options, hook=hook)

    def _train(self, name: str, *options: object, hook: Hook | None) -> Run:
        out = self.folder / name
        data = [self.folder / "facts.jsonl", "--eval-data", self.folder / "asked.jsonl", "--model", self.model]
        size = ["--epochs", 4, "--batch-size", 2, "--accumulate", 2]
        rest = ["--learning-rate", 0.01, "--save-every", 2, "--keep", 1, "--threads", 1, "--out", out]
        return Run(out, self.start(name, "train", *data, *size, *rest, *options, hook=hook))

    def resume(self, run: Run, *, hook: Hook | None = None) -> Run:
        args = ["train", "--resume", "--out", run.out]
        return Run(run.out, self.start(f"{run.out.name}-resumed", *args, hook=hook))


@dataclass(frozen=True)
class Cloud:
    """A running cloud."""

    process: TidelockProcess
    address: str

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


@dataclass(frozen=True)
class Run:
    """A run folder and a process that works on it."""

    out: Path
    process: TidelockProcess

    @property
    def metrics(self) -> list[dict[str, Any]]:
        path = self.out / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def checkpoints(self) -> list[int]:
        """The steps of the complete checkpoints."""
        return sorted(int(path.parent.name.split("-")[1]) for path in self.out.glob("checkpoints/*/COMPLETE"))

    def results(self) -> tuple[bytes, bytes, list[tuple[object, object, object]]]:
        """Return what must not depend on faults: adapter, its configuration, and every loss that was measured."""
        losses = [(row["step"], row.get("loss"), row.get("eval_loss")) for row in self.metrics]
        adapter = self.out / "adapter"
        weights = (adapter / "adapter_model.safetensors").read_bytes()
        return weights, (adapter / "adapter_config.json").read_bytes(), losses


def check_equal(run: Run, undisturbed: Run) -> None:
    """Fail unless a run ended as the undisturbed one, bit for bit."""
    assert run.process.wait() == 0, run.process.stderr
    assert run.results() == undisturbed.results()
