"""Peers of a pool: as processes of this machine, and which of them a process is. May import errors and libraries."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tidelock.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_STOP_SECONDS = 10
# In a peer's folder.
_NUMBER = "peer"


@contextmanager
def local_peers(count: int, address: str, options: Sequence[str], out: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run `tidelock pool join` in processes, which are gone afterwards whatever happens.

    Args:
        count: How many.
        address: Where peer 0 is met.
        options: Further options of the command.
        out: Each has a folder `peer-N` in it, and writes what it says to `peer-N.log`.
    """
    processes: list[subprocess.Popen[bytes]] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for number in range(1, count + 1):
            arguments = ["pool", "join", address, "--peer", str(number), "--out", str(out / f"peer-{number}"), *options]
            with (out / f"peer-{number}.log").open("wb") as log:
                processes.append(
                    subprocess.Popen(  # noqa: S603  (our own command, with arguments of our own)
                        [sys.executable, "-m", "tidelock", *arguments],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # Ctrl-C is for peer 0, which stops them
                    )
                )
        yield processes
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_STOP_SECONDS)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_STOP_SECONDS)
            process.kill()  # does nothing to one that has ended
            process.wait()


def remembered_number(out: Path) -> int | None:
    """Return the number that a peer had, which its cache goes with; None when its folder has none."""
    try:
        return int((out / _NUMBER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def remember_number(out: Path, number: int) -> None:
    """Write a peer's number into its folder.

    Raises:
        StorageError: The file system refused.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / _NUMBER).write_text(f"{number}\n", encoding="utf-8")
    except OSError as error:
        msg = f"Peer's folder: expected one that can be written, got {error.strerror} ({out}). Choose another --out."
        raise StorageError(msg) from error
