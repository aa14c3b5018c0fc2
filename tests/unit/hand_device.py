"""A device that speaks the wire by hand, so that a test can break it anywhere; and what it speaks with."""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass

import grpc
import pytest
import torch

from tests.support.sites import attn
from tidelock.cloud.server import CloudServer
from tidelock.wire import tidelock_pb2 as pb
from tidelock.wire import tidelock_pb2_grpc as pb_grpc
from tidelock.wire.address import Address
from tidelock.wire.codec import Codec, Part, TensorReader, write_parts
from tidelock.wire.limits import PROTOCOL_VERSION

TOKEN = "0123456789abcdef-token"
WIDTH, BLOCKS, VOCABULARY, POSITIONS = 32, 3, 64, 64
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
# Query heads have 32 numbers together, keys and values 16 each.
SITE_WIDTH = 64


def wait_until(holds, what: str, seconds: float = 20.0) -> None:
    """Wait for another thread to have done something; fail when it never does."""
    give_up = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < give_up, f"never happened: {what}"
        time.sleep(0.005)


@dataclass(frozen=True)
class RunningCloud:
    server: CloudServer
    address: Address
    busy: list[object]

    @classmethod
    def of(cls, server: CloudServer) -> RunningCloud:
        """Start a server, with its engines counted while they work."""
        busy: list[object] = []
        service = server._service
        original = service._run

        def counted(*arguments, **options):
            busy.append(arguments)
            try:
                original(*arguments, **options)
            finally:
                busy.remove(arguments)

        service._run = counted  # type: ignore[method-assign]
        return cls(server, server.start(), busy)

    @property
    def service(self):
        return self.server._service

    @property
    def fingerprint(self) -> str:
        return self.server.description.fingerprint

    def is_idle(self) -> bool:
        """Whether no engine works, nobody waits for a turn, and no memory is held."""
        memory = self.service._memory
        return (
            not self.busy
            and self.service._engines._work_queue.empty()
            and self.service._compute.length == 0
            and memory._used == 0
            and not memory._line
        )


class HandDevice:
    """Speaks the wire message by message, so that a test can break it anywhere."""

    def __init__(self, cloud: RunningCloud, token: str = TOKEN) -> None:
        self.cloud = cloud
        self.channel = grpc.insecure_channel(cloud.address.target)
        self.stub = pb_grpc.BackboneStub(self.channel)
        self.metadata = (("authorization", f"Bearer {token}"),)
        self.passes: list[HandPass] = []

    def begin(self, *, timeout: float | None = 60.0) -> HandPass:
        self.passes.append(HandPass(self, timeout))
        return self.passes[-1]

    def close(self) -> None:
        for run in self.passes:
            run.leave()
        self.channel.close()


class HandPass:
    """One stream, whose messages protobuf's own code writes and reads."""

    def __init__(self, device: HandDevice, timeout: float | None) -> None:
        self.fingerprint = device.cloud.fingerprint
        self.outbox: queue.SimpleQueue[pb.DeviceMessage | None] = queue.SimpleQueue()
        self.call = device.stub.Pass(iter(self.outbox.get, None), metadata=device.metadata, timeout=timeout)

    def open(self, **changes) -> None:
        self.outbox.put(pb.DeviceMessage(open=an_open(**{"fingerprint": self.fingerprint, **changes})))

    def send(self, field: str, *shape: int, block: int = 0) -> None:
        for part in write_parts(field, torch.full(shape, 0.01), Codec.FP32, site=_number(field, block)):
            self.outbox.put(pb.DeviceMessage(**{field: to_protobuf(part)}))  # type: ignore[arg-type]

    def receive(self, field: str, *shape: int, block: int = 0) -> torch.Tensor:
        reader = TensorReader(field, shape, Codec.FP32, site=_number(field, block))
        while not reader.complete:
            message = next(self.call)
            assert message.WhichOneof("body") == field
            reader.add(from_protobuf(getattr(message, field)))
        return reader.tensor()

    def forward(self, tokens: int = 8) -> None:
        """Open a training pass over the first two blocks and answer all the way up."""
        self.open()
        self.send("embedding", tokens, WIDTH)
        for block in (0, 1):
            self.receive("site_input", tokens, WIDTH, block=block)
            self.send("site_output", tokens, SITE_WIDTH, block=block)
        self.receive("final_state", tokens, WIDTH)

    def backward(self, tokens: int = 8) -> float:
        """Walk all the way back; return the seconds that the cloud says that it computed."""
        self.send("final_gradient", tokens, WIDTH)
        self.receive("site_gradient", tokens, SITE_WIDTH, block=1)
        self.send("input_gradient", tokens, WIDTH, block=1)
        self.receive("site_gradient", tokens, SITE_WIDTH, block=0)
        message = next(self.call)
        assert message.WhichOneof("body") == "done"
        assert next(self.call, None) is None
        return float(message.done.compute_seconds)

    def error(self) -> grpc.RpcError:
        """Return the error with which the cloud ends the stream, whatever it had still to say before."""
        with pytest.raises(grpc.RpcError) as caught:
            for _ in self.call:
                pass
        return caught.value

    def leave(self) -> None:
        self.outbox.put(None)
        self.call.cancel()


def _number(field: str, block: int) -> int:
    return block if field == "tap" else attn(block).number


def to_protobuf(part: Part) -> pb.TensorPart:
    """Return a part as protobuf's own code has it."""
    return pb.TensorPart(site=part.site, codec=part.codec, shape=part.shape, data=bytes(part.data))  # type: ignore[arg-type]


def from_protobuf(message: pb.TensorPart) -> Part:
    return Part(message.site, message.codec, tuple(message.shape), memoryview(message.data))


def an_active_site(block: int, linears: tuple[str, ...] = PROJECTIONS) -> pb.ActiveSite:
    """Return how an order names a block's attention."""
    return pb.ActiveSite(site=attn(block).number, linears=linears)


def an_open(**changes) -> pb.Open:
    """Return the message that opens a training pass of one row of 8 tokens."""
    values = {
        "protocol": PROTOCOL_VERSION,
        "mode": pb.TRAIN,
        "starts": [0],
        "lengths": [8],
        "width": 8,
        "active": [an_active_site(block) for block in (0, 1)],
        "activation_codec": pb.FP32,
        "gradient_codec": pb.FP32,
    }
    return pb.Open(**{**values, **changes})
