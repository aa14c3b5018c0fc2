"""What an entry of a cache is of: everything that its numbers depend on, besides the example itself.

May import errors, `cache.entry`, `wire.codec` and libraries.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, final

import numpy as np

from tidelock.cache.entry import CODECS
from tidelock.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

# A new version of what an entry holds is a new number here.
_FORMAT = 1
_HASH = re.compile(r"[0-9a-f]{64}")
_DTYPES = ("fp32", "bf16")
_WIRE_CODECS = ("fp32", "bf16", "int8", "int4")


@final
@dataclass(frozen=True, slots=True)
class CacheIdentity:
    """What all entries of one kind share.

    Attributes:
        model: Fingerprint of the backbone's weights, 64 hex digits.
        tokenizer: Hash of the tokenizer's files, 64 hex digits.
        dtype: In what the backbone computes: fp32 or bf16.
        taps: The tapped blocks, ascending.
        tap_width: Numbers per token to which each tap was projected; None is as many as the block gives.
        codec: How an entry's numbers are written: fp32, bf16 or int8.
        wire_codec: How the taps crossed to this device: fp32 also where they did not.

    Raises:
        ConfigError: A value is not what is said here.
    """

    model: str
    tokenizer: str
    dtype: str
    taps: tuple[int, ...]
    tap_width: int | None
    codec: str
    wire_codec: str = "fp32"

    def __post_init__(self) -> None:
        codecs = [codec.value for codec in CODECS]
        ascending = list(self.taps) == sorted(set(self.taps)) and bool(self.taps) and self.taps[0] >= 0
        rules = (
            ("model", _HASH.fullmatch(self.model), "64 hex digits"),
            ("tokenizer", _HASH.fullmatch(self.tokenizer), "64 hex digits"),
            ("dtype", self.dtype in _DTYPES, " or ".join(_DTYPES)),
            ("taps", ascending, "one or more blocks, ascending"),
            ("tap_width", self.tap_width is None or self.tap_width > 0, "None or at least 1"),
            ("codec", self.codec in codecs, f"one of {', '.join(codecs)}"),
            ("wire_codec", self.wire_codec in _WIRE_CODECS, f"one of {', '.join(_WIRE_CODECS)}"),
        )
        for name, holds, expected in rules:
            if not holds:
                msg = f"What a cache is of, {name}: expected {expected}, got {getattr(self, name)!r}. Correct it."
                raise ConfigError(msg)

    @property
    def digest(self) -> bytes:
        """32 bytes that stand for it."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).digest()

    @property
    def group(self) -> str:
        """The name of the folder for its entries, 32 hex digits."""
        return self.digest.hex()[:32]


def entry_name(identity: CacheIdentity, ids: Sequence[Sequence[int]], key: bytes) -> str:
    """Return the name of an example's entry, 64 hex digits.

    With a secret key, since a text that is known or guessed would otherwise be found again by its name.

    Args:
        identity: What the entry is of.
        ids: Token ids of the example and whatever else its taps depend on, each a row.
        key: For names only.

    Raises:
        ConfigError: There is no row, or one has nothing in it.
    """
    if not ids or not all(len(row) for row in ids):
        msg = f"An example of a cache: expected token ids, got rows of {[len(row) for row in ids]}. Leave it out."
        raise ConfigError(msg)
    message = hmac.new(key, identity.digest, hashlib.sha256)
    for row in ids:
        packed = np.asarray(row, dtype="<i8").tobytes()
        message.update(len(packed).to_bytes(8, "little") + packed)
    return message.hexdigest()
