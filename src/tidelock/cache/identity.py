"""What an entry of a cache is of: everything that its numbers depend on, besides the example itself.

May import libraries.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

# A new version of what an entry holds is a new number here.
_FORMAT = 1


@final
@dataclass(frozen=True, slots=True)
class CacheIdentity:
    """What all entries of one kind share.

    Attributes:
        model: Fingerprint of the backbone's weights.
        tokenizer: Hash of the tokenizer's files.
        dtype: In what the backbone computes.
        taps: The tapped blocks, ascending.
        tap_width: Numbers per token to which each tap was projected; None is as many as the block gives.
        codec: How an entry's numbers are written.
        max_length: The most tokens of an example; longer ones were cut there.
    """

    model: str
    tokenizer: str
    dtype: str
    taps: tuple[int, ...]
    tap_width: int | None
    codec: str
    max_length: int

    @property
    def digest(self) -> bytes:
        """32 bytes that stand for it."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).digest()


def entry_name(identity: CacheIdentity, ids: Sequence[Sequence[int]], key: bytes) -> str:
    """Return the name of an example's entry, 64 hex digits.

    With a secret key, since a text that is known or guessed would otherwise be found again by its name.

    Args:
        identity: What the entry is of.
        ids: Token ids of the example and whatever else its taps depend on, each a row.
        key: For names only.
    """
    message = hmac.new(key, identity.digest, hashlib.sha256)
    for row in ids:
        packed = np.asarray(row, dtype="<i8").tobytes()
        message.update(len(packed).to_bytes(8, "little") + packed)
    return message.hexdigest()
