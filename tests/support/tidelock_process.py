"""The `tidelock` command in processes of its own that start in a moment.

They are forked from a server that has imported the libraries and done nothing else: importing them takes several times
longer than a tiny run.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, final

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.support.preload"])
# A process that hangs fails its test before pytest's own limit does, and says what it has printed.
PATIENCE_SECONDS = 90.0

Hook = Callable[[], None]


@final
class TidelockProcess:
    """One `tidelock` command.

    Args:
        *args: The command line after `tidelock`.
        folder: For what it prints; made when it is not there.
        env: Added to the environment.
        hook: Called in the process before the command; picklable.
    """

    def __init__(
        self, *args: object, folder: Path, env: dict[str, str] | None = None, hook: Hook | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / "stdout", folder / "stderr"
        target_args = ([str(arg) for arg in args], str(self._out), str(self._err), env or {}, hook)
        self._process = _CONTEXT.Process(target=_command, args=target_args)
        self._process.start()

    def __enter__(self) -> TidelockProcess:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._out.read_text() if self._out.exists() else ""

    @property
    def stderr(self) -> str:
        return self._err.read_text() if self._err.exists() else ""

    def events(self) -> list[dict[str, Any]]:
        """Return the whole JSON lines of its stdout."""
        return [json.loads(line) for line in self.stdout.splitlines(keepends=True) if line.endswith("\n")]

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> int:
        """Kill it if it still runs; return its exit code, negative for a signal."""
        if self._process.is_alive():
            self.send(signal.SIGKILL)
        return self.wait()

    def wait(self, seconds: float = PATIENCE_SECONDS) -> int:
        """Return its exit code once it has ended by itself."""
        self._process.join(seconds)
        code = self._process.exitcode
        if code is None:
            self.send(signal.SIGKILL)
            self._process.join()
            message = f"tidelock did not end by itself:\n{self.stdout[-2000:]}\n{self.stderr[-4000:]}"
            raise AssertionError(message)
        return code

    def wait_until(self, happened: Callable[[], object]) -> None:
        """Wait for something that the process does."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not happened():
            ended = not self._process.is_alive()
            assert not ended or happened(), f"tidelock has ended before:\n{self.stdout}\n{self.stderr[-4000:]}"
            assert time.monotonic() < end, f"tidelock does not get there:\n{self.stdout}\n{self.stderr[-4000:]}"
            time.sleep(0.005)


def _command(args: list[str], out: str, err: str, env: dict[str, str], hook: Hook | None) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.update(env)
    # pytest started in the background by a shell passes on that it ignores Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hook is not None:
        hook()
    sys.argv = ["tidelock", *args]
    from tidelock.cli.main import main

    main()
