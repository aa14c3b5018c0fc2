"""The only door out: integers and what has no kind stay here, and what leaves is counted to the byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tidelock.errors import WireError
from tidelock.wire import tidelock_pb2 as pb
from tidelock.wire.codec import Codec
from tidelock.wire.egress import Egress
from tidelock.wire.ledger import Kind, Ledger
from tidelock.wire.limits import PART_BYTES

LEAVING = (Kind.EMBEDDING, Kind.SITE_OUTPUT, Kind.FINAL_GRADIENT, Kind.INPUT_GRADIENT)


def test_every_kind_is_either_sent_or_refused():
    refused = set(Kind) - set(LEAVING)
    received = {"site_input", "tap", "final_state", "site_gradient", "model"}
    assert {kind.value for kind in refused} == {*received, "control", "norms"}


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind not in LEAVING])
def test_what_must_not_leave_is_refused(kind):
    egress = Egress(Ledger())
    with pytest.raises(WireError, match=f"Sending a {kind.value}: .*must not leave the device"):
        list(egress.tensor(kind, torch.zeros(2), Codec.FP32))
    assert egress.ledger.totals() == {"sent": {}, "received": {}}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("kind", LEAVING)
def test_token_ids_and_labels_are_refused_whatever_they_are_called(kind, dtype):
    egress = Egress(Ledger())
    with pytest.raises(WireError, match=f"expected floating-point numbers, got {dtype}"):
        list(egress.tensor(kind, torch.zeros(2, dtype=dtype), Codec.FP32))
    assert egress.ledger.totals()["sent"] == {}


@pytest.mark.parametrize("kind", LEAVING)
def test_a_tensor_leaves_under_its_own_name(kind):
    (frame,) = Egress(Ledger()).tensor(kind, torch.ones(2), Codec.BF16, site=5)
    message = pb.DeviceMessage.FromString(frame)
    assert message.WhichOneof("body") == kind.value
    part = getattr(message, kind.value)
    assert (part.site, part.codec, list(part.shape), len(part.data)) == (5, pb.BF16, [2], 4)


@given(st.lists(st.tuples(st.sampled_from(LEAVING), st.integers(1, 3000)), max_size=6), st.binary(max_size=40))
def test_the_ledger_holds_the_bytes_of_the_messages(sendings, fingerprint):
    egress, expected = Egress(Ledger()), dict.fromkeys(Kind, 0)
    expected[Kind.CONTROL] = len(egress.open(pb.Open(fingerprint=fingerprint.hex(), starts=[0], width=7)))
    for kind, numbers in sendings:
        frames = list(egress.tensor(kind, torch.zeros(numbers), Codec.FP32))
        expected[kind] += sum(map(len, frames))
        assert sum(pb.DeviceMessage.FromString(frame).ByteSize() for frame in frames) == sum(map(len, frames))
    sent = {kind.value: size for kind, size in expected.items() if size}
    assert egress.ledger.totals() == {"sent": sent, "received": {}}


def test_a_part_is_counted_when_it_leaves_not_before():
    egress = Egress(Ledger())
    messages = egress.tensor(Kind.EMBEDDING, torch.zeros(PART_BYTES), Codec.FP32)
    assert egress.ledger.totals()["sent"] == {}
    first = next(messages)
    assert egress.ledger.totals()["sent"] == {"embedding": len(first)}
    assert len(list(messages)) == 3
    assert egress.ledger.totals()["sent"]["embedding"] > 4 * PART_BYTES


def test_an_open_message_is_control():
    message = pb.DeviceMessage.FromString(Egress(Ledger()).open(pb.Open(width=3)))
    assert message.WhichOneof("body") == "open"
    assert message.open.width == 3
