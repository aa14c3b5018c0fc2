"""What crosses in one pass, in its order: the message that opens it, and how many bytes each message has.

Sizes follow from shapes alone, so that they are known before anything is computed; docs/protocol.md has the order.
Shapes: N tokens, M selected tokens, D what a site reads, W what it is answered.
May import `backbone`, `wire`, `model` and libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from tidelock.wire import tidelock_pb2 as pb
from tidelock.wire.ledger import Kind
from tidelock.wire.limits import PROTOCOL_VERSION
from tidelock.wire.stream import tensor_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidelock.model.geometry import Geometry
    from tidelock.model.walk import Batch
    from tidelock.wire.codec import Codec, Codecs

# Seconds in it are doubles, of which protobuf leaves out zeros only.
_DONE_BYTES = pb.CloudMessage(done=pb.Done(compute_seconds=1.0, waiting_seconds=1.0)).ByteSize()


@final
@dataclass(frozen=True, slots=True)
class Crossing:
    """One tensor, or one other message, on its way.

    Attributes:
        kind: As the ledger counts it.
        sent: Whether it leaves the device; else it comes to it.
        size_bytes: Of all its messages, as the ledger counts them.
    """

    kind: Kind
    sent: bool
    size_bytes: int


def open_message(
    batch: Batch,
    codecs: Codecs,
    fingerprint: str,
    mode: pb.Mode,
    *,
    seed: int | None = None,
    taps: pb.Taps | None = None,
) -> pb.Open:
    """Return the message that opens a pass.

    Args:
        batch: What is to be run.
        codecs: How its tensors are written.
        fingerprint: Of the model.
        mode: Whether it trains, evaluates or generates.
        seed: Of stochastic rounding; None rounds to the nearest.
        taps: The blocks whose outputs are wanted, if any are.
    """
    every = len(batch.select_M) == batch.rows.num_tokens
    return pb.Open(
        protocol=PROTOCOL_VERSION,
        fingerprint=fingerprint,
        mode=mode,
        starts=batch.rows.starts,
        lengths=batch.rows.lengths,
        width=batch.rows.width,
        shared=batch.rows.shared,
        selected=[] if every else batch.select_M.tolist(),
        active=[pb.ActiveSite(site=site.number, linears=batch.active[site]) for site in sorted(batch.active)],
        activation_codec=codecs.activation.to_pb(),
        gradient_codec=codecs.gradient.to_pb(),
        rounding_seed=seed,
        learns_from=batch.learns_from,
        frames=batch.frames and pb.Frames(kind=batch.frames.kind.upper(), rank=batch.frames.rank),
        taps=taps,
    )


@final
class PassSizes:
    """Knows what crosses in passes through one model.

    Args:
        geometry: The model's.
        codecs: How tensors are written.
        fingerprint: Of the model.
    """

    def __init__(self, geometry: Geometry, codecs: Codecs, fingerprint: str) -> None:
        self._geometry = geometry
        self._codecs = codecs
        self._fingerprint = fingerprint

    def forward(self, batch: Batch) -> list[Crossing]:
        """Return what crosses until the final states are there.

        Args:
            batch: A micro-batch, whose embeddings are not read.
        """
        codec, tokens = self._codecs.activation, batch.rows.num_tokens
        crossings = self._opening(batch, pb.TRAIN if batch.training else pb.EVALUATE)
        for site in sorted(batch.active):
            read, given = self._geometry.sites[site].widths(batch.active[site], batch.frames)
            crossings.append(_received(Kind.SITE_INPUT, (tokens, read), codec, site.number))
            crossings.append(_sent(Kind.SITE_OUTPUT, (tokens, given), codec, site.number))
        return [*crossings, self._final_state(batch)]

    def backward(self, batch: Batch) -> list[Crossing]:
        """Return what crosses from the final states' gradient to the end of a training pass."""
        codec, tokens = self._codecs.gradient, batch.rows.num_tokens
        crossings = [_sent(Kind.FINAL_GRADIENT, (len(batch.select_M), self._geometry.final_width), codec)]
        for site in sorted(batch.active, reverse=True):
            if batch.lowest is not None and site < batch.lowest:
                break
            read, given = self._geometry.sites[site].widths(batch.active[site], batch.frames)
            crossings.append(_received(Kind.SITE_GRADIENT, (tokens, given), codec, site.number))
            if site != batch.lowest:
                crossings.append(_sent(Kind.INPUT_GRADIENT, (tokens, read), codec, site.number))
        return [*crossings, Crossing(Kind.CONTROL, sent=False, size_bytes=_DONE_BYTES)]

    def taps(self, batch: Batch, blocks: Sequence[int], width: int | None) -> list[Crossing]:
        """Return what crosses when the outputs of blocks are read.

        Args:
            batch: One example.
            blocks: The tapped ones.
            width: Numbers per token of each; None is as many as the block gives.
        """
        shape = (batch.rows.num_tokens, width or self._geometry.block_width)
        opening = self._opening(batch, pb.EVALUATE, pb.Taps(blocks=blocks, width=width))
        taps = [_received(Kind.TAP, shape, self._codecs.activation, block) for block in blocks]
        return [*opening, *taps, self._final_state(batch)]

    def _opening(self, batch: Batch, mode: pb.Mode, taps: pb.Taps | None = None) -> list[Crossing]:
        # Eight bytes, whatever the number.
        seed = 1 if mode == pb.TRAIN and self._codecs.stochastic else None
        opened = open_message(batch, self._codecs, self._fingerprint, mode, seed=seed, taps=taps)
        size_bytes = pb.DeviceMessage(open=opened).ByteSize()
        shape = (batch.rows.num_tokens, self._geometry.embedding_width)
        opening = Crossing(Kind.CONTROL, sent=True, size_bytes=size_bytes)
        return [opening, _sent(Kind.EMBEDDING, shape, self._codecs.activation)]

    def _final_state(self, batch: Batch) -> Crossing:
        return _received(Kind.FINAL_STATE, (len(batch.select_M), self._geometry.final_width), self._codecs.activation)


def _sent(kind: Kind, shape: tuple[int, ...], codec: Codec, site: int = 0) -> Crossing:
    return Crossing(kind, sent=True, size_bytes=tensor_bytes(pb.DeviceMessage, kind.value, shape, codec, site))


def _received(kind: Kind, shape: tuple[int, ...], codec: Codec, site: int = 0) -> Crossing:
    return Crossing(kind, sent=False, size_bytes=tensor_bytes(pb.CloudMessage, kind.value, shape, codec, site))
