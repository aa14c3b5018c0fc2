"""Runs one pass on one stream: reads what the device sends, walks through the blocks, answers.

Every number that a device sends is checked against the model and the limits before memory is taken for it. Nothing of
a pass outlives it.

May import `wire`, `model`, `cloud`, errors and libraries; never a tokenizer or code that reads data.

Shapes: N tokens, M selected tokens, D hidden width, W numbers of an answer at a site, B rows.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, final

import grpc
import torch
from torch import Tensor
from transformers import DynamicCache

from tidelock.cloud.turns import Turn
from tidelock.errors import WireError
from tidelock.model.frames import FRAME_KINDS, FrameChoice, largest_rank
from tidelock.model.geometry import Place, SiteId
from tidelock.model.rows import Rows
from tidelock.model.taps import TapPass
from tidelock.model.walk import Batch, Walk
from tidelock.wire import tidelock_pb2 as pb
from tidelock.wire.codec import Codec, TensorReader, rounding_seed, write_parts
from tidelock.wire.stream import read_message, write_part

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from tidelock.model.cut import CutModel
    from tidelock.model.geometry import Geometry


@final
class PassAbandoned(Exception):
    """The device closed its stream in the middle of a pass."""


@final
@dataclass(frozen=True, slots=True)
class TapOrder:
    """Which blocks' outputs are asked for.

    Attributes:
        blocks: Their numbers, ascending.
        width: Numbers per token to which each is projected; None is as many as the block gives.
    """

    blocks: tuple[int, ...]
    width: int | None


@final
@dataclass(frozen=True, slots=True)
class PassOrder:
    """What an `Open` message asks for, checked."""

    mode: pb.Mode
    rows: Rows
    select_M: Tensor
    active: dict[SiteId, tuple[str, ...]]
    activation_codec: Codec
    gradient_codec: Codec
    rounding_seed: int | None
    learns_from: int | None
    frames: FrameChoice | None
    taps: TapOrder | None

    @property
    def training(self) -> bool:
        """Whether a backward pass will follow."""
        return self.mode == pb.TRAIN


def read_open(message: pb.Open, geometry: Geometry, max_tokens: int) -> PassOrder:
    """Return a pass's order.

    Args:
        message: As it came from the device.
        geometry: The model's.
        max_tokens: Most tokens, padding included, that a pass may have.

    Raises:
        WireError: Something in it is out of range or contradicts itself.
    """
    starts, lengths, width = tuple(message.starts), tuple(message.lengths), message.width
    padded = len(lengths) * width
    _require(0 < padded <= max_tokens, f"1 to {max_tokens} tokens, padding included", f"{len(lengths)} x {width}")
    fits = len(starts) == len(lengths) and all(
        length > 0 and start + length <= width for start, length in zip(starts, lengths, strict=True)
    )
    _require(fits, f"runs of real tokens within {width} positions", f"starts {starts[:8]}, lengths {lengths[:8]}")
    limit = geometry.max_positions
    _require(limit is None or width <= limit, f"rows of at most {limit} tokens", f"{width}")
    rows = Rows(starts, lengths, width, message.shared)
    if rows.shared:
        _check_shared(message, rows, geometry)
    selected = tuple(message.selected)
    ascending = all(a < b for a, b in itertools.pairwise(selected))
    _require(
        ascending and (not selected or selected[-1] < rows.num_tokens),
        f"ascending token numbers below {rows.num_tokens}",
        f"{selected[:8]}",
    )
    _require(message.mode in {pb.TRAIN, pb.EVALUATE, pb.GENERATE}, "a known mode", f"{message.mode}")
    at_right = all(start + length == width for start, length in zip(starts, lengths, strict=True))
    _require(message.mode != pb.GENERATE or at_right, "prompts padded at the left", "padding at the right")
    gradient_codec = Codec.from_pb(message.gradient_codec)
    seed = message.rounding_seed if message.HasField("rounding_seed") else None
    _require(seed is None or gradient_codec.is_integer, "a rounding seed with int8 or int4 only", gradient_codec.value)
    active = _read_active(message, geometry)
    learns_from = message.learns_from if message.HasField("learns_from") else None
    learns = learns_from is None or any(site.block == learns_from for site in active)
    _require(learns, "a block with an active site to learn from", str(learns_from))
    return PassOrder(
        mode=message.mode,
        rows=rows,
        select_M=torch.tensor(selected) if selected else torch.arange(rows.num_tokens),
        active=active,
        activation_codec=Codec.from_pb(message.activation_codec),
        gradient_codec=gradient_codec,
        rounding_seed=seed,
        learns_from=learns_from,
        frames=_read_frames(message, geometry, active) if message.HasField("frames") else None,
        taps=_read_taps(message, geometry) if message.HasField("taps") else None,
    )


def _check_shared(message: pb.Open, rows: Rows, geometry: Geometry) -> None:
    """Refuse a prefix that not all rows could have, or that these blocks could not share."""
    shares = message.mode in {pb.TRAIN, pb.EVALUATE} and geometry.family.joins_rows
    where = "a shared prefix where the family takes rows end to end, in training and evaluation"
    _require(shares, where, f"mode {message.mode}")
    # Each of several rows has a token of its own; a single one shares with nobody.
    most = min(rows.lengths) - 1 if len(rows.lengths) > 1 else 0
    fits = not any(rows.starts) and rows.shared <= most
    _require(fits, f"a shared prefix of at most {most} tokens, rows padded at the right", f"{rows.shared}")


def _read_frames(message: pb.Open, geometry: Geometry, active: Collection[SiteId]) -> FrameChoice:
    number, rank, most = message.frames.kind, message.frames.rank, largest_rank(geometry)
    kind = {pb.FrameKind.Value(kind.upper()): kind for kind in FRAME_KINDS}.get(number)
    _require(kind is not None, f"frames of a kind out of {FRAME_KINDS}", f"number {number}")
    fits = 1 <= rank <= most and all(site.place is Place.ATTN for site in active)
    _require(fits, f"frames of a rank from 1 to {most}, at attentions only", f"rank {rank}")
    return FrameChoice(str(kind), rank)


def _read_taps(message: pb.Open, geometry: Geometry) -> TapOrder:
    evaluates = message.mode in {pb.EVALUATE, pb.GENERATE} and not message.active
    _require(evaluates, "taps in a pass without active sites that does not train", f"mode {message.mode}")
    blocks = tuple(message.taps.blocks)
    ascending = bool(blocks) and all(a < b for a, b in itertools.pairwise(blocks))
    fits = ascending and blocks[-1] < geometry.num_blocks
    _require(fits, f"tapped blocks below {geometry.num_blocks}, ascending", f"{blocks[:8]}")
    width = message.taps.width if message.taps.HasField("width") else None
    limit = geometry.block_width
    _require(width is None or 1 <= width <= limit, f"taps of 1 to {limit} numbers a token", f"{width}")
    return TapOrder(blocks, width)


def _read_active(message: pb.Open, geometry: Geometry) -> dict[SiteId, tuple[str, ...]]:
    sites = [SiteId.from_number(active.site) for active in message.active]
    _require(
        all(site in geometry.sites for site in sites) and len(set(sites)) == len(sites),
        f"different sites of {geometry.num_blocks} blocks",
        f"{[site.name for site in sites[:8]]}",
    )
    _require(message.mode != pb.TRAIN or bool(sites), "an active site to train", "none")
    active: dict[SiteId, tuple[str, ...]] = {}
    for site, asked in zip(sites, message.active, strict=True):
        known = tuple(projection.name for projection in geometry.sites[site].projections)
        named = tuple(asked.linears[: len(known) + 1])
        in_order = tuple(name for name in known if name in named)
        _require(bool(named) and named == in_order, f"linears out of {known}, in order", f"{named}"[:80])
        active[site] = named
    return active


def _require(holds: bool, expected: str, got: str) -> None:  # noqa: FBT001
    if not holds:
        msg = f"Opening a pass: expected {expected}, got {got}."
        raise WireError(msg)


@final
class Line:
    """The two ends of a stream as the engine sees them.

    Args:
        incoming: The device's encoded messages.
        send: Takes an encoded message for the device.
    """

    def __init__(self, incoming: Iterator[bytes], send: Callable[[bytes], None]) -> None:
        self._incoming = incoming
        self._send = send

    def send(self, field: str, tensor: Tensor, codec: Codec, *, site: int = 0, pass_seed: int | None = None) -> None:
        """Send a tensor as the named field of `CloudMessage`; with the pass's seed, rounded stochastically.

        Raises:
            NonFiniteError: It holds an infinite or undefined number, for which the codec has no place.
        """
        seed = rounding_seed(pass_seed, field, site)
        for part in write_parts(field, tensor, codec, site=site, seed=seed):
            self._send(write_part(pb.CloudMessage, field, part))

    def send_done(self, done: pb.Done) -> None:
        """Send the message that ends a training pass."""
        self._send(pb.CloudMessage(done=done).SerializeToString())

    def open(self) -> pb.Open:
        """Return the message that opens a pass.

        Raises:
            WireError: Another one came.
            PassAbandoned: The device closed the stream.
        """
        message: pb.Open = self._next("open")
        return message

    def tensor(self, field: str, shape: tuple[int, ...], codec: Codec, *, site: int = 0) -> Tensor:
        """Return the tensor that must come next; errors as for `open`."""
        reader = TensorReader(field, shape, codec, site=site)
        while not reader.complete:
            reader.add(self._next(field))
        return reader.tensor()

    def _next(self, field: str) -> Any:  # noqa: ANN401  (a part, or the message that the field holds)
        try:
            frame = next(self._incoming, None)
        except grpc.RpcError as error:
            raise PassAbandoned from error
        if frame is None:
            raise PassAbandoned
        message = read_message(pb.DeviceMessage, frame)
        if message.field != field:
            msg = f"Reading from a device: expected {field}, got {message.field}. Use the same version on both sides."
            raise WireError(msg)
        return message.body


@final
class StreamSites:
    """Has the device at the other end of a stream answer at the active sites; see `model.walk.Sites`."""

    def __init__(self, line: Line, order: PassOrder, geometry: Geometry, turn: Turn) -> None:
        self._line = line
        self._order = order
        self._geometry = geometry
        self._turn = turn

    def forward(self, site: SiteId, x_ND: Tensor) -> Tensor:
        """Send a site's input; return the device's answer, shape (N, W)."""
        codec = self._order.activation_codec
        _, width = self._geometry.sites[site].widths(self._order.active[site], self._order.frames)
        with self._turn.waiting():
            self._line.send("site_input", x_ND, codec, site=site.number)
            return self._line.tensor("site_output", (x_ND.shape[0], width), codec, site=site.number)

    def backward(self, site: SiteId, grad_NW: Tensor, *, need_input: bool) -> Tensor | None:
        """Send a site's gradient; return that of its input, shape (N, D), if it is needed."""
        codec = self._order.gradient_codec
        with self._turn.waiting():
            seed = self._order.rounding_seed
            self._line.send("site_gradient", grad_NW, codec, site=site.number, pass_seed=seed)
            if not need_input:
                return None
            read, _ = self._geometry.sites[site].widths(self._order.active[site], self._order.frames)
            shape = (grad_NW.shape[0], read)
            return self._line.tensor("input_gradient", shape, codec, site=site.number)


def run_pass(cut: CutModel, order: PassOrder, line: Line, turn: Turn, *, recompute: bool = False) -> None:
    """Run one pass to its end.

    Args:
        cut: The model.
        order: What the device has asked for.
        line: The stream.
        turn: Its use of the compute queue.
        recompute: Run each block again on the way back.

    Raises:
        WireError: The device broke the protocol.
        PassAbandoned: The device closed the stream.
    """
    geometry = cut.geometry
    shape = (order.rows.num_tokens, geometry.embedding_width)
    embeddings_NE = line.tensor("embedding", shape, order.activation_codec)
    batch = Batch(
        embeddings_NE,
        order.rows,
        order.select_M,
        order.active,
        order.training,
        learns_from=order.learns_from,
        frames=order.frames,
    )
    if order.taps is not None:
        _run_taps(cut, batch, order, order.taps, line, turn)
        return
    walk = Walk(cut, batch, StreamSites(line, order, geometry, turn), turn.give_way, recompute=recompute)
    cache = DynamicCache(config=cut.config) if order.mode == pb.GENERATE else None
    with turn.computing():
        final_MD = walk.forward(cache)
    line.send("final_state", final_MD, order.activation_codec)
    if cache is not None:
        _generate(partial(walk.extend, cache=cache), order, line, turn, geometry)
    elif order.training:
        grad_MD = line.tensor("final_gradient", tuple(final_MD.shape), order.gradient_codec)
        with turn.computing():
            walk.backward(grad_MD)
        line.send_done(pb.Done(compute_seconds=turn.seconds, waiting_seconds=turn.waited_seconds))


def _run_taps(cut: CutModel, batch: Batch, order: PassOrder, taps: TapOrder, line: Line, turn: Turn) -> None:
    """Run a pass whose taps are sent as soon as they are there; in the cloud none is kept."""

    def send(block: int, tap_NW: Tensor) -> None:
        with turn.waiting():
            line.send("tap", tap_NW, order.activation_codec, site=block)

    run = TapPass(cut, batch, taps.blocks, taps.width, send, turn.give_way)
    cache = DynamicCache(config=cut.config) if order.mode == pb.GENERATE else None
    with turn.computing():
        final_MD = run.forward(cache).final_MD
    line.send("final_state", final_MD, order.activation_codec)
    if cache is not None:
        _generate(lambda x_BE: run.extend(x_BE, cache).final_MD, order, line, turn, cut.geometry)


def _generate(extend: Callable[[Tensor], Tensor], order: PassOrder, line: Line, turn: Turn, geometry: Geometry) -> None:
    """Run one more token a row, again and again, until the device closes the stream."""
    rows = order.rows
    shape = (len(rows.lengths), geometry.embedding_width)
    for _ in range((geometry.max_positions or rows.width + 4096) - rows.width):
        embeddings_BE = line.tensor("embedding", shape, order.activation_codec)
        with turn.computing():
            final_BD = extend(embeddings_BE)
        line.send("final_state", final_BD, order.activation_codec)
