"""Where tidelock keeps what it can make again: converted models and the hashes of tensors.

Not for anything of a run: those files lie in the run's own folder. May import only `errors`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from pathlib import Path

_HEX_SHA256 = re.compile(r"[0-9a-f]{64}")


def cache_folder() -> Path:
    """Return the user's cache folder for tidelock, which need not exist yet.

    It is ``$TIDELOCK_CACHE``, else ``$XDG_CACHE_HOME/tidelock``, else ``~/.cache/tidelock``.
    """
    if chosen := os.environ.get("TIDELOCK_CACHE"):
        return Path(chosen).expanduser().absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).absolute() / "tidelock"
    return Path.home() / ".cache" / "tidelock"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part.

    Raises:
        OSError: The folder cannot be made or the disk refused.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load_digests(file: Path, size: int, mtime_ns: int) -> dict[str, str]:
    """Return the sha256 of each tensor of a file that is known from before; empty when it changed since.

    Args:
        file: The file that holds the tensors.
        size: Its size now, in bytes.
        mtime_ns: Its modification time now.
    """
    try:
        entry = json.loads(_digest_path(file).read_bytes())
        if [entry["path"], entry["size"], entry["mtime_ns"]] != [str(file.resolve()), size, mtime_ns]:
            return {}
        digests = dict(entry["sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}  # never written, or damaged: what it held is computed again
    if not all(isinstance(digest, str) and _HEX_SHA256.fullmatch(digest) for digest in digests.values()):
        return {}
    return digests


def store_digests(file: Path, size: int, mtime_ns: int, digests: dict[str, str]) -> None:
    """Remember the sha256 of tensors of a file; without effect where the cache cannot be written.

    Args:
        file: The file that holds the tensors.
        size: Its size when they were hashed, in bytes.
        mtime_ns: Its modification time when they were hashed.
        digests: Tensor name to sha256 in hex.
    """
    entry = {"path": str(file.resolve()), "size": size, "mtime_ns": mtime_ns, "sha256": digests}
    with contextlib.suppress(OSError):  # a cache saves time only: a read-only home must not stop a run
        write_atomically(_digest_path(file), json.dumps(entry).encode())


def _digest_path(file: Path) -> Path:
    key = hashlib.sha256(os.fsencode(file.resolve())).hexdigest()
    return cache_folder() / "tensor-sha256" / f"{key}.json"
