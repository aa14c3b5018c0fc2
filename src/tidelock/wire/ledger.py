"""What left the device and what came to it, in bytes and kinds, and what rounding took of what left.

Counted are the serialised messages, as handed to and taken from gRPC; the framing of HTTP/2 and TLS comes on top.
May import `wire` and libraries.
"""

from __future__ import annotations

import threading
from collections import Counter
from enum import Enum
from typing import final

from tidelock.wire.distortion import Distortion


class Kind(str, Enum):
    """Everything that can cross, by name."""

    EMBEDDING = "embedding"
    SITE_INPUT = "site_input"
    SITE_OUTPUT = "site_output"
    FINAL_STATE = "final_state"
    FINAL_GRADIENT = "final_gradient"
    SITE_GRADIENT = "site_gradient"
    INPUT_GRADIENT = "input_gradient"
    NORMS = "norms"
    CONTROL = "control"
    MODEL = "model"


@final
class Ledger:
    """Counts bytes by kind and direction; safe to use from several threads.

    Attributes:
        distortion: What the codecs took from the tensors that left.
    """

    def __init__(self) -> None:
        self.distortion = Distortion()
        self._lock = threading.Lock()
        self._sent: Counter[Kind] = Counter()
        self._received: Counter[Kind] = Counter()

    def sent(self, kind: Kind, size_bytes: int) -> None:
        """Count a message that left the device."""
        with self._lock:
            self._sent[kind] += size_bytes

    def received(self, kind: Kind, size_bytes: int) -> None:
        """Count a message that came to the device."""
        with self._lock:
            self._received[kind] += size_bytes

    def totals(self) -> dict[str, dict[str, int]]:
        """Return `{"sent": {kind: bytes}, "received": {kind: bytes}}`, kinds that crossed only."""
        with self._lock:
            return {
                "sent": {kind.value: self._sent[kind] for kind in Kind if self._sent[kind]},
                "received": {kind.value: self._received[kind] for kind in Kind if self._received[kind]},
            }

    def add(self, totals: dict[str, dict[str, int]]) -> None:
        """Count what an earlier part of the same run had counted; see `totals`."""
        with self._lock:
            for counter, direction in ((self._sent, "sent"), (self._received, "received")):
                for kind, size_bytes in totals.get(direction, {}).items():
                    counter[Kind(kind)] += size_bytes
