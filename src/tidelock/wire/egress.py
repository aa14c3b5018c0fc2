"""The only door out of the device.

Every message to a cloud passes here: it must be of a known kind, carry floating-point numbers, an `Open` or norms, and
is counted in the ledger before it leaves. Token ids, labels, text and parameters have no kind and so no way out.

May import errors, `wire` and libraries.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, final

from tidelock.errors import NonFiniteError, WireError
from tidelock.wire import tidelock_pb2 as pb
from tidelock.wire.codec import Codec, rounding_seed, split_parts
from tidelock.wire.ledger import Kind, Ledger
from tidelock.wire.stream import write_part

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

# What may leave, and as what its rounding is counted. A kind's name is that of its message's field.
_ROLES = {
    Kind.EMBEDDING: "activation",
    Kind.SITE_OUTPUT: "activation",
    Kind.FINAL_GRADIENT: "gradient",
    Kind.INPUT_GRADIENT: "gradient",
}


@final
class Egress:
    """Turns what may leave the device into messages, and writes each into the ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def open(self, message: pb.Open) -> bytes:
        """Return the encoded message that opens a pass."""
        return self._count(Kind.CONTROL, pb.DeviceMessage(open=message).SerializeToString())

    def norms(self, report: pb.NormReport) -> pb.NormReport:
        """Return a report of norms, counted: one number for each module, and none of its weights.

        Raises:
            NonFiniteError: A norm is infinite or not a number.
        """
        for module in report.modules:
            if not math.isfinite(module.norm):
                msg = (
                    f"Sending norms: expected finite numbers, got {module.norm} for block {module.block}. The weights "
                    "of that module are damaged: go on from an earlier checkpoint, with a lower learning rate."
                )
                raise NonFiniteError(msg)
        self.ledger.sent(Kind.NORMS, report.ByteSize())
        return report

    def tensor(
        self, kind: Kind, tensor: Tensor, codec: Codec, *, site: int = 0, pass_seed: int | None = None
    ) -> Iterator[bytes]:
        """Yield the encoded messages that carry a tensor to the cloud.

        Args:
            kind: What it is.
            tensor: Of any floating dtype, on any device.
            codec: How its numbers are written.
            site: The site's number, where it belongs to one.
            pass_seed: Rounds integers stochastically, alike at every attempt of a pass; None rounds to the nearest.

        Raises:
            NonFiniteError: It holds an infinite or undefined number, for which its codec has no place.
            WireError: Tensors of this kind do not leave the device, this one does not hold floating-point numbers, or
                the codec took more from it than it may.
        """
        if kind not in _ROLES:
            msg = (
                f"Sending a {kind.value}: expected one of {sorted(known.value for known in _ROLES)}, got "
                "something that must not leave the device. This is a fault in tidelock; please report it."
            )
            raise WireError(msg)
        if not tensor.is_floating_point():
            msg = (
                f"Sending a {kind.value}: expected floating-point numbers, got {tensor.dtype}, which may be token "
                "ids or labels. This is a fault in tidelock; please report it."
            )
            raise WireError(msg)
        encoded = codec.encode(kind.value, tensor, seed=rounding_seed(pass_seed, kind.value, site))
        if codec is not Codec.FP32:
            stochastic = pass_seed is not None
            self.ledger.distortion.measure(_ROLES[kind], kind.value, tensor, encoded, codec, stochastic=stochastic)
        for part in split_parts(encoded, tuple(tensor.shape), codec, site=site):
            yield self._count(kind, write_part(pb.DeviceMessage, kind.value, part))

    def _count(self, kind: Kind, message: bytes) -> bytes:
        self.ledger.sent(kind, len(message))
        return message
