"""The secret of a cache: a file outside of it, and what is derived from it.

May import errors, `cache.files` and libraries.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tidelock.cache.files import sync_folder
from tidelock.errors import ConfigError, StorageError

_HEX_KEY = re.compile(r"[0-9a-f]{64}\n?")


def default_key_path() -> Path:
    """Return where the user's key is: ``cache.key`` in ``$XDG_CONFIG_HOME/tidelock``, else ``~/.config/tidelock``."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "tidelock" / "cache.key"


@final
@dataclass(frozen=True, slots=True)
class CacheKey:
    """What a cache's key file holds.

    Attributes:
        path: The file.
        secret: 32 random bytes.
    """

    path: Path
    secret: bytes = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> CacheKey:
        """Return the key in a file, which is made when it is not there, readable by its owner only.

        Raises:
            ConfigError: The file holds no key, or others may read it.
            StorageError: The file system refused.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _make(path)
            mode, text = path.stat().st_mode, path.read_text(encoding="ascii", errors="replace")
        except OSError as error:
            reason = error.strerror or error
            msg = (
                f"Cache key: expected a file that can be read or made, got {reason} ({path}). Choose another "
                "--cache-key."
            )
            raise StorageError(msg) from error
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            msg = (
                f"Cache key: expected a file that only its owner may read, got mode {stat.S_IMODE(mode):03o} ({path}). "
                f"Run: chmod 600 {path}"
            )
            raise ConfigError(msg)
        if not _HEX_KEY.fullmatch(text):
            msg = (
                f"Cache key: expected 64 hex digits, got something else ({path}). Restore it, or choose another "
                "--cache-key."
            )
            raise ConfigError(msg)
        return cls(path, bytes.fromhex(text.strip()))

    def derive(self, purpose: str) -> bytes:
        """Return 32 bytes for one purpose, from which neither the key nor those for another one follow."""
        return HKDF(hashes.SHA256(), length=32, salt=None, info=f"tidelock {purpose}".encode()).derive(self.secret)


def _make(path: Path) -> None:
    """Make the file unless it is there; of two processes that do so at once one does, and the other reads its key."""
    if path.exists():
        return
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32) + "\n")
            file.flush()
            os.fsync(file.fileno())
        # Unlike a rename, a link never takes the place of another's file.
        os.link(partial, path)
        sync_folder(path.parent)  # an entry must not outlive its key
    except FileExistsError:
        pass
    finally:
        partial.unlink(missing_ok=True)
