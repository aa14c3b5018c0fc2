"""The frozen blocks in a cloud, over gRPC.

Each micro-batch is one stream. Whatever breaks it (a lost connection, a restarted cloud), the device has all that is
needed to repeat the micro-batch, and repeats it until its patience is over; the cloud keeps nothing that a repeat
could contradict.

Shapes: N tokens, M selected tokens, D hidden width, W numbers of an answer at a site, B rows.
May import `backbone`, `wire`, `model`, `schedule`, errors and libraries.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar, final

import grpc

from tidelock.backbone.crossings import open_message
from tidelock.backbone.open_passes import OpenPasses
from tidelock.backbone.pass_stream import PassStream
from tidelock.backbone.patience import Patience
from tidelock.backbone.scheduler import check_command, norm_report
from tidelock.errors import CloudBusy, CloudUnreachable, WireError
from tidelock.model.taps import Taps
from tidelock.wire import tidelock_pb2 as pb
from tidelock.wire.ledger import Kind
from tidelock.wire.limits import CALL_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from tidelock.backbone.connection import Connection
    from tidelock.backbone.pass_times import TimeSplit
    from tidelock.backbone.protocol import AttemptSites
    from tidelock.model.geometry import Geometry, SiteId
    from tidelock.model.walk import Batch, Sites
    from tidelock.schedule.schedule import Decision, Schedule, ScoreTable

_T = TypeVar("_T")


@final
class _Attempts:
    """Runs one batch on a stream, as often as it takes."""

    def __init__(
        self,
        backbone: RemoteBackbone,
        batch: Batch,
        sites: AttemptSites,
        mode: pb.Mode,
        taps: pb.Taps | None = None,
    ) -> None:
        self._backbone = backbone
        self.connection = backbone.connection
        self._batch = batch
        self._attempt_sites = sites
        self._mode = mode
        self._taps = taps
        self.taps_NW: tuple[Tensor, ...] = ()
        self._active = sorted(batch.active)
        rounds = mode == pb.TRAIN and backbone.connection.codecs.stochastic
        self._rounding_seed = batch.seed if rounds else None
        self._may_wait = True
        self.sites: Sites = sites.begin()
        self.stream: PassStream | None = None

    def forward(self) -> Tensor:
        """Return the final states of a first or a repeated attempt, shape (M, D)."""
        self.close()
        self.sites = self._attempt_sites.begin()
        connection, batch = self.connection, self._batch
        self.stream = stream = PassStream(connection, may_wait=self._may_wait)
        stream.send([connection.egress.open(self._open_message())])
        stream.send(connection.egress.tensor(Kind.EMBEDDING, batch.embeddings_NE, connection.codecs.activation))
        return self.answer_sites(batch.rows.num_tokens, len(batch.select_M))

    def answer_sites(self, tokens: int, selected: int) -> Tensor:
        """Answer at every active site on the way up, or read the taps; return the final states at its end."""
        stream, geometry, codec = self._open_stream(), self._backbone.geometry, self.connection.codecs.activation
        for site in self._active:
            read, _ = geometry.sites[site].widths(self._batch.active[site], self._batch.frames)
            x_ND = stream.receive(Kind.SITE_INPUT, (tokens, read), codec, site=site.number)
            y_NW = self.sites.forward(site, x_ND)
            stream.send(self.connection.egress.tensor(Kind.SITE_OUTPUT, y_NW, codec, site=site.number))
        if self._taps is not None:
            shape = (tokens, self._taps.width if self._taps.HasField("width") else geometry.block_width)
            self.taps_NW = tuple(stream.receive(Kind.TAP, shape, codec, site=block) for block in self._taps.blocks)
        return stream.receive(Kind.FINAL_STATE, (selected, geometry.final_width), codec)

    def backward(self, grad_MD: Tensor) -> None:
        """Answer at every active site on the way down."""
        stream, codec, seed = self._open_stream(), self.connection.codecs.gradient, self._rounding_seed
        stream.resume()
        egress, sites = self.connection.egress, self._backbone.geometry.sites
        stream.send(egress.tensor(Kind.FINAL_GRADIENT, grad_MD, codec, pass_seed=seed))
        lowest = self._batch.lowest
        for site in reversed(self._active if lowest is None else self._active[self._active.index(lowest) :]):
            _, given = sites[site].widths(self._batch.active[site], self._batch.frames)
            shape = (self._batch.rows.num_tokens, given)
            grad_NW = stream.receive(Kind.SITE_GRADIENT, shape, codec, site=site.number)
            grad_ND = self.sites.backward(site, grad_NW, need_input=site != lowest)
            if grad_ND is not None:
                stream.send(egress.tensor(Kind.INPUT_GRADIENT, grad_ND, codec, site=site.number, pass_seed=seed))
        stream.receive_done()
        self.close()

    def extend(self, embeddings_BE: Tensor) -> Tensor:
        """Return the final states after one more token a row, shape (B, D)."""
        connection = self.connection
        self._open_stream().send(connection.egress.tensor(Kind.EMBEDDING, embeddings_BE, connection.codecs.activation))
        return self.answer_sites(len(embeddings_BE), len(embeddings_BE))

    @property
    def is_open(self) -> bool:
        return self.stream is not None

    def close(self) -> None:
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.close()

    def persist(self, action: Callable[[], _T]) -> _T:
        """Return what an action returns, repeated while the cloud is away and the device has patience."""
        patience = Patience(self.connection.patience_seconds)
        passes, alone, times = self._backbone.open_passes, False, self.connection.times
        while True:
            began = time.perf_counter()
            try:
                with times.running(), passes.alone(self) if alone else passes.running(self) as holds:
                    self._may_wait = not holds
                    return action()
            except (grpc.RpcError, CloudUnreachable) as error:
                self.close()
                ours = self.connection.explain(error) if isinstance(error, grpc.RpcError) else error
                if isinstance(ours, CloudBusy) and not alone:
                    alone = True
                    continue
                with times.running():
                    patience.wait(ours, error)
                times.add(waiting=time.perf_counter() - began)
            except BaseException:
                # Nobody will go on with this stream: the cloud must not keep its half until the deadline.
                self.close()
                raise

    def _open_message(self) -> pb.Open:
        connection = self.connection
        fingerprint, seed = connection.description.fingerprint, self._rounding_seed
        return open_message(self._batch, connection.codecs, fingerprint, self._mode, seed=seed, taps=self._taps)

    def _open_stream(self) -> PassStream:
        if self.stream is None:
            msg = "The stream of this pass is closed."
            raise CloudUnreachable(msg)
        return self.stream


@final
class RemotePass:
    """A pass in a cloud; see `backbone.protocol.Pass`."""

    def __init__(self, attempts: _Attempts) -> None:
        self._attempts = attempts
        self.final_MD = attempts.persist(attempts.forward)

    def backward(self, grad_MD: Tensor) -> None:
        """Hand every active site its gradient; repeats the forward pass first when its stream is lost."""

        def attempt() -> None:
            if self._attempts.stream is None:
                self._attempts.forward()
            self._attempts.backward(grad_MD)

        self._attempts.persist(attempt)

    def close(self) -> None:
        """End the stream, which frees what the cloud kept."""
        self._attempts.close()

    def __del__(self) -> None:
        """A pass whose loss is thrown away must not hold memory in the cloud until its deadline."""
        self._attempts.close()


@final
class RemoteGeneration:
    """A growing batch in a cloud; see `backbone.protocol.Generation`.

    Keys and values live in the stream, so that a stream lost in mid-answer ends it with `CloudUnreachable`.
    """

    def __init__(self, attempts: _Attempts) -> None:
        self._attempts = attempts
        self.final_BD = attempts.persist(attempts.forward)

    def extend(self, embeddings_BE: Tensor) -> Tensor:
        """Return the final states after one more token in each row, shape (B, D)."""
        try:
            self.final_BD = self._attempts.extend(embeddings_BE)
        except grpc.RpcError as error:
            raise self._attempts.connection.explain(error) from error
        return self.final_BD

    def close(self) -> None:
        """End the stream, which frees keys and values."""
        self._attempts.close()


@final
class RemoteTapGeneration:
    """A growing batch in a cloud, whose taps are read; see `backbone.protocol.TapGeneration` and `RemoteGeneration`."""

    def __init__(self, attempts: _Attempts) -> None:
        self._run, self._attempts = RemoteGeneration(attempts), attempts
        self.taps = Taps(attempts.taps_NW, self._run.final_BD)

    def extend(self, embeddings_BE: Tensor) -> Taps:
        """Return the taps of one more token in each row."""
        final_BD = self._run.extend(embeddings_BE)
        self.taps = Taps(self._attempts.taps_NW, final_BD)
        return self.taps

    def close(self) -> None:
        """End the stream, which frees keys and values."""
        self._run.close()


@final
class _NoSites:
    """The device's half of a pass without active sites; see `backbone.protocol.AttemptSites`."""

    def begin(self) -> Sites:
        """Return what nobody asks."""
        return self

    def forward(self, site: SiteId, x_ND: Tensor) -> Tensor:
        """Say that this site is not active."""
        del x_ND
        raise _not_asked(site)

    def backward(self, site: SiteId, grad_NW: Tensor, *, need_input: bool) -> Tensor | None:
        """Say that this site is not active."""
        del grad_NW, need_input
        raise _not_asked(site)


def _not_asked(site: SiteId) -> WireError:
    msg = f"Reading taps: expected no site to be asked, got {site.name}. This is a fault in tidelock; please report it."
    return WireError(msg)


@final
class RemoteBackbone:
    """Asks a cloud to run the frozen blocks; see `backbone.protocol.Backbone`.

    Args:
        connection: An open connection whose cloud is known to hold the right model.
        geometry: The shape of that model.
    """

    def __init__(self, connection: Connection, geometry: Geometry) -> None:
        self.connection = connection
        self.open_passes = OpenPasses()
        self._geometry = geometry

    @property
    def geometry(self) -> Geometry:
        """The shape of the model."""
        return self._geometry

    @property
    def on_own_cores(self) -> bool:
        """No: the cloud's processor computes."""
        return False

    def take_times(self) -> TimeSplit:
        """Return what training passes have waited for since the last call."""
        return self.connection.times.take()

    def passes_at_once(self) -> int:
        """Return how many passes at once keep the device or the cloud busy, as far as their times were measured."""
        return self.connection.times.at_once

    @property
    def max_active(self) -> int | None:
        """Most active modules that the cloud's operator lets this device's training passes have."""
        description = self.connection.description
        return description.max_active if description.HasField("max_active") else None

    def decide(self, schedule: Schedule, table: ScoreTable) -> Decision:
        """Return which modules are active next: the cloud's scheduler decides, and this device checks it.

        Raises:
            CloudUnreachable: The cloud stayed away for longer than the connection's patience.
            WireError: It decided otherwise than the schedule says.
        """
        connection = self.connection
        report = norm_report(schedule, table, connection.description.fingerprint)
        patience = Patience(connection.patience_seconds)
        while True:
            try:
                command: pb.ScheduleCommand = connection.stub.Decide(
                    connection.egress.norms(report), metadata=connection.credentials.metadata(), timeout=CALL_SECONDS
                )
                break
            except grpc.RpcError as error:
                patience.wait(connection.explain(error), error)
        connection.egress.ledger.received(Kind.CONTROL, command.ByteSize())
        return check_command(command, schedule, table)

    def forward(self, batch: Batch, sites: AttemptSites) -> RemotePass:
        """Run a batch through the cloud's blocks.

        Raises:
            CloudUnreachable: The cloud stayed away for longer than the connection's patience.
            ModelMismatch: It came back with another model.
            WireError: It broke the protocol.
        """
        run = RemotePass(_Attempts(self, batch, sites, pb.TRAIN if batch.training else pb.EVALUATE))
        ledger = self.connection.egress.ledger
        ledger.count_pass(batch.rows.num_tokens, len(batch.select_M), training=batch.training)
        return run

    def generate(self, batch: Batch, sites: AttemptSites) -> RemoteGeneration:
        """Run prompts through the cloud's blocks and have it keep keys and values; errors as for `forward`."""
        return RemoteGeneration(_Attempts(self, batch, sites, pb.GENERATE))

    def read_taps(self, batch: Batch, blocks: Sequence[int], width: int | None = None) -> Taps:
        """Have the cloud run a batch through its blocks and send what the tapped ones gave; errors as for `forward`."""
        attempts = _Attempts(self, batch, _NoSites(), pb.EVALUATE, pb.Taps(blocks=blocks, width=width))
        try:
            final_MD = attempts.persist(attempts.forward)
        finally:
            attempts.close()
        self.connection.egress.ledger.count_pass(batch.rows.num_tokens, len(batch.select_M), training=False)
        return Taps(attempts.taps_NW, final_MD)

    def generate_taps(self, batch: Batch, blocks: Sequence[int], width: int | None = None) -> RemoteTapGeneration:
        """Run prompts through the cloud's blocks, read the taps, and have it keep keys and values."""
        return RemoteTapGeneration(_Attempts(self, batch, _NoSites(), pb.GENERATE, pb.Taps(blocks=blocks, width=width)))

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()
