"""Where a cache is and what it may take: what a user chooses of it.

May import errors, `cache` and libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

from tidelock.cache.key import CacheKey, default_key_path
from tidelock.cache.store import ActivationCache

if TYPE_CHECKING:
    from tidelock.cache.identity import CacheIdentity


@final
@dataclass(frozen=True, slots=True)
class CacheConfig:
    """An activation cache, as a user chooses it.

    Attributes:
        folder: Made when it is not there. Several runs can share one.
        codec: How numbers are kept: fp32, exact; bf16, half the bytes; int8, a quarter.
        limit_bytes: The most that all its entries may take; None leaves that to the disk.
        key: File with its secret, made when it is not there; None is the user's own.
    """

    folder: Path
    codec: str = "fp32"
    limit_bytes: int | None = None
    key: Path | None = None

    def open(self, identity: CacheIdentity) -> ActivationCache:
        """Return the entries of one identity in it; errors as `CacheKey.open` and `ActivationCache`."""
        key = CacheKey.open(self.key or default_key_path())
        return ActivationCache(Path(self.folder), key, identity, limit_bytes=self.limit_bytes)
