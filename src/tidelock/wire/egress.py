"""The only door out of the device.

Every message to a cloud passes here: it must be of a known kind, carry floating-point numbers or an `Open`, and is
counted in the ledger before it leaves. Token ids, labels, text and parameters have no kind and so no way out.

May import errors, `wire` and libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from tidelock.errors import WireError
from tidelock.wire import tidelock_pb2 as pb
from tidelock.wire.codec import write_parts
from tidelock.wire.ledger import Kind, Ledger
from tidelock.wire.stream import write_part

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor

# A kind's name is that of its message's field.
_TENSOR_KINDS = (Kind.EMBEDDING, Kind.SITE_OUTPUT, Kind.FINAL_GRADIENT, Kind.INPUT_GRADIENT)


@final
class Egress:
    """Turns what may leave the device into messages, and writes each into the ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def open(self, message: pb.Open) -> bytes:
        """Return the encoded message that opens a pass."""
        return self._count(Kind.CONTROL, pb.DeviceMessage(open=message).SerializeToString())

    def tensor(self, kind: Kind, tensor: Tensor, dtype: torch.dtype, *, block: int = 0) -> Iterator[bytes]:
        """Yield the encoded messages that carry a tensor to the cloud.

        Raises:
            WireError: Tensors of this kind do not leave the device, or this one does not hold floating-point numbers.
        """
        if kind not in _TENSOR_KINDS:
            msg = (
                f"Sending a {kind.value}: expected one of {sorted(known.value for known in _TENSOR_KINDS)}, got "
                "something that must not leave the device. This is a fault in tidelock; please report it."
            )
            raise WireError(msg)
        if not tensor.is_floating_point():
            msg = (
                f"Sending a {kind.value}: expected floating-point numbers, got {tensor.dtype}, which may be token "
                "ids or labels. This is a fault in tidelock; please report it."
            )
            raise WireError(msg)
        for part in write_parts(tensor, dtype, block=block):
            yield self._count(kind, write_part(pb.DeviceMessage, kind.value, part))

    def _count(self, kind: Kind, message: bytes) -> bytes:
        self.ledger.sent(kind, len(message))
        return message
