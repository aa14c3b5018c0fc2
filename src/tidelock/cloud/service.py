"""The cloud's gRPC service: who calls, what the model is, and one engine a stream.

May import `wire`, `model`, `cloud`, `schedule`, errors and libraries; never a tokenizer or code that reads data.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, final

import grpc

from tidelock.cloud.engine import Line, PassAbandoned, PassOrder, read_open, run_pass
from tidelock.cloud.memory import NO_PLACE, MemoryBudget, bytes_at_sites, bytes_of_taps, measure_cost
from tidelock.cloud.scheduler import answer
from tidelock.cloud.turns import ComputeQueue, Turn
from tidelock.errors import (
    CloudBusy,
    ConfigError,
    ModelMismatch,
    NonFiniteError,
    TidelockError,
    TokenRefused,
    WireError,
)
from tidelock.units import format_bytes
from tidelock.wire import tidelock_pb2 as pb
from tidelock.wire import tidelock_pb2_grpc as pb_grpc
from tidelock.wire.limits import NO_WAITING, PART_BYTES, PASS_SECONDS, PROTOCOL_VERSION, SERVICE_NAME

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tidelock.cloud.metrics import Metrics
    from tidelock.cloud.tenants import Tenants
    from tidelock.model.cut import CutModel

logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True, slots=True)
class Limits:
    """What one cloud gives.

    Attributes:
        max_sessions: Passes that are open at once; more wait.
        max_tokens: Tokens, padding included, in one pass.
        max_memory_bytes: What open passes may keep together; None for no limit.
        at_once: Passes that compute at the same time.
        max_active: Active modules in a training pass of a tenant whose line of the tokens file names no other number;
            None for no limit.
        recompute: Whether training passes run each block again on the way back, and so keep less.
    """

    max_sessions: int = 16
    max_tokens: int = 1 << 16
    max_memory_bytes: int | None = None
    at_once: int = 1
    max_active: int | None = None
    recompute: bool = False


@final
@dataclass(frozen=True, slots=True)
class Offer:
    """What a cloud tells devices of its model, and the folder with the files that it lists."""

    description: pb.Description
    folder: Path


@final
class BackboneService(pb_grpc.BackboneServicer):
    """Serves one frozen model to several devices.

    Args:
        cut: The model.
        offer: What devices are told of it, and the files that they may fetch.
        tenants: Who may call.
        limits: What one cloud gives.
        metrics: Counts passes; None counts nothing.

    Attributes:
        cost: What a training pass keeps.
    """

    def __init__(
        self,
        cut: CutModel,
        offer: Offer,
        tenants: Tenants,
        limits: Limits,
        metrics: Metrics | None = None,
    ) -> None:
        self._cut = cut
        self._description = offer.description
        self._folder = offer.folder
        self._tenants = tenants
        self._limits = limits
        self._metrics = metrics
        self._compute = ComputeQueue(limits.at_once)
        self._memory = MemoryBudget(limits.max_memory_bytes)
        self.cost = measure_cost(cut, recompute=limits.recompute)
        # A pass keeps one of these threads from its Open to its end; further passes wait in the executor's line.
        self._engines = ThreadPoolExecutor(limits.max_sessions, thread_name_prefix="pass")
        self._submitting = threading.Lock()
        self._passes: set[Future[None]] = set()

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.Description:
        """Say what this cloud holds."""
        del request
        max_active = self._max_active(self._require_tenant(context))
        if max_active is None:
            return self._description
        description = pb.Description(max_active=max_active)
        description.MergeFrom(self._description)
        return description

    def Fetch(self, request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[pb.FetchPart]:
        """Stream one of the described files."""
        self._require_tenant(context)
        if request.name not in {artefact.name for artefact in self._description.files}:
            _refuse(context, WireError(f"Fetching: expected a name from the description, got {request.name[:80]!r}."))
        with (self._folder / request.name).open("rb") as file:
            while data := file.read(PART_BYTES):
                yield pb.FetchPart(data=data)

    def Decide(self, request: pb.NormReport, context: grpc.ServicerContext) -> pb.ScheduleCommand:
        """Answer a device's norms with what it is to kill and to revive."""
        tenant = self._require_tenant(context)
        try:
            self._check_identity("Deciding", request)
            return answer(request, self._cut.geometry.num_blocks, self._max_active(tenant))
        except TidelockError as error:
            logger.warning("Decision for %s refused: %s", tenant, error)
            _refuse(context, error)

    def Pass(self, request_iterator: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Run one micro-batch."""
        tenant = self._require_tenant(context)
        remaining = context.time_remaining()
        if remaining is None or remaining > PASS_SECONDS + 60:
            msg = f"Opening a pass: expected a deadline of at most {PASS_SECONDS} s, got none or a later one. Set one."
            _refuse(context, WireError(msg))
        outbox: queue.SimpleQueue[bytes | TidelockError | None] = queue.SimpleQueue()
        line = Line(request_iterator, outbox.put)
        may_wait = NO_WAITING not in context.invocation_metadata()
        running = self._submit(line, outbox, tenant, may_wait=may_wait)
        if running is None:
            _refuse(context, CloudBusy(NO_PLACE))

        def leave() -> None:
            # A device that leaves before its pass has begun: nobody else would end the loop below.
            if running.cancel():
                outbox.put(None)

        if not context.add_callback(leave):
            leave()
        while (item := outbox.get()) is not None:
            if isinstance(item, TidelockError):
                _refuse(context, item)
            yield item

    def close(self) -> None:
        """Take no more passes."""
        self._engines.shutdown(wait=False, cancel_futures=True)

    def _submit(
        self, line: Line, outbox: queue.SimpleQueue[bytes | TidelockError | None], tenant: str, *, may_wait: bool
    ) -> Future[None] | None:
        """Put a pass in the engines' line; return None when it would wait there and may not."""
        with self._submitting:
            self._passes = {running for running in self._passes if not running.done()}
            if not may_wait and len(self._passes) >= self._limits.max_sessions:
                return None
            running = self._engines.submit(self._run, line, outbox, tenant, time.perf_counter(), may_wait=may_wait)
            self._passes.add(running)
        return running

    def _run(
        self,
        line: Line,
        outbox: queue.SimpleQueue[bytes | TidelockError | None],
        tenant: str,
        asked: float,
        *,
        may_wait: bool,
    ) -> None:
        """Run a pass in an engine thread, asked for at that time; whatever happens, the outbox is closed."""
        turn = Turn(self._compute, tenant, time.perf_counter() - asked)
        try:
            message = line.open()
            self._check_identity("Opening a pass", message)
            order = read_open(message, self._cut.geometry, self._limits.max_tokens)
            self._check_active(tenant, order)
            rows = order.rows
            size_bytes = self._bytes_kept(order)
            self._check_memory(size_bytes)
            asked = time.perf_counter()
            with self._memory.reserve(size_bytes, may_wait=may_wait):
                turn.waited_seconds += time.perf_counter() - asked
                run_pass(self._cut, order, line, turn, recompute=self._limits.recompute)
            logger.debug("Pass of %s: %d tokens, %.3f s computing.", tenant, rows.num_tokens, turn.seconds)
            if self._metrics is not None:
                self._metrics.count_pass(tenant, rows.num_tokens, turn.seconds)
        except PassAbandoned:
            logger.debug("Pass of %s: the device left.", tenant)
        except CloudBusy as error:
            logger.debug("Pass of %s: no place for another.", tenant)
            outbox.put(error)
        except TidelockError as error:
            logger.warning("Pass of %s refused: %s", tenant, error)
            outbox.put(error)
        except Exception as error:
            logger.exception("Pass of %s failed.", tenant)
            outbox.put(TidelockError(f"Computing a pass: expected it to succeed, got {type(error).__name__}."))
        finally:
            outbox.put(None)

    def _bytes_kept(self, order: PassOrder) -> int:
        """Return what a pass keeps here until its device goes on, or has read it."""
        rows = order.rows
        if order.training:
            at_sites = bytes_at_sites(self._cut.geometry, self._cut.dtype.itemsize, order.active, order.frames)
            return self.cost.bytes_for(len(rows.lengths), rows.width, at_sites)
        if order.taps is not None:
            taps = order.taps
            return bytes_of_taps(self._cut.geometry, rows.num_tokens, len(taps.blocks), taps.width)
        return 0

    def _max_active(self, tenant: str) -> int | None:
        return self._tenants.max_active.get(tenant, self._limits.max_active)

    def _check_active(self, tenant: str, order: PassOrder) -> None:
        max_active = self._max_active(tenant)
        count = len({site.block for site in order.active})
        if max_active is not None and order.training and count > max_active:
            msg = (
                f"Opening a pass: expected at most {max_active} active modules in training, as this cloud's operator "
                f"has set for {tenant}, got {count}. Use --schedule kill-revive with a --budget of "
                f"{max_active} or less, or fewer blocks with --layer."
            )
            raise ConfigError(msg)

    def _check_identity(self, doing: str, message: pb.Open | pb.NormReport) -> None:
        if message.protocol != PROTOCOL_VERSION:
            msg = f"{doing}: expected protocol {PROTOCOL_VERSION}, got {message.protocol}. Install one version."
            raise WireError(msg)
        if message.fingerprint != self._description.fingerprint:
            msg = (
                f"{doing}: expected a model with fingerprint {self._description.fingerprint[:12]}…, which this "
                f"cloud holds, got {message.fingerprint[:12]!r}. The cloud was restarted with other weights: start it "
                "with those that the run began with."
            )
            raise ModelMismatch(msg)

    def _check_memory(self, size_bytes: int) -> None:
        if not self._memory.fits(size_bytes):
            msg = (
                f"Opening a pass: expected it to keep at most {format_bytes(self._memory.limit_bytes or 0)}, as "
                f"--max-memory says, got one of {format_bytes(size_bytes)}. Use smaller or shorter "
                "batches, or have the cloud started with --recompute."
            )
            raise ConfigError(msg)

    def _require_tenant(self, context: grpc.ServicerContext) -> str:
        tenant = self._tenants.tenant_of(context.invocation_metadata())
        if tenant is None:
            msg = "Token: expected one that this cloud knows, got another or none. Ask whoever runs it for yours."
            _refuse(context, TokenRefused(msg))
        return tenant


def add_service(servicer: pb_grpc.BackboneServicer, server: grpc.Server) -> None:
    """Add a servicer to a server, with the messages of Pass as bytes, which `wire.stream` reads and writes."""
    handlers = {
        "Describe": grpc.unary_unary_rpc_method_handler(
            servicer.Describe,
            request_deserializer=pb.DescribeRequest.FromString,
            response_serializer=pb.Description.SerializeToString,
        ),
        "Fetch": grpc.unary_stream_rpc_method_handler(
            servicer.Fetch,
            request_deserializer=pb.FetchRequest.FromString,
            response_serializer=pb.FetchPart.SerializeToString,
        ),
        "Pass": grpc.stream_stream_rpc_method_handler(servicer.Pass),
        "Decide": grpc.unary_unary_rpc_method_handler(
            servicer.Decide,
            request_deserializer=pb.NormReport.FromString,
            response_serializer=pb.ScheduleCommand.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))


_STATUS: dict[type[TidelockError], grpc.StatusCode] = {
    CloudBusy: grpc.StatusCode.ABORTED,
    TokenRefused: grpc.StatusCode.UNAUTHENTICATED,
    ModelMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    ConfigError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    NonFiniteError: grpc.StatusCode.OUT_OF_RANGE,
    WireError: grpc.StatusCode.INVALID_ARGUMENT,
}


def _refuse(context: grpc.ServicerContext, error: TidelockError) -> NoReturn:
    context.abort(_STATUS.get(type(error), grpc.StatusCode.UNKNOWN), error.message)
    raise error
