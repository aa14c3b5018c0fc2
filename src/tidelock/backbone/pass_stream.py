"""The stream of one pass in a cloud: messages to it and from it, and where the time goes.

May import `backbone`, `wire`, errors and libraries.
"""

from __future__ import annotations

import queue
import time
from typing import TYPE_CHECKING, Any, final

from tidelock.errors import CloudUnreachable, WireError
from tidelock.wire import tidelock_pb2 as pb
from tidelock.wire.codec import Codec, TensorReader
from tidelock.wire.ledger import Kind
from tidelock.wire.limits import NO_WAITING, PASS_SECONDS
from tidelock.wire.stream import read_message

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from tidelock.backbone.connection import Connection


@final
class PassStream:
    """One Pass stream: one attempt at one micro-batch.

    Args:
        connection: To the cloud.
        may_wait: Whether it may wait there for a place.
    """

    def __init__(self, connection: Connection, *, may_wait: bool) -> None:
        self._connection = connection
        self._blocked_seconds = 0.0
        self._device_seconds = 0.0
        self._since = time.perf_counter()
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        metadata = (*connection.credentials.metadata(), *(() if may_wait else (NO_WAITING,)))
        self._call: Any = connection.open_pass(iter(self._outbox.get, None), metadata=metadata, timeout=PASS_SECONDS)

    def send(self, messages: Iterable[bytes]) -> None:
        """Have messages sent; returns at once."""
        for message in messages:
            self._outbox.put(message)

    def receive(self, kind: Kind, shape: tuple[int, ...], codec: Codec, *, site: int = 0) -> Tensor:
        """Return the tensor that must come next; `Kind` and the message's field have the same names."""
        reader = TensorReader(kind.value, shape, codec, site=site)
        while not reader.complete:
            reader.add(self._next(kind, kind.value))
        return reader.tensor()

    def resume(self) -> None:
        """Begin the way back: the time since the last message was the loss's, and not this pass's."""
        self._since = time.perf_counter()

    def receive_done(self) -> None:
        """End a training pass, and count where its time went."""
        done: pb.Done = self._next(Kind.CONTROL, "done")
        wire = max(0.0, self._blocked_seconds - done.compute_seconds - done.waiting_seconds)
        self._connection.times.finish(
            device=self._device_seconds, cloud=done.compute_seconds, waiting=done.waiting_seconds, wire=wire
        )

    def close(self) -> None:
        """End the stream, which frees what the cloud kept."""
        self._outbox.put(None)
        self._call.cancel()

    def _next(self, kind: Kind, field: str) -> Any:  # noqa: ANN401  (a part, or the message that the field holds)
        began = time.perf_counter()
        self._device_seconds += began - self._since
        frame: bytes | None = next(self._call, None)
        self._since = time.perf_counter()
        self._blocked_seconds += self._since - began
        if frame is None:
            msg = "The cloud ended a pass before it was complete."
            raise CloudUnreachable(msg)
        self._connection.egress.ledger.received(kind, len(frame))
        message = read_message(pb.CloudMessage, frame)
        if message.field != field:
            msg = f"Reading from the cloud: expected {field}, got {message.field}. Use the same version on both sides."
            raise WireError(msg)
        return message.body
