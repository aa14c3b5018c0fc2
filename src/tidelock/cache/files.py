"""Files that are there whole and on the disk, or not at all; the disk's refusals in our words.

May import errors.
"""

from __future__ import annotations

import errno
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tidelock.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

# Ends the name of a file that is being written. What a killed process leaves has this name for good.
PARTIAL = ".partial"


@contextmanager
def whole_file(path: Path, what: str) -> Iterator[IO[bytes]]:
    """Open a file to write, which takes its place once everything is on the disk; only this user can read it.

    Args:
        path: Its place, in an existing folder; what is there is replaced.
        what: What it is, in error messages.

    Raises:
        StorageError: The file system refused; nothing has changed.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        refusal = storage_error(f"Writing {what}", error, path)
        raise refusal from error


def sync_folder(path: Path) -> None:
    """Have the disk hold which files a folder has.

    Raises:
        OSError: The file system refused.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storage_error(doing: str, error: OSError, path: Path) -> StorageError:
    """Return our error for a refusal of the file system.

    Args:
        doing: What was being done.
        error: What the system said.
        path: What was being read or written.
    """
    advice = "Make room" if error.errno in {errno.ENOSPC, errno.EDQUOT} else "Check disk and permissions"
    return StorageError(
        f"{doing}: expected the file system to do it, got {error.strerror or error} ({path}). {advice}, and start "
        "again: what is cached stays."
    )
