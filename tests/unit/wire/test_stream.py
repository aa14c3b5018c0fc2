"""Messages of a stream: written and read as protobuf's own code would, whatever the bytes."""

from __future__ import annotations

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.hand_device import an_open, from_protobuf, to_protobuf
from tidelock.errors import WireError
from tidelock.wire import tidelock_pb2 as pb
from tidelock.wire.codec import Codec, Part, write_parts
from tidelock.wire.limits import MESSAGE_BYTES, PART_BYTES
from tidelock.wire.stream import read_message, tensor_bytes, write_part

TENSORS = [(pb.DeviceMessage, name) for name in ("embedding", "site_output", "final_gradient", "input_gradient")] + [
    (pb.CloudMessage, name) for name in ("site_input", "final_state", "site_gradient", "tap")
]
UINT32 = st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1))
PARTS = st.builds(
    Part,
    UINT32,
    st.integers(0, 4),
    st.lists(UINT32, max_size=6).map(tuple),
    st.one_of(st.binary(max_size=40), st.integers(0, 40_000).map(bytes)).map(memoryview),
)


def test_every_tensor_field_is_tried():
    for kind in (pb.DeviceMessage, pb.CloudMessage):
        fields = kind.DESCRIPTOR.fields
        tensors = {field.name for field in fields if field.message_type is pb.TensorPart.DESCRIPTOR}
        assert tensors == {name for known, name in TENSORS if known is kind}


@given(st.sampled_from(TENSORS), PARTS)
def test_a_part_is_written_as_protobuf_reads_it(field, part):
    kind, name = field
    message = kind.FromString(write_part(kind, name, part))
    assert message == kind(**{name: to_protobuf(part)})


@given(st.sampled_from(TENSORS), PARTS)
def test_what_is_written_is_read_again(field, part):
    kind, name = field
    frame = write_part(kind, name, part)
    message = read_message(kind, frame)
    assert (message.field, message.body, message.size_bytes) == (name, part, len(frame))


@given(st.sampled_from(TENSORS), PARTS)
def test_what_protobuf_writes_is_read(field, part):
    kind, name = field
    message = read_message(kind, kind(**{name: to_protobuf(part)}).SerializeToString())
    assert message.field == name
    assert same(message.body, part)


def same(body, part):
    """Whether a body, which is protobuf's own message where the fast way was not gone, says what a part says."""
    return (body if isinstance(body, Part) else from_protobuf(body)) == part


def test_the_data_of_a_part_is_not_copied():
    (part,) = write_parts("a tensor", torch.ones(1000), Codec.FP32, site=7)
    frame = write_part(pb.CloudMessage, "site_input", part)
    assert read_message(pb.CloudMessage, frame).body.data.obj is frame


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (7, 33), (130, 64), (700, 2051)])
def test_a_tensors_bytes_are_known_from_its_shape(codec, shape):
    for site in (0, 5, 300):
        parts = write_parts("embedding", torch.zeros(shape), codec, site=site)
        written = sum(len(write_part(pb.DeviceMessage, "embedding", part)) for part in parts)
        assert tensor_bytes(pb.DeviceMessage, "embedding", shape, codec, site) == written


def test_a_full_part_fits_into_one_message():
    part = Part(2**32 - 1, pb.BF16, (2**32 - 1,) * 8, memoryview(bytes(PART_BYTES)))
    assert len(write_part(pb.DeviceMessage, "input_gradient", part)) < MESSAGE_BYTES


@pytest.mark.parametrize(
    ("kind", "message", "field"),
    [
        (pb.DeviceMessage, pb.DeviceMessage(open=an_open()), "open"),
        (pb.CloudMessage, pb.CloudMessage(done=pb.Done(compute_seconds=1.5)), "done"),
        (pb.CloudMessage, pb.CloudMessage(done=pb.Done()), "done"),
    ],
)
def test_other_messages_are_protobufs(kind, message, field):
    read = read_message(kind, message.SerializeToString())
    assert (read.field, read.body) == (field, getattr(message, field))


def test_an_empty_message_is_of_no_field():
    read = read_message(pb.DeviceMessage, b"")
    assert (read.field, read.body, read.size_bytes) == (None, None, 0)


FRAME = write_part(pb.DeviceMessage, "embedding", Part(1, pb.FP32, (2, 3), memoryview(bytes(range(24)))))


def check_like_protobuf(frame):
    """Fail unless a frame is read exactly as protobuf reads it, or refused where protobuf refuses it."""
    try:
        expected = pb.DeviceMessage.FromString(frame)
    except DecodeError:
        with pytest.raises(WireError, match=f"expected a DeviceMessage, got {len(frame)} bytes that are none"):
            read_message(pb.DeviceMessage, frame)
        return
    read = read_message(pb.DeviceMessage, frame)
    assert read.field == expected.WhichOneof("body")
    if read.field == "open":
        assert read.body == expected.open
    elif read.field:
        assert same(read.body, from_protobuf(getattr(expected, read.field)))


@given(st.binary(max_size=60))
def test_garbage_is_read_as_protobuf_reads_it(frame):
    check_like_protobuf(frame)


@given(st.integers(0, len(FRAME) - 1), st.integers(0, 255))
@settings(max_examples=400)
def test_a_damaged_frame_is_read_as_protobuf_reads_it(at, value):
    check_like_protobuf(FRAME[:at] + bytes([value]) + FRAME[at + 1 :])


@given(st.integers(0, len(FRAME)), st.binary(max_size=8))
def test_a_cut_or_lengthened_frame_is_read_as_protobuf_reads_it(at, more):
    check_like_protobuf(FRAME[:at])
    check_like_protobuf(FRAME + more)
    check_like_protobuf(FRAME[:at] + more + FRAME[at:])


# Fields of a TensorPart: known ones, written shortly and at length, and some that it does not have or that are none.
KNOWN = [
    "0800",
    "0805",
    "08ff01",
    "08" + "ff" * 9 + "01",
    "1001",
    "1002",
    "1807",
    "1a020102",
    "1a00",
    "1aac02" + "00" * 300,
]
ODD = [
    "2d01020304",
    "31" + "00" * 8,
    "aa010100",
    "a20000",
    "2a022222",
    "00",
    "0b",
    "0c",
    "22ffffffff0f",
    "22830061",
    "2d00220100",
]
FIELDS = st.one_of(
    st.sampled_from([*KNOWN, *ODD]).map(bytes.fromhex),
    st.binary(max_size=20).map(lambda data: b"\x22" + bytes([len(data)]) + data),
)


@given(st.lists(FIELDS, max_size=5), st.sampled_from([0x12, 0x1A, 0x22, 0x2A]))
@settings(max_examples=400)
def test_fields_in_any_order_and_number_are_read_as_protobuf_reads_them(fields, tag):
    inner = b"".join(fields)
    length = bytes([len(inner)]) if len(inner) < 128 else bytes([len(inner) & 0x7F | 0x80, len(inner) >> 7])
    check_like_protobuf(bytes([tag]) + length + inner)
