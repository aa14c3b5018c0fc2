"""What left the device and what came to it, in bytes and kinds, for how many tokens, and what rounding took.

Counted are the serialised messages, as handed to and taken from gRPC; the framing of HTTP/2 and TLS comes on top.
May import `wire` and libraries.
"""

from __future__ import annotations

import threading
from collections import Counter
from enum import Enum
from typing import TYPE_CHECKING, Any, final

from tidelock.wire.distortion import Distortion

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class Kind(str, Enum):
    """Everything that can cross, by name."""

    EMBEDDING = "embedding"
    SITE_INPUT = "site_input"
    SITE_OUTPUT = "site_output"
    TAP = "tap"
    FINAL_STATE = "final_state"
    FINAL_GRADIENT = "final_gradient"
    SITE_GRADIENT = "site_gradient"
    INPUT_GRADIENT = "input_gradient"
    NORMS = "norms"
    CONTROL = "control"
    MODEL = "model"


_DIRECTIONS = ("sent", "received")


@final
class Ledger:
    """Counts bytes by kind, direction and epoch; safe to use from several threads.

    Attributes:
        distortion: What the codecs took from the tensors that left.
    """

    def __init__(self) -> None:
        self.distortion = Distortion()
        self._lock = threading.Lock()
        self._epoch = 0
        self._crossed: Counter[tuple[int, str, Kind]] = Counter()
        self._tokens: Counter[tuple[int, str]] = Counter()

    def begin_epoch(self, number: int) -> None:
        """Count what crosses from now on as of this epoch; until the first call it is of epoch 0, before training."""
        with self._lock:
            self._epoch = number

    def sent(self, kind: Kind, size_bytes: int) -> None:
        """Count a message that left the device."""
        with self._lock:
            self._crossed[self._epoch, "sent", kind] += size_bytes

    def received(self, kind: Kind, size_bytes: int) -> None:
        """Count a message that came to the device."""
        with self._lock:
            self._crossed[self._epoch, "received", kind] += size_bytes

    def count_pass(self, tokens: int, selected: int, *, training: bool) -> None:
        """Count a micro-batch that went up through the blocks, once however often it was repeated.

        Args:
            tokens: Its real tokens; those of a shared prefix once.
            selected: Those of them whose final state was wanted.
            training: Whether it learns; else it measures.
        """
        name = "trained" if training else "evaluated"
        with self._lock:
            self._tokens[self._epoch, name] += tokens
            self._tokens[self._epoch, f"{name}_selected"] += selected

    def totals(self) -> dict[str, dict[str, int]]:
        """Return `{"sent": {kind: bytes}, "received": {kind: bytes}}`, kinds that crossed only."""
        with self._lock:
            return self._sums(None)

    def tokens(self) -> dict[str, int]:
        """Return the tokens of all passes: `trained` and `evaluated`, and `…_selected` of them, those that are any."""
        with self._lock:
            return self._token_sums(None)

    def epochs(self) -> list[dict[str, Any]]:
        """Return totals and tokens of each epoch in which anything crossed, each with its number as `epoch`."""
        with self._lock:
            numbers = sorted({epoch for epoch, _, _ in self._crossed})
            return [{"epoch": each, **self._sums(each), "tokens": self._token_sums(each)} for each in numbers]

    def add(self, epochs: Iterable[Mapping[str, Any]]) -> None:
        """Count what an earlier part of the same run had counted; see `epochs`."""
        with self._lock:
            for row in epochs:
                for direction in _DIRECTIONS:
                    for kind, size_bytes in row.get(direction, {}).items():
                        self._crossed[row["epoch"], direction, Kind(kind)] += size_bytes
                for name, count in row.get("tokens", {}).items():
                    self._tokens[row["epoch"], name] += count

    def _sums(self, number: int | None) -> dict[str, dict[str, int]]:
        sums: Counter[tuple[str, Kind]] = Counter()
        for (epoch, direction, kind), size_bytes in self._crossed.items():
            if number in {None, epoch}:
                sums[direction, kind] += size_bytes
        return {way: {kind.value: sums[way, kind] for kind in Kind if sums[way, kind]} for way in _DIRECTIONS}

    def _token_sums(self, number: int | None) -> dict[str, int]:
        sums: Counter[str] = Counter()
        for (epoch, name), count in self._tokens.items():
            if number in {None, epoch}:
                sums[name] += count
        return dict(sums)
