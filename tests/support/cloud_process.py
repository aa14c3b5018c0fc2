"""A second process that serves several models, each on a loopback port of its own, with the real server.

One process for all, because starting PyTorch and transformers takes longer than most tests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import final

TOKEN = "a-token-for-tests-only"
_START_SECONDS = 120.0
_ROOT = Path(__file__).parents[2]


@final
@dataclass(frozen=True)
class Service:
    """One model to serve.

    Attributes:
        name: What the test calls it.
        model: Its folder.
        port: 0 lets the system choose.
        tls_cert: With `tls_key`: serve over TLS.
        tls_key: PEM file.
        client_ca: Ask devices for a certificate of this authority.
        dtype: What the blocks compute in.
        max_sessions: Passes open at once.
        max_memory_bytes: What open passes may keep.
        max_active: Active sites in a training pass.
        recompute: Run blocks again on the way back.
    """

    name: str
    model: str
    port: int = 0
    tls_cert: str | None = None
    tls_key: str | None = None
    client_ca: str | None = None
    dtype: str = "fp32"
    max_sessions: int = 8
    max_memory_bytes: int | None = None
    max_active: int | None = None
    recompute: bool = False


@final
class CloudProcess:
    """The process, which ends when its parent does; `kill` and `start` again find the same ports.

    Args:
        services: What it serves.
        log: File for its standard error.
        threads: How many it computes with; more than one makes tiny models slower.
    """

    def __init__(self, services: Sequence[Service], log: Path, *, threads: int = 1) -> None:
        self._threads = threads
        self._services = {service.name: service for service in services}
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> CloudProcess:
        self.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def log(self) -> str:
        """All that it has logged, over all its lives."""
        return self._log.read_text()

    def port(self, name: str) -> int:
        return self._services[name].port

    def url(self, name: str) -> str:
        service = self._services[name]
        return f"{'grpcs' if service.tls_cert else 'grpc'}://127.0.0.1:{service.port}"

    def start(self) -> None:
        """Start it and wait until all models are served."""
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.cloud_process"],
                cwd=_ROOT,
                env={**os.environ, "OMP_NUM_THREADS": str(self._threads)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([asdict(service) for service in self._services.values()]) + "\n")
        self._process.stdin.flush()
        overdue = threading.Timer(_START_SECONDS, self._process.kill)
        overdue.start()
        line = self._process.stdout.readline()
        overdue.cancel()
        assert line, f"the cloud process did not start:\n{self.log[-4000:]}"
        for name, port in json.loads(line).items():
            self._services[name] = replace(self._services[name], port=port)

    def kill(self) -> None:
        """End it at once (SIGKILL), whatever it is doing."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process = None


def _serve() -> None:
    import logging

    logging.basicConfig(level=logging.INFO)
    logging.getLogger("tidelock").setLevel(logging.DEBUG)
    services = [Service(**item) for item in json.loads(sys.stdin.readline())]
    sys.stdout.write(json.dumps(dict(map(_start, services))) + "\n")
    sys.stdout.flush()
    sys.stdin.read()  # ends with the parent
    os._exit(0)


_KEPT: list[object] = []


def _start(service: Service) -> tuple[str, int]:
    from tidelock.cloud.server import CloudServer, Listener
    from tidelock.cloud.service import Limits
    from tidelock.cloud.tenants import Tenants
    from tidelock.model.load import ModelChoice
    from tidelock.wire.address import Address

    cert, key, client_ca = (
        None if path is None else Path(path) for path in (service.tls_cert, service.tls_key, service.client_ca)
    )
    server = CloudServer(
        ModelChoice(service.model, service.dtype),
        Tenants({"tests": TOKEN}),
        Listener(Address("127.0.0.1", service.port, cert is not None), cert, key, client_ca),
        limits=Limits(
            max_sessions=service.max_sessions,
            max_memory_bytes=service.max_memory_bytes,
            at_once=2,
            max_active=service.max_active,
            recompute=service.recompute,
        ),
    )
    _KEPT.append(server)
    return service.name, server.start().port


if __name__ == "__main__":
    _serve()
