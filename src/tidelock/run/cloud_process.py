"""A cloud in a second process on this machine, with TLS and a token, for the demo and the benchmarks.

May import everything below `run`.
"""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from tidelock.cloud.memory import PassCost
from tidelock.errors import CloudUnreachable
from tidelock.run.certificates import make_loopback_certificate

if TYPE_CHECKING:
    from collections.abc import Iterator

_STOP_SECONDS = 15


@final
@dataclass(frozen=True, slots=True)
class LoopbackCloud:
    """A running cloud process.

    Attributes:
        address: Its URL, on 127.0.0.1.
        token_file: File with a token that it knows.
        certificate: PEM file with its certificate, to be trusted.
        pid: Its process.
        cost: What a training pass keeps there.
    """

    address: str
    token_file: Path
    certificate: Path
    pid: int
    cost: PassCost


@contextmanager
def loopback_cloud(model: str, *options: str) -> Iterator[LoopbackCloud]:
    """Run `tidelock cloud` in a second process; give its address and what is needed to use it.

    Args:
        model: Folder or hub name of the model.
        *options: Further options of the command.

    Raises:
        CloudUnreachable: The process ended before it listened.
    """
    folder = Path(tempfile.mkdtemp(prefix="tidelock-cloud-"))
    try:
        certificate, key = make_loopback_certificate(folder)
        token = secrets.token_hex(24)
        token_file = _private_file(folder / "token", token)
        tokens = _private_file(folder / "tokens", f"loopback {token}\n")
        arguments = ["cloud", model, "--listen", "127.0.0.1:0", "--tokens", str(tokens), "--json"]
        arguments += ["--tls-cert", str(certificate), "--tls-key", str(key), *options]
        log_path = folder / "cloud.log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(  # noqa: S603  (our own command, with arguments of our own)
                [sys.executable, "-m", "tidelock", *arguments], stdout=subprocess.PIPE, stderr=log
            )
        try:
            said = _wait_for_address(process, log_path)
            cost = PassCost(float(said["memory_bytes_per_token"]), float(said["memory_bytes_per_token_squared"]))
            yield LoopbackCloud(str(said["address"]), token_file, certificate, process.pid, cost)
        finally:
            _stop(process)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _private_file(path: Path, text: str) -> Path:
    path.touch(mode=0o600)
    path.write_text(text, encoding="utf-8")
    return path


def _wait_for_address(process: subprocess.Popen[bytes], log_path: Path) -> dict[str, Any]:
    """Return the line that a cloud prints once it listens."""
    for line in process.stdout or ():
        event: dict[str, Any] = json.loads(line)
        if event.get("event") == "listening":
            return event
    log = log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    msg = f"Starting a cloud process: expected it to listen, got an exit: {log[-1] if log else 'it said nothing'}"
    raise CloudUnreachable(msg)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
